"""Which bases a private visit cannot train on, found before their weights are loaded."""

from __future__ import annotations

from functools import lru_cache

from grandrounds.errors import ModelError
from grandrounds.model.lora import without_weights
from grandrounds.model.targets import expert_modules


@lru_cache(maxsize=4)
def check_base(name: str) -> None:
    """Check that the gradients of a base's adapter can be told apart by record.

    Raises
    ------
    ModelError
        If it routes tokens to experts: tokens of all records are sorted together, and a router sees
        the whole batch, so that one record may change what another one gives.
    """
    experts = expert_modules(without_weights(name))
    if experts:
        raise ModelError(
            f"privacy.unit-guarantee does not cover {name!r}, which routes tokens to experts "
            f"({', '.join(experts[:3])}): one record may change what another one gives. Use a base "
            "without experts."
        )
