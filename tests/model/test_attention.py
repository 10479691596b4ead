"""Attention over concatenated sequences: which way computes it, and what proves it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from grandrounds.data.tokenization import IGNORED_LABEL, flatten, starts_of, tail_tokens
from grandrounds.model import attention, attention_kernels
from grandrounds.model.attention import PATHS, Layer, Path, attend, by_sequence, errors, path_of
from grandrounds.model.attention_kernels import Sequences
from grandrounds.model.loss import Forward
from tests.model.test_loss import EXAMPLES, examples_of, loss_and_gradients, tiny
from tests.tiny_models import tiny_bases

AT_ONCE, ONE_BY_ONE = PATHS
CPU, GPU = torch.device("cpu"), torch.device("cuda")
LAYER = Layer(CPU, torch.bfloat16, 4, 2, 16, 16)
LENGTHS = (5, 1, 40, 18)
CALLS: list[tuple[int, ...]] = []
"""Number of sequences, window of each call of `varlen`."""

ARCHITECTURES = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma3_text", "granite", "olmo2"),
    *("smollm3", "starcoder2", "glm4", "ernie4_5", "cohere2", "mixtral", "qwen3_moe"),
)
"""Tiny bases with grouped heads: some with windows, norms of heads, experts or scales of their
own."""


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute what torch.nn.attention.varlen.varlen_attn documents (torch 2.13), on any device."""
    assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32
    ends = cu_seq_q.tolist()
    assert max_q == max_k == max(b - a for a, b in itertools.pairwise(ends))
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Try setting enable_gqa=True for GQA.")
    CALLS.append((len(ends) - 1, window_size[0]))
    left, right = (len(query) if side < 0 else side for side in window_size)
    outputs = []
    for first, end in itertools.pairwise(ends):
        q, k, v = (t[first:end].transpose(0, 1) for t in (query, key, value))
        apart = torch.arange(end - first).unsqueeze(1) - torch.arange(end - first)  # i - j
        mask = (apart <= left) & (apart >= -right)
        output = scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


def planted(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., torch.Tensor]) -> Path:
    """Offer a kernel on the CPU in any type, as at_once offers PyTorch's on a GPU."""
    path = dataclasses.replace(AT_ONCE, device=None, capability=None, dtypes=None)
    monkeypatch.setattr(attention_kernels, "_varlen", lambda: (kernel, {"enable_gqa": True}))
    monkeypatch.setattr(attention, "PATHS", (path, ONE_BY_ONE))
    attention._paths.clear()
    return path


@pytest.fixture(autouse=True)
def unproved(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget proofs and calls of other tests."""
    monkeypatch.setattr(attention, "_paths", {})
    CALLS.clear()
    yield


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_call_a_layer_gives_the_loss_and_gradients_of_one_a_sequence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_bases.BASES[name]
    torch.manual_seed(0)
    config = tiny_bases.config_of(tiny)
    if getattr(config, "sliding_window", None):
        config.sliding_window = 8  # shorter than two of the examples
    model = AutoModelForCausalLM.from_config(config).train()
    tiny_bases.randomise(model, tiny.query_norm)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(".self_attn." in path)
    how = Forward(False, True, True, 0)
    loss, gradients = loss_and_gradients(model, how)
    at_once = planted(monkeypatch, varlen)
    found, ours = loss_and_gradients(model, how)
    assert set(attention._paths.values()) == {at_once}
    layers = config.get_text_config().num_hidden_layers
    assert len([call for call in CALLS if call[0] == len(EXAMPLES)]) == layers
    assert found == pytest.approx(loss, rel=1e-5)
    for own, wanted in zip(ours, gradients, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
