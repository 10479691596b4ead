"""The loss of direct preference optimisation (DPO), of pairs of answers to one prompt.

Rafailov et al., Direct Preference Optimization: Your Language Model is Secretly a Reward Model,
2023, equation 7: with pi the model, pi_0 the reference, y the chosen and z the rejected answer,

    L = - log sigmoid(m),
    m = beta ((log pi(y|x) - log pi(z|x)) - (log pi_0(y|x) - log pi_0(z|x)))

A log-probability is the sum over the tokens of an answer, its end included; normalised by length it
is their mean (Lambert et al., Tülu 3, 2024). m is the margin: the difference of the
implicit rewards beta log(pi / pi_0). A log-ratio here is log pi(y|x) - log pi(z|x).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from grandrounds.data.tokenization import TokenizedExample
from grandrounds.model.loss import Forward, answer_counts, answer_nlls, attending

LogRatios = Mapping[TokenizedExample, float]
"""Pair → log-ratio of its answers, in nats."""


@dataclass(frozen=True)
class Preferring:
    """How preferences count."""

    beta: float
    """By what the difference to the reference is multiplied."""
    length_normalised: bool = False
    """Whether an answer's log-probability is its mean over tokens, not their sum."""
    reference: LogRatios = field(default_factory=dict)
    """Log-ratios of the reference, of all pairs that are asked for."""

    def log_ratios(
        self,
        model: Any,
        pairs: Sequence[TokenizedExample],
        pad_token_id: int,
        device: torch.device,
        how: Forward,
    ) -> torch.Tensor:
        """Return the log-ratio of each pair: float32 of (pairs).

        Both answers go through the model in one batch. Call it, and its backward pass, within
        `attending(model, how)`.
        """
        answers = [answer for pair in pairs for answer in pair.answers]  # chosen, rejected, ...
        likelihoods = -answer_nlls(model, answers, pad_token_id, device, how)  # (2 * pairs)
        if self.length_normalised:
            likelihoods = likelihoods / answer_counts(answers).to(device)
        return likelihoods[0::2] - likelihoods[1::2]

    def margins(self, ratios: torch.Tensor, pairs: Sequence[TokenizedExample]) -> torch.Tensor:
        """Return the margins of pairs, given the model's log-ratios: (pairs)."""
        known = torch.tensor([self.reference[pair] for pair in pairs], device=ratios.device)
        return self.beta * (ratios - known)

    def loss_sum(
        self,
        model: Any,
        pairs: Sequence[TokenizedExample],
        pad_token_id: int,
        device: torch.device,
        how: Forward,
    ) -> torch.Tensor:
        """Return the summed loss of pairs in nats, float32 of (), as `log_ratios` is called."""
        ratios = self.log_ratios(model, pairs, pad_token_id, device, how)
        return losses(self.margins(ratios, pairs)).sum()

    @torch.no_grad()
    def known_ratios(
        self,
        model: Any,
        pairs: Sequence[TokenizedExample],
        batch_size: int,
        pad_token_id: int,
        how: Forward,
    ) -> dict[TokenizedExample, float]:
        """Return the log-ratio of each different pair, without gradient and dropout."""
        different = sorted(dict.fromkeys(pairs), key=lambda pair: pair.tokens)
        device = next(model.parameters()).device
        was_training, found = model.training, dict[TokenizedExample, float]()
        model.eval()
        with attending(model, how):
            for start in range(0, len(different), batch_size):
                batch = different[start : start + batch_size]
                ratios = self.log_ratios(model, batch, pad_token_id, device, how)
                found |= zip(batch, ratios.tolist(), strict=True)
        model.train(was_training)
        return found


def losses(margins: torch.Tensor) -> torch.Tensor:
    """Return the loss of each pair, in nats: (pairs)."""
    return -logsigmoid(margins)
