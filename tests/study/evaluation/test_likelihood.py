"""Protocol `likelihood`: prompts, tokens, choices and shuffled options, by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from grandrounds.model.scoring import option_log_likelihoods
from grandrounds.study.evaluation.benchmarks import (
    LETTERS,
    Item,
    benchmarks,
    get_benchmark,
    load_items,
)
from grandrounds.study.evaluation.likelihood import (
    answer_items,
    build_prompt,
    context_length,
    prompt_hash,
    requests,
    shows_letters,
    shuffled,
)

ITEM = Item(
    row=7,
    question="What helps?",
    context=(),
    options=("Rest", "Tea", "Soup", "Time"),
    labels=LETTERS,
    gold_index=2,
    group="",
)
ABSTRACT = Item(
    row=1,
    question="Does tea help?",
    context=("We gave tea.", "It helped."),
    options=("yes", "no", "maybe"),
    labels=("yes", "no", "maybe"),
    gold_index=0,
    group="",
)


@pytest.fixture(scope="module")
def tiny(tiny_base: Path) -> tuple[Any, Any]:
    """Model and tokenizer of the tiny random base."""
    return LlamaForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)


def test_prompts_are_those_of_the_harness() -> None:
    options = "A. Rest\nB. Tea\nC. Soup\nD. Time\nAnswer:"
    assert build_prompt(get_benchmark("medqa"), ITEM) == f"Question: What helps?\n{options}"
    for name in ("medmcqa", "careqa"):
        prompt = build_prompt(get_benchmark(name), ITEM)
        assert prompt == f"Question: What helps?\nChoices:\n{options}"
    assert build_prompt(get_benchmark("pubmedqa"), ABSTRACT) == (
        "Abstract: We gave tea.\nIt helped.\nQuestion: Does tea help?\nAnswer:"
    )


def test_a_benchmark_nobody_named_is_asked_in_medmcqas_words() -> None:
    other = replace(get_benchmark("medmcqa"), name="another")
    assert build_prompt(other, ITEM) == build_prompt(get_benchmark("medmcqa"), ITEM)


def test_prompt_hash_tells_prompts_apart() -> None:
    hashes = {name: prompt_hash(benchmark) for name, benchmark in benchmarks().items()}
    assert hashes["medmcqa"] == hashes["careqa"]
    assert hashes["general"] == hashes["formulary"]
    assert len(set(hashes.values())) == len(hashes) - 2
    assert all(len(value) == 16 for value in hashes.values())
    tokenizer = AutoTokenizer.from_pretrained(_embedded())
    chat = prompt_hash(get_benchmark("formulary"), "chat", tokenizer)
    assert chat != hashes["formulary"]


def _embedded() -> str:
    from grandrounds.data.formulary import base_path

    return str(base_path())


def test_answers_follow_the_prompt_after_one_blank(tiny: tuple[Any, Any]) -> None:
    tokenizer = tiny[1]
    asked = requests(get_benchmark("medqa"), [ITEM], tokenizer, 1024)
    [request] = asked
    assert tokenizer.decode(request.prompt).endswith("D. Time\nAnswer:")
    assert [tokenizer.decode(answer) for answer in request.answers] == [" A", " B", " C", " D"]
    assert (request.item, request.options, request.truncated) == (0, (0, 1, 2, 3), False)


def test_a_prompt_that_is_too_long_is_cut_on_the_left(tiny: tuple[Any, Any]) -> None:
    """The last token of an answer is never read: with a context of n, n + 1 tokens have room."""
    tokenizer = tiny[1]
    benchmark = get_benchmark("pubmedqa")
    [whole] = requests(benchmark, [ABSTRACT], tokenizer, 1024)
    full, longest = len(whole.prompt), max(map(len, whole.answers))
    [fits] = requests(benchmark, [ABSTRACT], tokenizer, full + longest - 1)
    assert not fits.truncated
    cut = requests(benchmark, [ABSTRACT, ABSTRACT], tokenizer, full + longest - 2)
    assert {request.item for request in cut if request.truncated} == {0, 1}
    found = {
        option: (request.prompt, answer)
        for request in cut
        if request.item == 0
        for option, answer in zip(request.options, request.answers, strict=True)
    }
    for option, answer in enumerate(whole.answers):
        room = full + longest - 1 - len(answer)
        assert found[option] == (whole.prompt[-room:], answer)
    with pytest.raises(ValueError, match="in a context of 0"):
        requests(benchmark, [ABSTRACT], tokenizer, 0)


def test_cut_prompts_give_the_answers_of_their_own_item(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    benchmark = get_benchmark("pubmedqa")
    long = replace(ABSTRACT, context=("We gave tea. " * 400,))
    items = [ABSTRACT, long, replace(ABSTRACT, gold_index=1)]
    answers = answer_items(model, tokenizer, benchmark, items, batch_size=2)
    assert [answer.truncated for answer in answers] == [False, True, False]
    prompt = tokenizer(build_prompt(benchmark, long))["input_ids"]
    for text, value in zip(long.labels, answers[1].log_likelihoods, strict=True):
        option = tokenizer(f" {text}")["input_ids"]
        kept = prompt[-(1025 - len(option)) :]
        [[alone]] = option_log_likelihoods(model, [kept], [[option]])
        assert value == pytest.approx(alone, abs=1e-4)


def test_the_first_of_equals_is_chosen_and_length_counts_in_characters(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: -6 / len("yes") = -2, -5 / len("no") = -2.5, -5 / len("maybe") = -1."""
    monkeypatch.setattr(
        "grandrounds.model.scoring.option_log_likelihoods",
        lambda *_, **__: [[-6.0, -5.0, -5.0]],
    )
    [answer] = answer_items(*tiny, get_benchmark("pubmedqa"), [replace(ABSTRACT, gold_index=2)])
    assert (answer.choice, answer.correct) == (1, False)
    assert answer.correct_normalised
    assert answer.log_likelihoods == (-6.0, -5.0, -5.0)


