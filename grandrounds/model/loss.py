"""Cross-entropy on answer tokens only, computed in chunks.

A base model computes logits for every token, but only those that predict an answer token are
trained on. For known families only the hidden states of these go through the head, a chunk at a
time, and their gradient is taken at once: the head is frozen, so neither logits nor probabilities
are kept (after Hsu et al., Liger Kernel, 2024, section 3.2, without a gradient of the head).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from grandrounds.data.tokenization import IGNORED_LABEL, TokenizedExample, collate, flatten
from grandrounds.model import fused
from grandrounds.model.attention import by_sequence
from grandrounds.model.base import mixed_precision
from grandrounds.model.products import DEFAULT, computed_by


@dataclass(frozen=True)
class Forward:
    """How a batch goes through the model; none of this changes the loss."""

    bf16: bool
    """Mixed precision on a GPU with bfloat16."""
    padding_free: bool
    """Whether the sequences of a batch are concatenated into one row; otherwise they are padded."""
    answers_only: bool
    """Whether the head sees only the states that predict answer tokens; otherwise every token."""
    chunk_tokens: int
    """Maximum number of answer tokens per chunk of logits; 0: one chunk."""
    matmul: str = DEFAULT
    """Library for float32 products on a CPU."""
    bucket_tokens: int = 1
    """Padding-free rows end in ignored tokens up to a multiple of this (`tail_tokens`); 1: none."""
    fused: bool = False
    """Whether fused kernels compute what they are proved for (`model.fused`)."""


@dataclass(frozen=True)
class Head:
    """A frozen output head: z = c tanh((W h + b) / c), or z = W h + b without a cap c."""

    weight: torch.Tensor
    """W: (vocabulary, hidden)."""
    bias: torch.Tensor | None = None
    """b: (vocabulary)."""
    cap: float | None = None
    """c, the soft cap of the logits (Gemma 2)."""


@contextlib.contextmanager
def attending(model: Any, how: Forward) -> Iterator[None]:
    """Provide the context for forward and backward passes: attention, and what computes products.

    Without it padding-free batches have the same loss, computed with a mask of all tokens x all
    tokens. Gradient checkpointing recomputes attention in the backward pass, so that pass needs the
    context too.
    """
    attention = by_sequence(_base_of(model)) if how.padding_free else contextlib.nullcontext()
    with computed_by(how.matmul), fused.context(model, how.fused, how.bf16), attention:
        yield


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device, without waiting for what a GPU still has to do.

    A copy from pageable memory waits for it: Python could not start the next step's kernels before
    the last step's have run.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def answer_nll_sum(
    model: Any,
    batch: Sequence[TokenizedExample],
    pad_token_id: int,
    device: torch.device,
    how: Forward,
    means: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the summed negative log-likelihood of a batch's answer tokens, in nats and float32.

    Call it, and its backward pass, within `attending(model, how)`.

    Parameters
    ----------
    model
        A causal language model of transformers, or a PEFT model around one.
    means : float32 tensor of (examples), optional
        Gives the sum of each example's mean over its own answer tokens instead, so that no example
        changes what another one gives; the means are written here.
    """
    shared = _shared(batch, means, device) if means is not None else None
    return _answer_nll(model, batch, pad_token_id, device, how, shared)


def answer_nlls(
    model: Any,
    batch: Sequence[TokenizedExample],
    pad_token_id: int,
    device: torch.device,
    how: Forward,
) -> torch.Tensor:
    """Return the negative log-likelihood of each example's answer, summed over its tokens.

    Its gradient may differ from example to example. Call it, and its backward pass, within
    `attending(model, how)`.

    Returns
    -------
    float32 tensor of (examples), in nats
    """
    counts = answer_counts(batch)
    examples = sent(torch.arange(len(batch)).repeat_interleave(counts), device)
    return _answer_nll(model, batch, pad_token_id, device, how, Apart(examples, len(batch)))


def answer_counts(batch: Sequence[TokenizedExample]) -> torch.Tensor:
    """Return how many tokens of each example are learned and predicted: int64 of (examples)."""
    return torch.tensor([e.answer_tokens - (e.prompt_tokens == 0) for e in batch])


