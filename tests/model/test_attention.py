"""Attention over concatenated sequences: which way computes it, and what proves it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from grandrounds.data import tokenization
from grandrounds.data.tokenization import IGNORED_LABEL, flatten, starts_of, tail_tokens
from grandrounds.model import attention, attention_kernels
from grandrounds.model.attention import PATHS, Layer, Path, attend, errors, path_of
from grandrounds.model.loss import Forward, attending
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
    assert cu_seq_q is cu_seq_k
    assert cu_seq_q.dtype == torch.int32
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
def _unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget proofs and calls of other tests."""
    monkeypatch.setattr(attention, "_paths", {})
    CALLS.clear()


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


def rows_of(layer: Layer, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """Return random queries, keys and values of a row."""
    torch.manual_seed(1)
    heads = (layer.heads, layer.key_value_heads, layer.key_value_heads)
    return [torch.randn(1, h, sum(lengths), layer.head_size, dtype=layer.dtype) for h in heads]


@pytest.mark.parametrize("window", [None, 7, 100])
def test_the_window_of_one_call_is_that_of_one_a_sequence(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch counts the earlier tokens; transformers the token itself too."""
    inputs = rows_of(dataclasses.replace(LAYER, dtype=torch.float32), LENGTHS)
    given: dict[str, Any] = {
        "sequence_lengths": list(LENGTHS),
        "sequence_starts": starts_of(LENGTHS),
        "sliding_window": window,
        "scaling": 0.3,
    }
    expected, _ = attend(None, *inputs, **given)
    assert not CALLS
    planted(monkeypatch, varlen)
    found, weights = attend(None, *inputs, **given)
    assert weights is None
    assert CALLS[-1] == (len(LENGTHS), 6 if window == 7 else -1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("windowed", [False, True])
def test_rounding_is_not_taken_for_an_error(
    dtype: torch.dtype, windowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = planted(monkeypatch, varlen)
    assert path_of(dataclasses.replace(LAYER, dtype=dtype, windowed=windowed)) is path


def test_the_proof_measures_against_the_definition_not_against_another_path() -> None:
    """bfloat16 has 8 bits: each path is off by about 2^-9 of what float64 gives."""
    for error in errors(ONE_BY_ONE, LAYER):
        assert 2**-11 < error < 2**-7
    exactly = dataclasses.replace(ONE_BY_ONE, attend=attention_kernels.exact)
    assert max(errors(exactly, dataclasses.replace(LAYER, dtype=torch.float64))) < 1e-14


def one_too_wide(*args: Any, window_size: tuple[int, int], **given: Any) -> torch.Tensor:
    """Let a token attend to one more before its window."""
    return varlen(*args, window_size=(window_size[0] + 1, 0), **given)


def into_neighbours(
    query: torch.Tensor, *rest: Any, window_size: tuple[int, int], **given: Any
) -> torch.Tensor:
    """Let each token attend to the sequences before its own."""
    key, value, *_ = rest
    whole = torch.tensor([0, len(query)], dtype=torch.int32)
    args = (query, key, value, whole, whole, len(query), len(query))
    return varlen(*args, window_size=window_size, **given)


def seeing_the_future(*args: Any, window_size: tuple[int, int], **given: Any) -> torch.Tensor:
    """Let each token attend to the next one."""
    return varlen(*args, window_size=(window_size[0], 1), **given)


class Halved(torch.autograd.Function):
    """The identity, with half of its gradient."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> torch.Tensor:
        return upstream[0] / 2


def losing_gradients(
    query: torch.Tensor, key: torch.Tensor, *rest: Any, **given: Any
) -> torch.Tensor:
    """Be right forward and wrong backward."""
    return varlen(query, Halved.apply(key), *rest, **given)  # type: ignore[no-untyped-call]


def in_fewer_bits(*args: Any, **given: Any) -> torch.Tensor:
    """Round once more than needed, to 6 bits."""
    output = varlen(*args, **given)
    scale = 2.0 ** (output.abs().log2().floor() - 6)
    return output + ((output / scale).round() * scale - output).detach()


def not_there(*args: Any, **given: Any) -> torch.Tensor:
    """Fail as an operation without a kernel does."""
    raise NotImplementedError("Could not run 'flash'.\nMany lines.")


@pytest.mark.parametrize(
    ("wrong", "windowed", "reason"),
    [
        (one_too_wide, True, "inexact: error of the output "),
        (into_neighbours, False, "inexact: error of the output "),
        (seeing_the_future, False, "inexact: error of the output "),
        (losing_gradients, False, "inexact: error of the gradient of keys "),
        (in_fewer_bits, False, "inexact: error of the output "),
        (not_there, False, "impossible: Could not run 'flash')"),
    ],
)
def test_a_wrong_path_is_refused_once_with_its_reason(
    wrong: Any,
    windowed: bool,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    planted(monkeypatch, wrong)
    layer = dataclasses.replace(LAYER, windowed=windowed)
    assert path_of(layer) is ONE_BY_ONE
    assert path_of(layer) is ONE_BY_ONE
    said = capsys.readouterr().err
    assert said.count("attention in one call a layer is not used for 4 heads of 16 in") == 1
    assert reason.rstrip(")") in said
    assert "Many lines" not in said


def test_running_out_of_memory_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """headroom handles it; a path refused for it would stay refused."""

    def full(*args: Any, **given: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    planted(monkeypatch, full)
    with pytest.raises(torch.OutOfMemoryError):
        path_of(LAYER)
    assert not attention._paths


@pytest.mark.parametrize(
    ("changes", "takes"),
    [
        ({}, True),
        ({"dtype": torch.float16, "windowed": True, "scaling": 0.1}, True),
        ({"head_size": 256, "value_size": 256}, True),
        ({"head_size": 264, "value_size": 264}, False),
        ({"head_size": 20, "value_size": 20}, False),
        ({"value_size": 8}, False),
        ({"dtype": torch.float32}, False),
        ({"device": CPU}, False),
        ({"dropped": True}, False),
        ({"soft_capped": True}, False),
        ({"has_starts": False}, False),
    ],
)
def test_the_table_says_what_a_path_takes(
    changes: dict[str, Any], takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    layer = dataclasses.replace(LAYER, **{"device": GPU, **changes})
    assert AT_ONCE.takes(layer) == takes
    assert ONE_BY_ONE.takes(layer) == (not layer.soft_capped)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not AT_ONCE.takes(layer)


def test_soft_caps_are_not_dropped() -> None:
    inputs = rows_of(LAYER, LENGTHS)
    with pytest.raises(ValueError, match="soft-capped attention is not computed"):
        attend(None, *inputs, sequence_lengths=list(LENGTHS), softcap=50.0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_proof_leaves_no_trace_in_the_forward_pass_around_it(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout draws the same, and checkpointing's hooks see none of the proof's tensors."""
    model = tiny("llama").train()
    base = model.get_base_model()
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.2)
    if checkpointing:
        name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
        base.enable_input_require_grads()
        getattr(base, f"{name}_checkpointing_enable")(
            **{f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
        )
    planted(monkeypatch, varlen)
    how = Forward(False, True, True, 0)

    def visited(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        with attending(model, how):  # checkpointing computes attention in the backward pass too
            loss, gradients = loss_and_gradients(model, how)
        return [torch.tensor(loss), *gradients]

    first = visited(2)  # proves
    assert len(attention._paths) == 1
    assert all(map(torch.equal, first, visited(2)))
    assert not torch.equal(first[0], visited(3)[0])


def test_a_proof_may_be_made_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    path = planted(monkeypatch, varlen)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert path_of(dataclasses.replace(LAYER, dtype=torch.float32)) is path


def test_a_row_tells_where_its_sequences_start() -> None:
    row = flatten(examples_of(3, 2, 6))
    assert row["sequence_starts"].tolist() == [0, 3, 5, 11]
    assert row["sequence_starts"].dtype == torch.int32


def test_a_tail_fills_a_row_up_without_being_learned() -> None:
    examples = examples_of(30, 9, 25)
    plain, row = flatten(examples), flatten(examples, pad_token_id=7, bucket_tokens=4)
    assert row["input_ids"].shape == (1, 64) == plain["input_ids"].shape
    row = flatten(examples_of(30, 9, 26), pad_token_id=7, bucket_tokens=4)
    assert row["input_ids"][0, 65:].tolist() == [7, 7, 7]
    assert (row["labels"][0, 65:] == IGNORED_LABEL).all()
    assert row["sequence_lengths"] == [30, 9, 26, 3]
    assert row["position_ids"][0, 65:].tolist() == [0, 1, 2]
    assert row["sequence_starts"].tolist() == [0, 30, 39, 65, 68]


def test_no_sequence_of_a_tail_is_longer_than_the_longest_example() -> None:
    row = flatten(examples_of(*[3] * 43), bucket_tokens=8)
    assert row["sequence_lengths"][43:] == [3, 3, 1]
    assert int(row["position_ids"].max()) == 2


@pytest.mark.parametrize(
    ("tokens", "tail"),
    [(2500, 60), (2560, 0), (4096, 0), (4097, 255), (8000, 192), (40, 0), (33, 1)],
)
def test_a_tail_is_shorter_than_a_16th_of_its_row(tokens: int, tail: int) -> None:
    """2,500 / 16 = 156, so that the multiple is 128; 33 / 16 gives 2."""
    assert tail_tokens(tokens, 256) == tail
    assert all(16 * tail_tokens(n, 256) < n for n in range(1, 6000))


@pytest.mark.parametrize("model_type", ["llama", "phi3", "mistral"])
def test_a_tail_changes_neither_loss_nor_gradients(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The examples have 48 tokens: 32 are added, as sequences of 23 and 9."""
    monkeypatch.setattr(tokenization, "LARGEST_TAIL", 1)
    model = tiny(model_type).train()
    how = Forward(False, True, True, 7)
    expected, gradients = loss_and_gradients(model, how)
    loss, ours = loss_and_gradients(model, dataclasses.replace(how, bucket_tokens=40))
    assert loss == pytest.approx(expected, rel=1e-6)
    for own, wanted in zip(ours, gradients, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
