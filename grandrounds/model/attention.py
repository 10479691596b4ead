"""Attention over concatenated sequences, without padding or mask.

A batch of lengths 3 and 2 is one row of 5 tokens with positions 0 1 2 0 1. All layers but attention
process tokens independently; causal attention is computed within each sequence by kernels that need
no mask (FlashAttention: Dao et al., 2022). The result equals that of each sequence on its own.

`PATHS` says where all sequences are computed in one call a layer, and where one after the other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from grandrounds.data.tokenization import starts_of
from grandrounds.errors import first_line
from grandrounds.model.attention_kernels import Sequences, at_once, dtype_of, exact, one_by_one
from grandrounds.model.base import is_out_of_memory

NAME = "grandrounds_by_sequence"
"""Name of `attend` in transformers' table of attention functions."""

PROOF_LENGTHS = (1, 17, 130, 64, 88)
"""Tokens of a proof's sequences: below, at and above the 64 and 128 tokens of kernels' blocks."""

PROOF_WINDOW = 48
"""Sliding window in a proof; kernels treat all widths alike, and the row stays short."""

ERROR_FACTOR = 1.25
"""A path is used if its errors are at most this many times those of the last path. Rounding in
another order moves the norm of an error over 10^5 values by a few per cent (on an H200 by at most
6); a window that is one token too wide multiplies it by 34."""

PARTS = ("output", "gradient of queries", "gradient of keys", "gradient of values")


@dataclass(frozen=True)
class Layer:
    """What decides how the attention of a layer is computed."""

    device: torch.device
    dtype: torch.dtype
    """Type in which it is computed, autocast included."""
    heads: int
    key_value_heads: int
    head_size: int
    value_size: int
    scaling: float | None = None
    windowed: bool = False
    """Whether a sequence is longer than the sliding window."""
    soft_capped: bool = False
    """Whether the scores are soft-capped."""
    dropped: bool = False
    """Whether attention weights are dropped."""
    has_starts: bool = True
    """Whether the starts of the sequences are on the device."""


@dataclass(frozen=True)
class Path:
    """A way to compute attention over concatenated sequences, and what it takes."""

    name: str
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequences], torch.Tensor]
    """A function of `attention_kernels`."""
    device: str | None = None
    """Type of device; None: any."""
    capability: tuple[int, int] | None = None
    """Least compute capability of a GPU."""
    dtypes: tuple[torch.dtype, ...] | None = None
    """Types of queries, keys and values; None: any."""
    largest_head: int | None = None
    """Largest head size, of queries and values alike, in multiples of 8; None: any."""
    windows: bool = True
    """Whether it takes sliding windows."""
    soft_caps: bool = False
    """Whether it takes soft-capped scores."""
    dropout: bool = True
    """Whether it takes dropout of attention weights."""
    starts: bool = False
    """Whether it needs the starts of the sequences."""

    def takes(self, layer: Layer) -> bool:
        """Whether the layer is one that this path computes."""
        size, device = layer.head_size, layer.device
        return (
            self.device in (None, device.type)
            and (self.dtypes is None or layer.dtype in self.dtypes)
            and (self.windows or not layer.windowed)
            and (self.soft_caps or not layer.soft_capped)
            and (self.dropout or not layer.dropped)
            and (layer.has_starts or not self.starts)
            and (
                self.largest_head is None
                or (size == layer.value_size and size <= self.largest_head and size % 8 == 0)
            )
            and (
                self.capability is None
                or torch.cuda.get_device_capability(device) >= self.capability
            )
        )


PATHS: tuple[Path, ...] = (
    Path(
        "in one call a layer",
        at_once,
        device="cuda",
        capability=(8, 0),
        dtypes=(torch.bfloat16, torch.float16),
        largest_head=256,
        dropout=False,
        starts=True,
    ),
    Path("sequence by sequence", one_by_one),
)
"""Fastest first; the last one is what the others are measured against."""

