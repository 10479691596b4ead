"""Prompts of a family read after one stem, against one prompt at a time."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grandrounds.model import prefill
from grandrounds.model.cached import evaluating
from grandrounds.model.passes import Limits, Unit, batches, groups
from grandrounds.model.prefill import ALONE, SHARED, bytes_per_column, families_proven, pass_limits
from grandrounds.model.prefill import WHOLE as WHOLE_PROMPTS
from grandrounds.model.scoring import (
    generate_greedily,
    option_log_likelihoods,
    score_and_generate,
)
from tests.model.test_prefill import recorded
from tests.tiny_models import tiny_bases

BRANCHING = (
    *("llama", "qwen2", "qwen3", "phi3", "olmo2", "granite", "stablelm", "smollm3", "gpt_neox"),
    *("gpt2", "falcon", "mixtral", "deepseek_v2"),
)
"""Architectures whose prompts share stems."""

WHOLE = ("mistral", "gemma2", "lfm2_moe", "falcon_h1", "mpt", "jamba")
"""Architectures with windows, recurrent state or positions by column, whose prompts do not."""


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    tiny = tiny_bases.BASES[name]
    config = tiny_bases.config_of(tiny)
    if name in ("mistral", "gemma2"):
        config.sliding_window = 512  # no longer than the layouts of these prompts
    model = AutoModelForCausalLM.from_config(config).eval()
    tiny_bases.randomise(model, tiny.query_norm)
    return model


def ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randint(3, 299) for _ in range(count)]


def asked(preamble: int = 0) -> tuple[list[list[int]], list[int], list[list[list[int]]]]:
    """Return prompts, their families, and options: stems of 30, 9 and no token in common."""
    draw = random.Random(8)
    start = ids(draw, preamble)
    prompts, families = [], []
    for family, (stem, members) in enumerate(((30, 4), (9, 3), (0, 2), (17, 1), (45, 4))):
        common = ids(draw, stem)
        for _ in range(members):
            prompts.append([*start, *common, *ids(draw, draw.randint(1, 25))])
            families.append(family)
    order = list(range(len(prompts)))
    draw.shuffle(order)
    options = [[ids(draw, draw.randint(1, 3)) for _ in range(3)] for _ in prompts]
    return [prompts[i] for i in order], [families[i] for i in order], options


def tokens_read(shapes: list[tuple[int, ...]]) -> int:
    return sum(rows * width for rows, width in shapes)


@pytest.mark.parametrize("name", [*BRANCHING, *WHOLE])
def test_scores_after_a_stem_equal_one_prompt_at_a_time(name: str) -> None:
    model = model_of(name)
    with evaluating(model):
        assert families_proven(model) == (name in BRANCHING)
    prompts, families, options = asked(preamble=12)
    found = option_log_likelihoods(model, prompts, options, families=families, batch_size=16)
    with torch.no_grad():
        for prompt, choices, row in zip(prompts, options, found, strict=True):
            for choice, score in zip(choices, row, strict=True):
                logits = model(torch.tensor([prompt + choice]), use_cache=False).logits[0].double()
                chosen = logits[len(prompt) - 1 : -1].log_softmax(-1)
                alone = float(chosen.gather(1, torch.tensor([choice]).T).sum())
                assert score == pytest.approx(alone, abs=2e-4)


def test_a_stem_is_read_once_and_a_prompt_without_one_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llama")
    prompts, families, _ = asked()
    with evaluating(model):
        assert families_proven(model)
        list(prefill.prefill(model, prompts[:1], 64, following_tokens=3))  # probes the layout
        read = recorded(model, monkeypatch)
        order = [
            row
            for batch in prefill.prefill(model, prompts, 64, following_tokens=3, families=families)
            for row in batch.rows
        ]
    assert sorted(order) == list(range(len(prompts)))
    # three stems, what 11 prompts have beyond them, and three prompts without one
    assert [rows for rows, _ in read] == [3, 11, 3]
    assert read[0][1] == 45
    assert read[1][1] <= 25
    apart = list[tuple[int, ...]](read)
    read.clear()
    with evaluating(model):
        list(prefill.prefill(model, prompts, 64, following_tokens=3))
    assert tokens_read(apart) < 0.8 * tokens_read(read)  # which shares the commonest start


def test_a_start_that_only_one_family_has_is_no_prefix_of_all() -> None:
    draw = random.Random(3)
    stems = [ids(draw, 20) for _ in range(3)]
    prompts = [[*stems[family], 5 + i] for i, family in enumerate((0, 0, 0, 1, 1, 2))]
    families = [0, 0, 0, 1, 1, 2]
    assert groups(prompts)[0][0] == [0, 1, 2]
    assert groups(prompts, families) == [(list(range(6)), [])]


def test_a_pass_is_filled_by_tokens_and_a_family_stays_together() -> None:
    prompts = [[1] * tokens for tokens in (50, 50, 20, 20, 10, 10)]
    units = [Unit([0, 1], 30), Unit([2, 3], 10), Unit([4, 5], 8)]

    def read(limits: Limits) -> list[list[int]]:
        return [
            [row for unit in batch for row in unit.rows]
            for batch in batches(prompts, list(units), 0, limits)
        ]

    assert read(Limits(99, 120)) == [[0, 1, 2, 3, 4, 5]]  # 6 rows of 20 columns after the stems
    assert read(Limits(99, 80)) == [[0, 1, 2, 3], [4, 5]]
    assert read(Limits(99, 120, cells=120)) == [[0, 1], [2, 3, 4, 5]]  # 4 x (10 + 10) in the cache
    assert read(Limits(99, 120, 120, following=20)) == [[0, 1], [2, 3], [4, 5]]
    assert read(Limits(1, 1)) == [[0, 1], [2, 3], [4, 5]]


def test_a_pass_with_enough_tokens_takes_no_prompts_that_are_mostly_padding() -> None:
    prompts = [[1] * tokens for tokens in (50, 49, 48, 47, 10, 10, 9, 2)]

    def read(enough: int) -> list[list[int]]:
        units, limits = [Unit([row]) for row in range(len(prompts))], Limits(99, 999, enough=enough)
        return [[unit.rows[0] for unit in batch] for batch in batches(prompts, units, 0, limits)]

    assert read(999) == [list(range(8))]
    # 47 is padded too: 6 of 4 x 50, less than 1 of 32. 10 would be: 46 of 5 x 50.
    assert read(150) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert read(30) == [[0, 1, 2, 3], [4, 5, 6], [7]]  # 2: 9 of 4 x 10
    assert read(201) == [list(range(5)), [5, 6, 7]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma4_text", "falcon_h1", "deepseek_v2"])
def test_a_gpu_is_filled_to_its_free_memory_unless_a_number_of_prompts_is_given(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama: 3 x (2 layers x 2 x 2 heads x 8) + 3 x 48 + 8 x 32 values, and 300 logits."""
    model = model_of(name)
    with evaluating(model):
        letters, words = bytes_per_column(model, 1), bytes_per_column(model, 9)
    assert words == letters + 300 * (4 + 8)
    if name == "llama":
        assert letters == 4 * (3 * 64 + 3 * 48 + 8 * 32)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60_000_000, 80_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 10_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 6_000_000)

    class OnGpu:
        """The model, but for where its weights are said to be."""

        get_input_embeddings, get_output_embeddings, modules, __call__ = (
            model.get_input_embeddings,
            model.get_output_embeddings,
            model.modules,
            model.forward,
        )

        def parameters(self) -> Any:
            return iter([torch.empty(1, device="meta")])

    with evaluating(model):
        found = pass_limits(OnGpu(), None, 9)
        assert pass_limits(OnGpu(), 16, 9).prompts == 16
    assert (found.tokens, found.cells, found.following) == (16_384, 32_000_000 // words, 9)
    assert found.enough == 2048


def test_without_keys_and_values_a_pass_may_hold_the_logits_of_all_its_tokens() -> None:
    model = model_of("mamba")
    with evaluating(model):
        cached, whole = (bytes_per_column(model, 1, is_cached) for is_cached in (True, False))
    assert whole == cached + 300 * (4 + 8)


GPU = Limits(sys.maxsize, 16_384, enough=2048)


@pytest.mark.parametrize("layout", [SHARED, WHOLE_PROMPTS])
def test_filled_passes_read_fewer_tokens_in_fewer_passes_than_batches_of_16_do(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 questions in four orders, as `evaluate` asks them on a GPU and as it did before."""
    model, draw = model_of("llama"), random.Random(9)
    families = [family for family in range(60) for _ in range(4)]
    questions = [ids(draw, draw.choice((12, 20, 30, 60))) for _ in range(60)]
    prompts = [[*questions[family], *ids(draw, 25)] for family in families]
    options = [[[3 + letter] for letter in range(4)] for _ in prompts]
    monkeypatch.setitem(prefill._proven, model, layout)
    read = recorded(model, monkeypatch)
    before = []
    for order in range(4):
        before += option_log_likelihoods(model, prompts[order::4], options[order::4], batch_size=16)
    old_passes, old_tokens = len(read), tokens_read(read)
    read.clear()
    monkeypatch.setattr(prefill, "pass_limits", lambda *_: GPU)
    found = option_log_likelihoods(model, prompts, options, batch_size=None, families=families)
    assert len(read) < old_passes
    assert tokens_read(read) <= old_tokens
    assert max(width for _, width in read) <= 85
    for order in range(4):
        for row, same in zip(found[order::4], before[60 * order :], strict=False):
            assert row == pytest.approx(same, abs=1e-4)


@pytest.mark.parametrize("name", ["mamba", "jamba", "llama"])
def test_prompts_without_a_cache_are_read_in_batches_as_one_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name)
    prompts, _, options = asked()
    limits, stop = [1 + row % 5 for row in range(len(prompts))], list(range(3, 40))
    found, passes = [], []
    for layout in (WHOLE_PROMPTS, ALONE):
        monkeypatch.setitem(prefill._proven, model, layout)
        read = recorded(model, monkeypatch)
        scores = option_log_likelihoods(model, prompts, options)
        texts = generate_greedily(model, prompts, limits, stop)
        found.append((scores, texts))
        passes.append(len(read))
    assert passes[0] < passes[1] / 3
    assert found[0][1] == found[1][1]
    for row, same in zip(found[0][0], found[1][0], strict=True):
        assert row == pytest.approx(same, abs=1e-4)


def test_a_batch_that_does_not_fit_is_read_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    prompts, families, options = asked(preamble=12)
    whole = option_log_likelihoods(model, prompts, options, families=families)
    forward, refused = model.forward, list[int]()

    def limited(**inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 4:
            refused.append(len(inputs["input_ids"]))
            raise torch.OutOfMemoryError("out of memory")
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", limited)
    found = option_log_likelihoods(model, prompts, options, families=families)
    assert refused
    for row, same in zip(found, whole, strict=True):
        assert row == pytest.approx(same, abs=1e-4)

    def broken(**inputs: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(RuntimeError, match="broken"):
        option_log_likelihoods(model, prompts, options)


def test_scoring_and_generating_at_once_has_the_bits_of_both() -> None:
    model = model_of("llama")
    prompts, _, options = asked(preamble=12)
    limits, stop = [1 + row % 5 for row in range(len(prompts))], list(range(3, 40))
    scores, texts = score_and_generate(model, prompts, options, limits, stop, batch_size=4)
    assert scores == option_log_likelihoods(model, prompts, options, batch_size=4)
    assert texts == generate_greedily(model, prompts, limits, stop, batch_size=4)
    assert len({len(text) for text in texts}) > 2
    with pytest.raises(ValueError, match="14 prompts but 1 limits"):
        score_and_generate(model, prompts, options, [1], stop)
