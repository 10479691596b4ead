"""The loss of answers by lean means, against PyTorch's own on every token, for every family."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from grandrounds.config import recipes
from grandrounds.data.tokenization import TokenizedExample
from grandrounds.errors import ModelError
from grandrounds.model import loss as losses
from grandrounds.model import machine
from grandrounds.model.architectures import FAMILIES
from grandrounds.model.attention_kernels import takes_groups
from grandrounds.model.loss import Forward, Head, head_nll_sum, sent

CPU = torch.device("cpu")
PAD = 0
VOCABULARY = 300


def examples_of(*lengths: int) -> list[TokenizedExample]:
    """Return examples of random tokens, a third of each its prompt."""
    rng = np.random.default_rng(1)
    return [
        TokenizedExample(tuple(int(i) for i in rng.integers(1, VOCABULARY, n)), max(1, n // 3))
        for n in lengths
    ]


EXAMPLES = examples_of(9, 2, 23, 14)


def tiny(model_type: str, **changes: Any) -> Any:
    """Return a random model of a family with LoRA on it, B drawn too."""
    config = CONFIG_MAPPING[model_type](
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.3,
            **changes,
        }
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    targets = ["qkv_proj"] if model_type == "phi3" else ["q_proj", "v_proj"]
    lora = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def answer_nll_sum(model: Any, examples: list[TokenizedExample], how: Forward) -> torch.Tensor:
    """Return the loss of examples in one batch."""
    with losses.attending(model, how):
        return losses.answer_nll_sum(model, examples, PAD, CPU, how)


def loss_and_gradients(model: Any, how: Forward) -> tuple[float, list[torch.Tensor]]:
    """Return a batch's loss and the adapter's gradients."""
    model.zero_grad()
    loss = answer_nll_sum(model, EXAMPLES, how)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def one_by_one(model: Any) -> tuple[float, list[torch.Tensor]]:
    """Return the same by the model's own logits, each example alone, without mask or padding."""
    model.zero_grad()
    total = 0.0
    for example in EXAMPLES:
        ids = torch.tensor([example.input_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        learned = slice(example.prompt_tokens, None)
        before = slice(example.prompt_tokens - 1, -1)
        loss = cross_entropy(logits[before].float(), ids[0, learned], reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total, [p.grad.clone() for p in model.parameters() if p.requires_grad]


SERVED = [name for name in FAMILIES if name in CONFIG_MAPPING]
MEANS = [
    Forward(False, padding_free, answers_only, chunk)
    for padding_free, answers_only, chunk in itertools.product((True, False), (True, False), (0, 7))
    if answers_only or not chunk
]


@pytest.mark.parametrize("how", MEANS, ids=str)
@pytest.mark.parametrize("model_type", SERVED)
def test_every_means_gives_the_loss_and_gradient_of_each_example_alone(
    model_type: str, how: Forward
) -> None:
    if how.padding_free and FAMILIES[model_type].attention_matrix:
        pytest.skip(f"{model_type} keeps its padding")
    model = tiny(model_type).train()
    expected, gradients = one_by_one(model)
    loss, ours = loss_and_gradients(model, how)
    assert loss == pytest.approx(expected, rel=1e-5)
    for got, wanted in zip(ours, gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("device", "dtype", "grouped"),
    [
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float16, True),
        ("cuda", torch.float32, False),  # no FlashAttention
        ("cpu", torch.bfloat16, False),
    ],
)
def test_heads_stay_grouped_only_where_no_matrix_is_made(
    device: str, dtype: torch.dtype, grouped: bool
) -> None:
    query = SimpleNamespace(device=SimpleNamespace(type=device), dtype=dtype)
    assert takes_groups(query) == grouped  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "changes", "bucket_tokens"),
    [
        ("cuda", {}, machine.BUCKET_TOKENS),
        ("cuda", {"model.quantization": 4}, machine.BUCKET_TOKENS),
        ("cuda", {"model.quantization": 8}, 1),
        ("cuda", {"train.batching": "length-grouped"}, 1),
        ("cpu", {}, 1),
    ],
)
def test_rows_have_tails_on_a_gpu_only(
    device: str,
    changes: dict[str, Any],
    bucket_tokens: int,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = (torch.device(device), torch.bfloat16)
    monkeypatch.setattr(machine, "device_and_dtype", lambda _: chosen)
    config = recipes.resolve({**settings, **changes})
    assert machine.forward(config).bucket_tokens == bucket_tokens


@pytest.mark.parametrize("window", [4, 16, 64])
def test_a_sliding_window_is_kept_within_each_sequence(window: int) -> None:
    """The longest example has 23 tokens: some windows are shorter, one is longer."""
    model = tiny("mistral", sliding_window=window).train()
    expected, gradients = one_by_one(model)
    loss, ours = loss_and_gradients(model, Forward(False, True, True, 0))
    assert loss == pytest.approx(expected, rel=1e-5)
    for got, wanted in zip(ours, gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("model_type", "padding_free", "answers_only"),
    [("llama", True, True), ("gemma2", False, True), ("mamba", False, False)],
)
def test_gemma_2_keeps_its_padding_and_unknown_families_keep_all_logits(
    model_type: str,
    padding_free: bool,
    answers_only: bool,
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    config = recipes.resolve({**settings, "model.name": str(tmp_path)})
    how = machine.forward(config)
    assert (how.padding_free, how.answers_only) == (padding_free, answers_only)
    if not padding_free:
        config = recipes.resolve({**config.flat(), "train.batching": "padding-free"})
        with pytest.raises(ModelError, match=f"'{model_type}' models is not known to support it"):
            machine.forward(config)


def test_the_model_attends_as_before_when_the_batch_is_done(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(input_ids=ids).logits
    answer_nll_sum(model, EXAMPLES, Forward(False, True, True, 0))
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(input_ids=ids).logits, before)


def test_without_the_context_the_loss_is_the_same_by_a_mask(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    how = Forward(False, True, True, 0)
    with torch.no_grad():
        masked = losses.answer_nll_sum(model, EXAMPLES, PAD, CPU, how)
        assert float(masked) == pytest.approx(float(answer_nll_sum(model, EXAMPLES, how)), rel=1e-6)


def test_no_sequence_sees_another(tiny_base: Path) -> None:
    """Another first example leaves the hidden states of the second as they are."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    how = Forward(False, True, True, 0)
    first, other, second = examples_of(9, 9, 12)
    with torch.no_grad():
        alone = float(answer_nll_sum(model, [second], how))
        for neighbour in (first, other):
            both = float(answer_nll_sum(model, [neighbour, second], how))
            mine = float(answer_nll_sum(model, [neighbour], how))
            assert both - mine == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("chunk", [0, 1, 4, 100])
@pytest.mark.parametrize("biased", [False, True])
def test_the_gradient_of_the_head_is_that_of_autograd(
    cap: float | None, chunk: int, biased: bool
) -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(13, 6), torch.randn(9, 6, requires_grad=True)
    bias = torch.randn(13) if biased else None
    targets = torch.randint(13, (9,))
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = cross_entropy(logits, targets, reduction="sum")
    (wanted,) = torch.autograd.grad(3 * expected, hidden)
    loss = head_nll_sum(hidden, Head(weight, bias, cap), targets, chunk)
    (got,) = torch.autograd.grad(3 * loss, hidden)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_loss_by_hand() -> None:
    """Logits (ln 3, 0) and target 0: L = -ln 3/4; dL/dh = (3/4 - 1, 1/4) W, with W = ((1), (0))
    and h = ln 3: -1/4."""
    hidden = torch.log(torch.tensor([[3.0]])).requires_grad_()
    weight = torch.tensor([[1.0], [0.0]])
    loss = head_nll_sum(hidden, Head(weight), torch.tensor([0]), 0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(-np.log(0.75))
    assert hidden.grad is not None
    assert float(hidden.grad) == pytest.approx(-0.25)


def test_logits_that_would_overflow_exp_are_no_problem() -> None:
    hidden = torch.tensor([[1e4]], requires_grad=True)
    loss = head_nll_sum(hidden, Head(torch.tensor([[1.0], [0.0]])), torch.tensor([1]), 0)
    assert float(loss.detach()) == pytest.approx(1e4)


def test_bfloat16_hidden_states_lose_no_more_than_the_products_do() -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(50, 8), torch.randn(20, 8)
    targets = torch.randint(50, (20,))
    exact = cross_entropy(hidden @ weight.T, targets, reduction="sum")
    loss = head_nll_sum(hidden.bfloat16(), Head(weight.bfloat16()), targets, 6)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=1e-2)


def test_no_answers_cost_nothing() -> None:
    nothing = head_nll_sum(torch.zeros(0, 4), Head(torch.ones(5, 4)), torch.zeros(0).long(), 0)
    assert float(nothing) == 0


def test_inputs_reach_a_gpu_without_waiting_for_it_and_a_cpu_as_they_are() -> None:
    """A copy from pageable memory would wait until all earlier kernels have run."""
    told: list[Any] = []

    class Tensor:
        device = torch.device("cpu")

        def pin_memory(self) -> Tensor:
            told.append("pinned")
            return self

        def to(self, device: torch.device, non_blocking: bool = False) -> Tensor:
            told.append((device.type, non_blocking))
            return self

    sent(Tensor(), torch.device("cuda"))  # type: ignore[arg-type]
    assert told == ["pinned", ("cuda", True)]
    tensor = torch.arange(3)
    assert sent(tensor, torch.device("cpu")) is tensor
