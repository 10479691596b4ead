"""Log-likelihoods of multiple-choice options, and greedy generation.

The score of an option is the natural logarithm of the probability that the model continues the
prompt with exactly its tokens: a sum over tokens, not normalised by length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from grandrounds.model.cached import Prefilled, evaluating, extend, forked
from grandrounds.model.passes import Ids
from grandrounds.model.prefill import prefill

Progress = Callable[[int], None]
"""Called with the number of prompts that each batch completes."""


def option_log_likelihoods(
    model: Any,
    prompts: Sequence[Ids],
    options: Sequence[Sequence[Ids]],
    *,
    batch_size: int | None = 64,
    families: Sequence[int] | None = None,
    progress: Progress = lambda _: None,
) -> list[list[float]]:
    """Return the log-likelihood of every option of every prompt, given as token ids.

    A prompt is processed once for all its options.

    Parameters
    ----------
    model : causal language model of transformers, or a PEFT model around one
        Run in evaluation mode; its mode is restored afterwards.
    prompts : sequence of sequences of int
        Token ids of each prompt; not empty.
    options : sequence of sequences of sequences of int
        For each prompt the token ids of its options, none empty; with end-of-sequence where
        stopping is part of the answer.
    batch_size : int or None
        Maximum number of prompts per forward pass; None: see `prefill`.
    families : sequence of int, optional
        The family of each prompt, see `prefill`.

    Returns
    -------
    list of list of float
        In the order of `prompts` and `options`; natural logarithms, at most 0.

    Raises
    ------
    ValueError
        If the numbers of prompts and of lists of options differ, a prompt or an option has no
        tokens, or `batch_size` is below 1.
    """
    longest = _check_options(prompts, options)
    scores = [[0.0] * len(choices) for choices in options]
    with evaluating(model):
        for batch in prefill(
            model, prompts, batch_size, following_tokens=longest, families=families
        ):
            _score_batch(model, batch, options, scores)
            progress(len(batch.rows))
    return scores


def _check_options(prompts: Sequence[Ids], options: Sequence[Sequence[Ids]]) -> int:
    """Raise `ValueError` for options that cannot be scored; return the longest one's tokens."""
    if len(prompts) != len(options):
        raise ValueError(f"{len(prompts)} prompts but {len(options)} lists of options")
    for row, choices in enumerate(options):
        if not all(choices):
            raise ValueError(f"an option of prompt {row} has no tokens")
    return max((len(option) for choices in options for option in choices), default=0)


def _score_batch(
    model: Any, batch: Prefilled, options: Sequence[Sequence[Ids]], scores: list[list[float]]
) -> None:
    """Score every option of the prompts of one batch, and leave the batch as it was."""
    for column in range(max(len(options[row]) for row in batch.rows)):
        # Token 0 is a placeholder where a prompt has fewer options than others.
        chosen = [
            list(options[row][column]) if column < len(options[row]) else [0] for row in batch.rows
        ]
        totals = _score_column(model, batch, chosen)
        for row, total in zip(batch.rows, totals, strict=True):
            if column < len(options[row]):
                scores[row][column] = total


def _score_column(model: Any, batch: Prefilled, continuations: list[list[int]]) -> list[float]:
    """Return the log-likelihood of one continuation for each prompt of a batch."""
    device = batch.logits.device
    first = torch.tensor([ids[0] for ids in continuations], device=device)
    totals = _log_probabilities(batch.logits, first)
    width = max(len(ids) for ids in continuations) - 1
    if width:
        tokens = torch.zeros((len(continuations), width), dtype=torch.long)
        targets = torch.zeros_like(tokens)
        mask = torch.zeros_like(tokens)
        for i, ids in enumerate(continuations):
            tokens[i, : len(ids) - 1] = torch.tensor(ids[:-1])
            targets[i, : len(ids) - 1] = torch.tensor(ids[1:])
            mask[i, : len(ids) - 1] = 1
        mask = mask.to(device)
        # (batch, width, vocabulary)
        logits = extend(model, forked(batch), tokens.to(device), mask)
        totals += (_log_probabilities(logits, targets.to(device)) * mask).sum(dim=1)
    return [float(total) for total in totals.cpu()]


