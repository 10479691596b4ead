"""The loss of answer tokens, with as little work beside it as the base allows.

A base gives logits for every token; only those before an answer token are learned. Where the family
of a base is known, the hidden states of these alone go through the head, some at a time, and their
gradient is taken at once: the head is frozen, so neither logits nor probabilities are kept (the
idea of Hsu et al., Liger Kernel (2024), section 3.2, without a gradient of the head).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from grandrounds.data.tokenization import IGNORED_LABEL, TokenizedExample, collate, flatten
from grandrounds.model.architectures import FAMILIES
from grandrounds.model.attention import by_sequence
from grandrounds.model.base import has_bfloat16


@dataclass(frozen=True)
class Forward:
    """How a batch goes through the model; none of it changes what is learned."""

    bf16: bool
    """Mixed precision on a GPU that has bfloat16."""
    padding_free: bool
    """Whether a batch is one row of sequences one after another; else it is padded."""
    answers_only: bool
    """Whether the head is applied to what answers are predicted from; else to every token."""
    chunk_tokens: int
    """Most answer tokens whose logits are held at a time; 0: all of the batch."""


def can_skip_padding(model_type: str) -> bool:
    """Whether attention of a family can be computed for each sequence apart."""
    return model_type in FAMILIES and not FAMILIES[model_type].attention_matrix


def has_plain_head(model_type: str) -> bool:
    """Whether a family's logits are known to be its head's products, soft-capped or not."""
    return model_type in FAMILIES


def attending(model: Any, how: Forward) -> contextlib.AbstractContextManager[None]:
    """Return the context in which batches go forward and backward.

    Without it batches free of padding have the same loss, by a mask of all tokens x all tokens.
    With gradient checkpointing attention is computed again in the backward pass, and must be the
    same there.
    """
    return by_sequence(_base_of(model)) if how.padding_free else contextlib.nullcontext()


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def answer_nll_sum(
    model: Any,
    batch: Sequence[TokenizedExample],
    pad_token_id: int,
    device: torch.device,
    how: Forward,
) -> torch.Tensor:
    """Return the summed negative log-likelihood (nats) of a batch's answer tokens, float32.

    Call it, and its backward pass, within `attending(model, how)`.

    Parameters
    ----------
    model
        A causal language model of transformers, or a PEFT model around one.
    """
    model = _base_of(model)
    inputs: dict[str, Any] = flatten(batch) if how.padding_free else collate(batch, pad_token_id)
    labels = inputs.pop("labels").flatten()  # (batch * tokens)
    learned = (labels != IGNORED_LABEL).nonzero().squeeze(1)
    targets = labels[learned].to(device)  # (answer tokens)
    before = (learned - 1).to(device)  # an answer token is predicted from the one before it
    inputs = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    with mixed_precision(device, how.bf16):
        if not how.answers_only:
            logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[before]
            return cross_entropy(logits.float(), targets, reduction="sum")
        states = model.get_decoder()(**inputs, use_cache=False)
        hidden = states.last_hidden_state.flatten(0, 1)[before]  # (answer tokens, hidden)
        del states
        head = model.get_output_embeddings()
        cap = getattr(model.config, "final_logit_softcapping", None)
        return head_nll_sum(hidden, head.weight, head.bias, targets, how.chunk_tokens, cap)


def head_nll_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    chunk_tokens: int,
    cap: float | None = None,
) -> torch.Tensor:
    """Return the summed negative log-likelihood of targets under a frozen head, float32.

    With z = c tanh((W h + b) / c), or z = W h + b without a cap c,

        L = sum_t log sum_v exp z_tv - z_ty,    dL/dz_tv = softmax(z_t)_v - [v = y_t].

    Parameters
    ----------
    hidden : tensor of (tokens, hidden)
    weight, bias
        The head: (vocabulary, hidden), and (vocabulary) or None. They get no gradient.
    targets : int64 tensor of (tokens)
    chunk_tokens : int
        Most tokens whose logits are held at a time; 0: all.
    cap : float or None
        Soft cap of the logits (Gemma 2).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        weight = weight.to(dtype)
        hidden = hidden.to(dtype)
    size = chunk_tokens or max(1, len(hidden))
    return _HeadLoss.apply(hidden, weight, bias, targets, size, cap)  # type: ignore[no-any-return,no-untyped-call]


class _HeadLoss(torch.autograd.Function):
    """`head_nll_sum`, whose gradient is taken in the forward pass: no logits are kept for it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        size: int,
        cap: float | None,
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), size):
                part = slice(start, start + size)
                # Everything in place: one matrix of (chunk, vocabulary) in float32.
                z = torch.nn.functional.linear(hidden[part], weight, bias).float()
                slope = None
                if cap is not None:
                    z.div_(cap).tanh_()
                    slope = z.square().neg_().add_(1)
                    z.mul_(cap)
                target = targets[part].unsqueeze(1)
                of_target = z.gather(1, target)
                largest = z.amax(dim=1, keepdim=True)
                sums = z.sub_(largest).exp_().sum(dim=1, keepdim=True)
                total += (sums.log() + largest - of_target).sum()
                if gradient is not None:
                    z.div_(sums)
                    z.scatter_add_(1, target, torch.full_like(of_target, -1.0))
                    if slope is not None:
                        z.mul_(slope)
                    gradient[part] = z.to(weight.dtype) @ weight
                del z, slope  # before the next ones are there
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0], None, None, None, None, None


def mixed_precision(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[Any]:
    """Return bfloat16 autocast on a GPU that has it, where wanted; else nothing."""
    if bf16 and device.type == "cuda" and has_bfloat16():
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()
