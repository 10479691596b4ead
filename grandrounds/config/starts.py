"""Starts of an adapter: every run has PEFT's default, and the others are refused by name.

A run's server draws A from the seed and loads no base, and every site draws the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from grandrounds.config.synonyms import only_letters, spelled_here
from grandrounds.config.values import Scalar

OURS = "A is drawn from the seed, uniform within 1 / sqrt(in-features), and B is zero"
"""PEFT's `init_lora_weights = True` (Hu et al., LoRA (2021), section 4.1, but for A's law)."""

_TAKEN_OFF = (
    "takes A and B from a decomposition of the base's weights and subtracts their product from "
    "these: it would change the base at every site, and needs its weights on the server, which "
    "never loads them"
)

REASONS = {
    "pissa": f"PiSSA {_TAKEN_OFF}",
    "olora": f"OLoRA {_TAKEN_OFF}",
    "corda": "CorDA decomposes the base's weights by what a site's own examples activate, and "
    "changes the base: no two sites would train over the same one",
    "loraga": "LoRA-GA starts from gradients on a site's own examples, and changes the base: no "
    "two sites would train over the same one",
    "loftq": "LoftQ quantises the base anew and starts from what this loses: it would change the "
    "base at every site, and needs its weights on the server, which never loads them",
    "eva": "EVA starts from what a site's own examples activate, so that every site would start "
    "elsewhere, and its start would tell of its data",
    "mica": "MiCA starts from a decomposition of the base's weights, which the server never loads",
    "gaussian": "its A has another law than the one that server and sites draw from the seed",
    "orthogonal": "its A and B are others than those that server and sites draw from the seed",
    "false": "its B is not zero, so that the untrained adapter would change the base's answers",
}
"""Letters of a start → why no run has it."""

_DEFAULT = ("true", "default", "kaiming", "kaiminguniform", "lora", "none", "")
_KINDS = ("pissa", "olora", "corda", "loraga", "loftq", "eva", "mica")
_OFF = ("false", "off", "no", "none", "0", "")
_NAMES = ("initloraweights", "initweights", "initlora", "init", "initialization", "initialisation")


def wanted_start(key: str, value: Scalar) -> str | None:
    """Return the letters of the start that a key asks for; None if the key is about no start.

    `true` stands for that of every run. `model.lora.init-lora-weights = "pissa"` asks for `pissa`
    in any spelling, as does `use-pissa = true`.
    """
    word = only_letters(str(value))
    if key.partition(".")[1] and spelled_here(key).partition(".")[0] not in ("model", "lora"):
        return None
    for part in _parts(key):
        if part in _NAMES:
            return "true" if word in _DEFAULT else word
        kind = part.removesuffix("config").removesuffix("init")
        if kind in _KINDS:
            return "true" if word in _OFF else kind
    return None


def _parts(key: str) -> Iterator[str]:
    for part in spelled_here(key).split("."):
        letters = only_letters(re.sub(r"^(peft|lora|use|with|-)+(?=-)", "", part))
        yield letters
        yield only_letters(part)


def refused_start(key: str, value: Scalar) -> str:
    """Return why a start is refused, and what to do; empty if the key is about none."""
    wanted = wanted_start(key, value)
    if wanted is None:
        return ""
    if wanted == "true":
        return f"{key} = {value!r}: leave it out, for there is no other start: {OURS}."
    kind = "pissa" if wanted.startswith("pissa") else wanted
    why = REASONS.get(kind, "PEFT has no such start, or it is not known here")
    return f"{key} = {value!r} cannot be honoured: {why}. Leave it out; {OURS}."