@pytest.mark.slow
def test_formulary_answers_are_those_of_the_exam(
    base: tuple[Any, Any], base_scores: dict[str, dict[str, int]]
) -> None:
    benchmark = get_benchmark("formulary")
    items = load_items(benchmark)
    answers = answer_items(*base, benchmark, items)
    counts: dict[str, dict[str, int]] = {}
    for item, answer in zip(items, answers, strict=True):
        kind = counts.setdefault(item.group, {"correct": 0, "n": 0})
        kind["correct"] += answer.correct
        kind["n"] += 1
    assert counts == base_scores


def test_shuffled_options_keep_their_gold_and_every_position_occurs() -> None:
    benchmark = get_benchmark("medmcqa")
    items = [replace(ITEM, row=row) for row in range(1, 401)]
    seen = shuffled(benchmark, items, permutation_seed=1)
    assert {item.options[item.gold_index] for item in seen} == {"Soup"}
    assert {item.labels for item in seen} == {LETTERS}
    assert len({item.options for item in seen}) == 24
    positions = [sum(item.gold_index == place for item in seen) for place in range(4)]
    assert min(positions) > 70
    assert shuffled(benchmark, items, 1) == seen
    assert shuffled(benchmark, items, 2) != seen
    assert shuffled(benchmark, items[200:], 1) == seen[200:]


def test_only_letters_can_be_shuffled() -> None:
    lettered = {name for name, benchmark in benchmarks().items() if shows_letters(benchmark)}
    assert lettered == {"careqa", "medmcqa", "medqa"}
    with pytest.raises(ValueError, match="'pubmedqa' shows no letters"):
        shuffled(get_benchmark("pubmedqa"), [ABSTRACT], 1)


def test_context_length_is_read_under_its_several_names() -> None:
    class Config:
        pass

    outer, inner = Config(), Config()
    assert context_length(outer) == 2048
    outer.max_position_embeddings = 512  # type: ignore[attr-defined]
    assert context_length(outer) == 512
    outer.n_positions = 256  # type: ignore[attr-defined]
    assert context_length(outer) == 256
    inner.max_position_embeddings = 4096  # type: ignore[attr-defined]
    outer.text_config = inner  # type: ignore[attr-defined]
    assert context_length(outer) == 4096


def test_nothing_to_ask_gives_nothing(tiny: tuple[Any, Any]) -> None:
    for name in ("medqa", "formulary"):
        assert answer_items(*tiny, get_benchmark(name), []) == []


def test_import_loads_no_torch() -> None:
    code = (
        "import sys, grandrounds.study.evaluation.likelihood; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