def _log_probabilities(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each target: logits (..., vocabulary), targets (...)."""
    logits = logits.float()
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return (chosen - logits.logsumexp(dim=-1)).double()


def generate_greedily(
    model: Any,
    prompts: Sequence[Ids],
    max_new_tokens: Sequence[int],
    stop: Sequence[int],
    *,
    batch_size: int | None = 64,
    progress: Progress = lambda _: None,
) -> list[list[int]]:
    """Return the greedy continuation of each prompt.

    Parameters
    ----------
    prompts : sequence of sequences of int
        Token ids of each prompt; not empty.
    max_new_tokens : sequence of int
        Maximum number of tokens to generate for each prompt, at least 1.
    stop : sequence of int
        Stop tokens; they are not returned.
    batch_size : int or None
        Maximum number of prompts per forward pass; None: see `prefill`.

    Returns
    -------
    list of list of int
        Token ids of each continuation, in the order of `prompts`.

    Raises
    ------
    ValueError
        If the numbers of prompts and limits differ, a limit or `batch_size` is below 1, or a prompt
        has no tokens.
    """
    longest = _check_limits(prompts, max_new_tokens)
    texts: list[list[int]] = [[] for _ in prompts]
    with evaluating(model):
        for batch in prefill(model, prompts, batch_size, following_tokens=longest):
            _generate_batch(model, batch, texts, max_new_tokens, set(stop))
            progress(len(batch.rows))
    return texts


def _check_limits(prompts: Sequence[Ids], max_new_tokens: Sequence[int]) -> int:
    """Raise `ValueError` for limits that cannot be kept; return the highest."""
    if len(prompts) != len(max_new_tokens):
        raise ValueError(f"{len(prompts)} prompts but {len(max_new_tokens)} limits")
    for row, limit in enumerate(max_new_tokens):
        if limit < 1:
            raise ValueError(f"the limit of prompt {row} must be at least 1, got {limit}")
    return max(max_new_tokens, default=0)


def score_and_generate(
    model: Any,
    prompts: Sequence[Ids],
    options: Sequence[Sequence[Ids]],
    max_new_tokens: Sequence[int],
    stop: Sequence[int],
    *,
    batch_size: int | None = 64,
) -> tuple[list[list[float]], list[list[int]]]:
    """Return what `option_log_likelihoods` and `generate_greedily` return, reading prompts once.

    The results are theirs to the bit wherever the layout of a prompt does not depend on the length
    of what follows (see `prefill`).

    Raises
    ------
    ValueError
        As they do.
    """
    longest = max(_check_options(prompts, options), _check_limits(prompts, max_new_tokens))
    scores = [[0.0] * len(choices) for choices in options]
    texts: list[list[int]] = [[] for _ in prompts]
    with evaluating(model):
        for batch in prefill(model, prompts, batch_size, following_tokens=longest):
            _score_batch(model, batch, options, scores)
            _generate_batch(model, batch, texts, max_new_tokens, set(stop))
    return scores, texts


def _generate_batch(
    model: Any,
    batch: Prefilled,
    texts: list[list[int]],
    max_new_tokens: Sequence[int],
    stop: set[int],
) -> None:
    """Generate for one batch until every prompt has stopped or reached its limit."""
    speaking = dict.fromkeys(batch.rows, True)
    logits = batch.logits
    while True:
        tokens = logits.argmax(dim=-1)  # (batch,)
        for row, token in zip(batch.rows, tokens.tolist(), strict=True):
            if not speaking[row]:
                continue
            if token in stop:
                speaking[row] = False
                continue
            texts[row].append(token)
            speaking[row] = len(texts[row]) < max_new_tokens[row]
        if not any(speaking.values()):
            return
        column = tokens.unsqueeze(1)
        logits = extend(model, batch, column, torch.ones_like(column))[:, -1]


def stop_tokens(model: Any, tokenizer: Any, learned: Sequence[int] = ()) -> list[int]:
    """Return the IDs of the tokens that end an answer, as in transformers' `generate`.

    Parameters
    ----------
    learned
        The tokens that end a training answer. With them, the last one and the tokenizer's
        end-of-sequence end an answer too.
    """
    given = getattr(model.generation_config, "eos_token_id", None)
    if given is None:
        given = tokenizer.eos_token_id
    stops = list(given) if isinstance(given, list | tuple) else [given]
    more = [learned[-1], tokenizer.eos_token_id] if learned else []
    return list(dict.fromkeys([*stops, *more]))
