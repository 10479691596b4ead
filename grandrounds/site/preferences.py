"""Preferences in a visit: the log-ratios of the reference, and how held-out pairs are judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from grandrounds.config.keys import Config
from grandrounds.data.tokenization import TokenizedExample
from grandrounds.model import machine
from grandrounds.model.pair_loss import LogRatios, Preferring, losses
from grandrounds.model.resident import Resident, adapter_off
from grandrounds.model.tokenizers import run_tokenizer
from grandrounds.wire.told import MARGIN_SUM, PREFERRED, RANKED


def against_reference(
    config: Config, resident: Resident, batches: Sequence[Sequence[TokenizedExample]]
) -> Preferring:
    """Return how the pairs of a visit count: against the reference, which reads each once.

    Call it before the first step: the reference is the base with the adapter off, or with the
    adapter as received (`train.dpo-reference`). No second model is held.
    """
    how, pairs = _preferring(config), [pair for batch in batches for pair in batch]
    if config.train.dpo_reference == "received":
        return dataclasses.replace(how, reference=_ratios(how, resident, pairs, config))
    with adapter_off(resident):
        return dataclasses.replace(how, reference=_ratios(how, resident, pairs, config))


def judged(
    resident: Resident, pairs: Sequence[TokenizedExample], config: Config
) -> dict[str, float | int]:
    """Return what the resident adapter makes of pairs against the base, as `figures_of` does."""
    return figures_of(*ratios_and_margins(resident, pairs, config))


def figures_of(ratios: torch.Tensor, margins: torch.Tensor) -> dict[str, float | int]:
    """Return the metrics of pairs with these log-ratios and margins.

    Returns
    -------
    dict
        `nll-sum`: the summed loss in nats, `tokens`: the pairs, `margin-sum`, `preferred`: pairs
        with a margin above 0, and `ranked`: pairs whose chosen answer is the likelier one, whatever
        the base makes of it.
    """
    return {
        "nll-sum": float(losses(margins).sum()),
        "tokens": len(margins),
        MARGIN_SUM: float(margins.sum()),
        PREFERRED: int((margins > 0).sum()),
        RANKED: int((ratios > 0).sum()),
    }


def ratios_and_margins(
    resident: Resident, pairs: Sequence[TokenizedExample], config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-ratio of each pair, and its margin against the base: float64 of (pairs)."""
    how = _preferring(config)
    tuned = _ratios(how, resident, pairs, config)
    with adapter_off(resident):
        how = dataclasses.replace(how, reference=_ratios(how, resident, pairs, config))
    ratios = torch.tensor([tuned[pair] for pair in pairs], dtype=torch.float64)
    return ratios, how.margins(ratios, pairs)


def _preferring(config: Config) -> Preferring:
    return Preferring(config.train.dpo_beta, config.train.dpo_length_normalised)


def _ratios(
    how: Preferring, resident: Resident, pairs: Sequence[TokenizedExample], config: Config
) -> LogRatios:
    size = config.arguments.per_device_train_batch_size
    pad = run_tokenizer(config).pad_token_id
    return how.known_ratios(resident.model, pairs, size, pad, machine.forward(config))
