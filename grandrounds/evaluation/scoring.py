"""How likely a model finds each option of a multiple-choice question.

The score of an option is the natural logarithm of the probability that the model, given the
prompt, answers with exactly this option and then stops: the plain sum over the option's tokens
and the end-of-sequence token. There is no division by length, because training minimises this
very sum, and because with the stop included the scores of different options are probabilities of
disjoint events.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def option_log_likelihoods(
    model: Any,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int = 64,
) -> list[list[float]]:
    """Return the log-likelihood of every option of every prompt, given as token ids.

    Parameters
    ----------
    model : causal language model of transformers, or a PEFT model around one
        Its forward must know `logits_to_keep`. Used in evaluation mode, put back into its former
        mode afterwards.
    prompts : sequence of sequences of int
        Token ids of each prompt; not empty.
    options : sequence of sequences of sequences of int
        For each prompt the token ids of its options, end-of-sequence included; not empty.
    batch_size : int
        Pairs of prompt and option in one forward pass.

    Returns
    -------
    list of list of float
        In the order of `prompts` and `options`; natural logarithms, at most 0.

    Raises
    ------
    ValueError
        If there are not as many lists of options as prompts, a prompt or an option has no tokens,
        or `batch_size` is below 1.
    """
    if len(prompts) != len(options):
        raise ValueError(f"{len(prompts)} prompts but {len(options)} lists of options")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for row, (prompt, choices) in enumerate(zip(prompts, options, strict=True)):
        if not prompt or not all(choices):
            raise ValueError(f"prompt {row} or one of its options has no tokens")
    scores = [[0.0] * len(choices) for choices in options]
    places = [
        (row, column) for row, choices in enumerate(options) for column in range(len(choices))
    ]
    places.sort(key=lambda place: -len(prompts[place[0]]) - len(options[place[0]][place[1]]))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for first in range(0, len(places), batch_size):
                batch = places[first : first + batch_size]
                pairs = [(list(prompts[row]), list(options[row][column])) for row, column in batch]
                for (row, column), total in zip(batch, _score_batch(model, pairs), strict=True):
                    scores[row][column] = total
    finally:
        model.train(was_training)
    return scores


def _score_batch(model: Any, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """Score (prompt ids, response ids) pairs, longest first, in one forward pass."""
    lengths = [len(prompt) + len(response) for prompt, response in pairs]
    input_ids = torch.zeros((len(pairs), lengths[0]), dtype=torch.long)  # (batch, tokens)
    attention_mask = torch.zeros_like(input_ids)
    owners: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for row, (prompt, response) in enumerate(pairs):
        input_ids[row, : lengths[row]] = torch.tensor(prompt + response)
        attention_mask[row, : lengths[row]] = 1
        owners += [row] * len(response)
        # The logits at position t are about token t + 1.
        positions += range(len(prompt) - 1, lengths[row] - 1)
        targets += response
    device = next(model.parameters()).device
    # Logits before the earliest response are never read, so they are never computed.
    start = min(positions)
    output = model(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        use_cache=False,
        logits_to_keep=lengths[0] - start,
    )
    owner = torch.tensor(owners, device=device)  # (response tokens of the batch,)
    offset = torch.tensor(positions, device=device) - start
    wanted = output.logits[owner, offset].float()  # (response tokens, vocabulary)
    target = torch.tensor(targets, device=device)
    log_likelihoods = -torch.nn.functional.cross_entropy(wanted, target, reduction="none")
    totals = torch.zeros(len(pairs), dtype=torch.float64, device=device)
    totals.index_add_(0, owner, log_likelihoods.double())
    return [float(total) for total in totals.cpu()]
