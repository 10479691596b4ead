"""The shares of a batch, each one pass forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from grandrounds.data.tokenization import TokenizedExample
from grandrounds.model.loss import Forward, answer_nll_sum, attending
from grandrounds.model.pair_loss import Preferring


@dataclass(frozen=True)
class Pass:
    """One pass of an optimizer step."""

    examples: Sequence[TokenizedExample]
    """A batch, or a share of one."""
    step_tokens: int
    """Terms of the loss of the whole step, by which it is divided: answer tokens, or pairs."""
    seed: int | None
    """Seed of its dropout; None: it goes on in the random numbers of the visit."""
    own: bool = True
    """Whether its examples are the site's own; otherwise they are replayed."""


def passes(
    batches: Sequence[Sequence[TokenizedExample]],
    shares: int,
    seed: int,
    step: int,
    replayed: Sequence[Sequence[TokenizedExample]] = (),
) -> list[Pass]:
    """Return the passes of an optimizer step, in order: what is replayed, then the site's own.

    With several shares each pass has a seed of its own, which the number of processes does not
    change.
    """
    tokens = sum(e.terms for batch in (*replayed, *batches) for e in batch)
    if shares == 1:
        shown = [Pass(batch, tokens, None, own=False) for batch in replayed]
        return [*shown, *(Pass(batch, tokens, None) for batch in batches)]
    divided = [share for batch in batches for share in shares_of(batch, shares)]
    made = [Pass(share, tokens, _seed(seed, step, n)) for n, share in enumerate(divided)]
    numbered = enumerate(replayed, len(made))
    return [*(Pass(b, tokens, _seed(seed, step, n), own=False) for n, b in numbered), *made]


def _seed(visit_seed: int, step: int, number: int) -> int:
    return int(np.random.default_rng([visit_seed, step, number]).integers(2**63))


def shares_of(batch: Sequence[TokenizedExample], count: int) -> list[Sequence[TokenizedExample]]:
    """Divide a batch into shares of about as many tokens each; examples keep their order.

    The longest example goes first, to the share with the fewest tokens (Graham, Bounds on
    multiprocessing timing anomalies, 1969). A batch of fewer examples has as many shares as
    examples.
    """
    lengths = [len(e.input_ids) for e in batch]
    loads = [0] * count
    places: list[list[int]] = [[] for _ in range(count)]
    for place in sorted(range(len(batch)), key=lambda i: -lengths[i]):
        lightest = loads.index(min(loads))
        loads[lightest] += lengths[place]
        places[lightest].append(place)
    return [[batch[i] for i in sorted(share)] for share in places if share]


def backward(
    model: Any,
    one: Pass,
    pad_token_id: int,
    device: torch.device,
    how: Forward,
    preferring: Preferring | None = None,
) -> torch.Tensor:
    """Add a pass's gradient to `.grad`; return its loss, summed in nats, as float32 of ().

    Parameters
    ----------
    preferring
        How the preferences among the examples count; None: there are none.
    """
    if one.seed is not None:
        torch.manual_seed(one.seed)
    with attending(model, how):
        if preferring is None:
            loss = answer_nll_sum(model, one.examples, pad_token_id, device, how)
        else:
            loss = preferring.loss_sum(model, one.examples, pad_token_id, device, how)
        (loss / one.step_tokens).backward()  # type: ignore[no-untyped-call]
    return loss.detach()
