"""Attention over concatenated sequences, without padding or mask.

A batch of lengths 3 and 2 is one row of 5 tokens with positions 0 1 2 0 1. All layers but attention
process tokens independently; causal attention is computed per sequence by kernels that need no mask
(FlashAttention: Dao et al., 2022). The result equals that of each sequence on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from grandrounds.model.products import DEFAULT, by_default_backwards, computed_by

NAME = "grandrounds_by_sequence"
"""Name of `attend` in transformers' table of attention functions."""


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None = None,
    *,
    sequence_lengths: list[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return causal attention within each sequence.

    transformers calls it, so the signature is that of its attention functions.

    Parameters
    ----------
    query : tensor of (1, heads, tokens, head size)
    key, value : tensor of (1, key-value heads, tokens, head size)
    sequence_lengths
        Tokens of each sequence in order; they sum to `tokens`.
    sliding_window : int or None
        Number of tokens that a token attends to, including itself; None: all before it.

    Returns
    -------
    tensor of (1, tokens, heads, head size), and None for the attention weights.
    """
    repeats = query.shape[1] // key.shape[1]
    is_masked = sliding_window is not None and max(sequence_lengths) > sliding_window
    grouped = repeats > 1 and not is_masked and takes_groups(query)
    if repeats > 1 and not grouped:
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    parts = [torch.split(t, sequence_lengths, dim=2) for t in (query, key, value)]
    outputs = []
    with computed_by(DEFAULT):  # oneDNN is slower for products as small as these
        for q, k, v in zip(*parts, strict=True):
            tokens = q.shape[2]
            windowed = sliding_window is not None and tokens > sliding_window
            output = scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=_window(tokens, sliding_window, q.device) if windowed else None,  # type: ignore[arg-type]
                dropout_p=dropout,
                is_causal=not windowed,
                scale=scaling,
                enable_gqa=grouped,
            )
            outputs.append(output.transpose(1, 2))
    joined = torch.cat(outputs, dim=1)
    by_default_backwards((query, key, value), joined)
    return joined, None


def takes_groups(query: torch.Tensor) -> bool:
    """Whether a kernel without a tokens x tokens matrix accepts grouped heads as they are.

    FlashAttention does, for two-byte types and without a mask. Other GPU kernels do only in some
    releases of PyTorch, where SDPA falls back to the full matrix.
    """
    device = query.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else query.dtype
    return device == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _window(tokens: int, sliding_window: int, device: torch.device) -> torch.Tensor:
    """Return the mask of earlier tokens that each token attends to: bool of (tokens, tokens)."""
    everything = torch.ones((tokens, tokens), dtype=torch.bool, device=device)
    return everything.tril().triu(1 - sliding_window)


@contextmanager
def by_sequence(model: Any) -> Iterator[None]:
    """Compute a model's attention per sequence within the context.

    Parameters
    ----------
    model
        A model of transformers that uses its table of attention functions. Within the context its
        forward takes `sequence_lengths` and no attention mask.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
