"""Ways to compute causal attention within each of several concatenated sequences."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from grandrounds.model.products import DEFAULT, by_default_backwards, computed_by


@dataclass(frozen=True)
class Sequences:
    """The sequences of a row, and how their tokens attend."""

    lengths: Sequence[int]
    """Tokens of each, in order."""
    starts: torch.Tensor | None
    """int32 of (sequences + 1): first token of each, then the number of tokens. On the device."""
    window: int | None = None
    """Tokens that a token attends to, including itself; None: all before it."""
    scaling: float | None = None
    """Factor of the scores; None: 1 / sqrt(head size)."""
    dropout: float = 0.0
    """Share of the attention weights that is dropped."""


def one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, of: Sequences
) -> torch.Tensor:
    """Return attention by one call for each sequence.

    Parameters
    ----------
    query : tensor of (1, heads, tokens, head size)
    key, value : tensor of (1, key-value heads, tokens, head size)

    Returns
    -------
    tensor of (1, tokens, heads, head size)
    """
    repeats = query.shape[1] // key.shape[1]
    grouped = repeats > 1 and of.window is None and takes_groups(query)
    if repeats > 1 and not grouped:
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    parts = [torch.split(t, list(of.lengths), dim=2) for t in (query, key, value)]
    outputs = []
    with computed_by(DEFAULT):  # oneDNN is slower for products as small as these
        for q, k, v in zip(*parts, strict=True):
            tokens = q.shape[2]
            windowed = of.window is not None and tokens > of.window
            mask = _window(tokens, of.window, q.device) if windowed else None  # type: ignore[arg-type]
            output = scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=of.dropout,
                is_causal=not windowed,
                scale=of.scaling,
                enable_gqa=grouped,
            )
            outputs.append(output.transpose(1, 2))
    joined = torch.cat(outputs, dim=1)
    by_default_backwards((query, key, value), joined)
    return joined


def at_once(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, of: Sequences
) -> torch.Tensor:
    """Return what `one_by_one` does by one call, of PyTorch's FlashAttention for rows.

    Grouped heads are not copied. It has no dropout.
    """
    dtype, longest = dtype_of(query), max(of.lengths)
    # (tokens, heads, head size)
    q, k, v = (t[0].transpose(0, 1).to(dtype) for t in (query, key, value))
    kernel, grouped = _varlen()
    before = -1 if of.window is None else of.window - 1
    output = kernel(
        *(q, k, v, of.starts, of.starts, longest, longest),
        scale=of.scaling,
        window_size=(before, 0),  # earlier and later tokens, beside the token itself
        **grouped,
    )
    return output.unsqueeze(0)  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def _varlen() -> tuple[Callable[..., Any], dict[str, bool]]:
    """Return PyTorch's kernel, and what its later releases must be told of grouped heads."""
    from torch.nn.attention.varlen import varlen_attn

    asks = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if asks else {}


def exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, of: Sequences
) -> torch.Tensor:
    """Return what `one_by_one` does by its definition, in the type of the query:

    softmax(scaling Q K^T + M) V,    M_ij = 0 where i - window < j <= i, else -inf.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    scaling = query.shape[3] ** -0.5 if of.scaling is None else of.scaling
    parts = [torch.split(t, list(of.lengths), dim=2) for t in (query, key, value)]
    outputs = []
    for q, k, v in zip(*parts, strict=True):
        mask = _window(q.shape[2], of.window or q.shape[2], q.device)
        scores = (scaling * q @ k.transpose(2, 3)).masked_fill(~mask, -torch.inf)
        outputs.append((scores.softmax(dim=3) @ v).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def takes_groups(query: torch.Tensor) -> bool:
    """Whether a kernel without a tokens x tokens matrix accepts grouped heads as they are.

    FlashAttention does, for two-byte types and without a mask. Other GPU kernels do only in some
    releases of PyTorch, where SDPA falls back to the full matrix.
    """
    return query.device.type == "cuda" and dtype_of(query) in (torch.bfloat16, torch.float16)


def dtype_of(query: torch.Tensor) -> torch.dtype:
    """Return the type in which attention is computed."""
    device = query.device.type
    autocast = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else query.dtype


def _window(tokens: int, sliding_window: int, device: torch.device) -> torch.Tensor:
    """Return the mask of earlier tokens that each token attends to: bool of (tokens, tokens)."""
    everything = torch.ones((tokens, tokens), dtype=torch.bool, device=device)
    return everything.tril().triu(1 - sliding_window)