def _answer_nll(
    model: Any,
    batch: Sequence[TokenizedExample],
    pad_token_id: int,
    device: torch.device,
    how: Forward,
    shared: Shared | Apart | None,
) -> torch.Tensor:
    """Return the loss of a batch's answer tokens: their sum, or as `shared` says."""
    model = _base_of(model)
    inputs: dict[str, Any] = (
        flatten(batch, pad_token_id, how.bucket_tokens)
        if how.padding_free
        else collate(batch, pad_token_id)
    )
    labels = inputs.pop("labels").flatten()  # (batch * tokens)
    learned = (labels != IGNORED_LABEL).nonzero().squeeze(1)
    targets = sent(labels[learned], device)  # (answer tokens)
    before = sent(learned - 1, device)  # an answer token is predicted from the one before it
    inputs = {n: sent(v, device) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    with mixed_precision(device, how.bf16):
        if not how.answers_only:
            logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[before]
            if shared is not None:
                losses = cross_entropy(logits.float(), targets, reduction="none")
                if isinstance(shared, Apart):
                    return shared.sums(losses)
                shared.note(slice(None), losses.detach())
                return shared.weights @ losses
            return cross_entropy(logits.float(), targets, reduction="sum")
        states = model.get_decoder()(**inputs, use_cache=False)
        hidden = states.last_hidden_state.flatten(0, 1)[before]  # (answer tokens, hidden)
        del states
        layer = model.get_output_embeddings()
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        head = Head(layer.weight, layer.bias, cap)
        return head_nll_sum(hidden, head, targets, how.chunk_tokens, shared)


@dataclass(frozen=True)
class Shared:
    """What each answer token of a batch weighs, and which example's mean it belongs to."""

    weights: torch.Tensor
    """float32 of (answer tokens): 1 over the number of answer tokens of its example."""
    examples: torch.Tensor
    """int64 of (answer tokens): position of its example in the batch."""
    means: torch.Tensor
    """float32 of (examples): the mean losses, so far as they were noted."""

    def note(self, part: slice, losses: torch.Tensor) -> None:
        """Add the losses of some tokens to the means."""
        self.means.index_add_(0, self.examples[part], self.weights[part] * losses)


@dataclass(frozen=True)
class Apart:
    """Which example each answer token of a batch belongs to, where each example has its own sum."""

    examples: torch.Tensor
    """int64 of (answer tokens): position of its example in the batch."""
    count: int
    """Examples in the batch."""

    def sums(self, losses: torch.Tensor) -> torch.Tensor:
        """Return the sum of each example's losses: float32 of (examples)."""
        return losses.new_zeros(self.count).index_add(0, self.examples, losses)


def _shared(batch: Sequence[TokenizedExample], means: torch.Tensor, device: torch.device) -> Shared:
    counts = answer_counts(batch)
    weights = counts.float().reciprocal().repeat_interleave(counts)
    examples = torch.arange(len(batch)).repeat_interleave(counts)
    return Shared(sent(weights, device), sent(examples, device), means.zero_())


def head_nll_sum(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    chunk_tokens: int,
    shared: Shared | Apart | None = None,
) -> torch.Tensor:
    """Return the summed negative log-likelihood of targets under a frozen head, in float32.

        L = sum_t log sum_v exp z_tv - z_ty,    dL/dz_tv = softmax(z_t)_v - [v = y_t].

    Parameters
    ----------
    hidden : tensor of (tokens, hidden)
    targets : int64 tensor of (tokens)
    chunk_tokens : int
        Maximum number of tokens per chunk of logits; 0: one chunk.
    shared : Shared or Apart, optional
        By what the loss of each token is multiplied, and where the means of examples are noted; or
        to which example each token belongs: then the result has a sum for each, (examples).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        head = replace(head, weight=head.weight.to(dtype))
        hidden = hidden.to(dtype)
    size = chunk_tokens or max(1, len(hidden))
    return _HeadLoss.apply(hidden, head, targets, size, shared)  # type: ignore[no-any-return,no-untyped-call]


class _HeadLoss(torch.autograd.Function):
    """`head_nll_sum` with its gradient taken in the forward pass, so that no logits are saved."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: Head,
        targets: torch.Tensor,
        size: int,
        shared: Shared | Apart | None,
    ) -> torch.Tensor:
        apart = shared if isinstance(shared, Apart) else None
        shared = None if isinstance(shared, Apart) else shared
        total = torch.zeros((apart.count,) if apart else (), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), size):
                part = slice(start, start + size)
                # In place throughout: a single float32 matrix of (chunk, vocabulary).
                z = torch.nn.functional.linear(hidden[part], head.weight, head.bias).float()
                slope = None
                if head.cap is not None:
                    z.div_(head.cap).tanh_()
                    slope = z.square().neg_().add_(1)
                    z.mul_(head.cap)
                target = targets[part].unsqueeze(1)
                of_target = z.gather(1, target)
                largest = z.amax(dim=1, keepdim=True)
                sums = z.sub_(largest).exp_().sum(dim=1, keepdim=True)
                losses = sums.log() + largest - of_target  # (tokens, 1)
                if apart is not None:
                    total.index_add_(0, apart.examples[part], losses[:, 0])
                elif shared is None:
                    total += losses.sum()
                else:
                    total += shared.weights[part] @ losses[:, 0]
                    shared.note(part, losses[:, 0])
                if gradient is not None:
                    z.div_(sums)
                    z.scatter_add_(1, target, torch.full_like(of_target, -1.0))
                    if slope is not None:
                        z.mul_(slope)
                    if shared is not None:
                        z.mul_(shared.weights[part].unsqueeze(1))
                    gradient[part] = z.to(head.weight.dtype) @ head.weight
                del z, slope  # before the next chunk allocates its own
        ctx.save_for_backward(gradient)
        ctx.apart = apart
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        slope = upstream[0]
        if ctx.apart is not None:  # each token's by the slope of its example
            slope = slope[ctx.apart.examples].unsqueeze(1).to(gradient.dtype)
        return gradient * slope, None, None, None, None
