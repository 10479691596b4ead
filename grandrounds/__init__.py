"""Federated instruction tuning of medical language models, on Flower and PEFT."""

from typing import TYPE_CHECKING, Any

from grandrounds.waiting import wait_passively

if TYPE_CHECKING:
    from grandrounds.api import compare, dossier, evaluate, open_run, plan, recipe, report, run

__all__ = ["compare", "dossier", "evaluate", "open_run", "plan", "recipe", "report", "run"]

__version__ = "0.2.0"

wait_passively()  # before any module of this package loads PyTorch


def __getattr__(name: str) -> Any:
    """Return a function of the Python API, which is loaded at its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from grandrounds import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
