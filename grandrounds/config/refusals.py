"""How a recipe is told what does not go with one of its settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Contradiction = tuple[str, object, bool, str, str]
"""Key, value, whether it is met, why it cannot be, and what to do."""


def refused(setting: str, contradictions: Iterable[Contradiction]) -> Iterator[str]:
    """Yield a sentence for each contradiction to a setting that is met."""
    for key, value, is_met, why, instead in contradictions:
        if is_met:
            shown = repr(value) if isinstance(value, str) else str(value).lower()
            advice = f"{instead[0].upper()}{instead[1:]}."
            yield f"{key} = {shown} does not go with {setting}: {why}. {advice}"