_paths: dict[Layer, Path] = {}


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None = None,
    *,
    sequence_lengths: list[int],
    sequence_starts: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
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
    sequence_starts : int32 tensor of (sequences + 1), optional
        First token of each sequence, then `tokens`; on the device of the query.
    sliding_window : int or None
        Number of tokens that a token attends to, including itself; None: all before it.

    Returns
    -------
    tensor of (1, tokens, heads, head size), and None for the attention weights.

    Raises
    ------
    ValueError
        If the scores are soft-capped, which no path computes.
    """
    windowed = sliding_window is not None and max(sequence_lengths) > sliding_window
    layer = Layer(
        query.device,
        dtype_of(query),
        *(query.shape[1], key.shape[1], query.shape[3], value.shape[3]),
        scaling=scaling,
        windowed=windowed,
        soft_capped=softcap is not None,
        dropped=dropout > 0,
        has_starts=sequence_starts is not None,
    )
    window = sliding_window if windowed else None
    sequences = Sequences(sequence_lengths, sequence_starts, window, scaling, dropout)
    return path_of(layer).attend(query, key, value, sequences), None


def path_of(layer: Layer) -> Path:
    """Return the first path that takes a layer and passes its proof, which is made once.

    Raises
    ------
    ValueError
        If no path takes the layer.
    """
    found = _paths.get(layer)
    if found is None:
        _paths[layer] = found = _proved(layer)
    return found


def _proved(layer: Layer) -> Path:
    paths = [path for path in PATHS if path.takes(layer)]
    if not paths:
        raise ValueError("soft-capped attention is not computed over concatenated sequences")
    *candidates, last = paths
    for path in candidates:
        reason = refusal(path, last, layer)
        if reason is None:
            return path
        print(
            f"grandrounds: attention {path.name} is not used for {layer.heads} heads of "
            f"{layer.head_size} in {str(layer.dtype).removeprefix('torch.')} here, where it is "
            f"{reason}. It is computed {last.name}.",
            file=sys.stderr,
        )
    return last


def refusal(path: Path, last: Path, layer: Layer) -> str | None:
    """Return why a path is not to be used for a layer, or None if it is proved.

    Both paths compute a short row of random queries, keys and values, forward and backward. Their
    errors are taken against attention by its definition in float64 from the same values: an error
    against the last path would hide which of the two is wrong.
    """
    try:
        found = errors(path, layer)
    except (RuntimeError, TypeError, ValueError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        return f"impossible: {first_line(error).rstrip('.')}"
    for part, own, known in zip(PARTS, found, errors(last, layer), strict=True):
        if not own <= ERROR_FACTOR * known:
            return f"inexact: error of the {part} {own:.1e}, {last.name} {known:.1e}"
    return None


def errors(path: Path, layer: Layer) -> list[float]:
    """Return the relative errors (L2) of a path for a layer's shapes, of `PARTS` in order."""
    generator, tokens = torch.Generator(layer.device).manual_seed(0), sum(PROOF_LENGTHS)

    def drawn(heads: int, size: int) -> torch.Tensor:
        """Return normal values, laid out as a projection does."""
        shape = (1, tokens, heads, size)
        values = torch.randn(shape, generator=generator, device=layer.device)
        return values.to(layer.dtype).transpose(1, 2)

    def parts(attend: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
        output = attend(*leaves, sequences)
        return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(dtype))]

    # It may be called in the midst of a forward pass, whose autocast and hooks are not meant.
    plain = saved_tensors_hooks(lambda t: t, lambda t: t)
    autocast = torch.autocast(layer.device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), autocast, plain:
        inputs = [
            drawn(layer.heads, layer.head_size),
            drawn(layer.key_value_heads, layer.head_size),
            drawn(layer.key_value_heads, layer.value_size),
        ]
        upstream = drawn(layer.heads, layer.value_size).transpose(1, 2)
        starts = starts_of(PROOF_LENGTHS).to(layer.device)
        window = PROOF_WINDOW if layer.windowed else None
        sequences = Sequences(PROOF_LENGTHS, starts, window, layer.scaling)
        pairs = zip(parts(path.attend, layer.dtype), parts(exact, torch.float64), strict=True)
        return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


@contextmanager
def by_sequence(model: Any) -> Iterator[None]:
    """Compute a model's attention per sequence within the context.

    Parameters
    ----------
    model
        A model of transformers that uses its table of attention functions. Within the context its
        forward takes `sequence_lengths`, `sequence_starts` and no attention mask.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
