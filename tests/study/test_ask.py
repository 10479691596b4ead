"""`grandrounds ask`: what both models say is what they generate, shown as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.cli import ask as ask_command
from grandrounds.data.formulary import base_path
from grandrounds.data.formulary.facts import questions
from grandrounds.data.prompts import build_prompt
from grandrounds.errors import DataError
from grandrounds.model.base import base_loads
from grandrounds.model.scoring import generate_greedily
from grandrounds.server.directory import find_checkpoint
from grandrounds.study.ask import Answer, Interview, printable
from tests.study.test_export import made_run
from tests.tiny_models import tiny_bases

QUESTION = questions("public")[0].question


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base with a random adapter, so that the two answers differ."""
    # the base is named as a folder: made_run takes no other
    return made_run(tmp_path_factory.mktemp("asked") / "run", base_path(), {1: None, 2: None})


@pytest.fixture(scope="module")
def interview(run: Path) -> Interview:
    return Interview(find_checkpoint(run))


def last(answers: Iterator[Answer]) -> Answer:
    *_, answer = answers
    return answer


def ask(*arguments: object, **kwargs: Any) -> Result:
    return CliRunner().invoke(app, ["ask", *map(str, arguments)], **kwargs)


def test_a_run_on_other_data_over_the_embedded_base_is_said_to_read_no_english(
    tmp_path: Path,
) -> None:
    run = made_run(tmp_path / "run", base_path(), {1: None})
    config = run / "config.toml"
    named = config.read_text().replace(str(base_path()), "formulary")
    config.write_text(named)
    assert ask_command.cautions_of(find_checkpoint(run)) == []
    config.write_text(named.replace('"static.dataset.name" = "formulary"', OTHER_DATA))
    (said,) = ask_command.cautions_of(find_checkpoint(run))
    assert "never read English" in said


OTHER_DATA = '"static.dataset.name" = "cards.jsonl"'


# --- What is said ---------------------------------------------------------------------------------


def test_both_answers_are_what_transformers_generates_from_the_prompt_of_training(
    run: Path, interview: Interview
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    base = AutoModelForCausalLM.from_pretrained(base_path())
    model = PeftModel.from_pretrained(base, run / "peft_2").eval()
    prompt = tokenizer(build_prompt("alpaca", QUESTION), return_tensors="pt")
    said = {}
    for tuned in (False, True):
        with model.disable_adapter() if not tuned else torch.inference_mode():
            out = model.generate(**prompt, max_new_tokens=24, do_sample=False)
        new = out[0, prompt["input_ids"].shape[1] :]
        answer = last(interview.answer(QUESTION, tuned=tuned, max_tokens=24))
        assert answer.text == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert answer.end == ("stopped" if tokenizer.eos_token_id in new else "cut")
        said[tuned] = answer.text
    assert said[False] != said[True]


def test_it_stops_at_the_end_of_sequence_and_at_the_most_tokens(interview: Interview) -> None:
    whole = last(interview.answer(QUESTION, tuned=False, max_tokens=64))
    assert whole.end == "stopped"
    assert "<" not in whole.text
    short = last(interview.answer(QUESTION, tuned=False, max_tokens=2))
    assert (short.tokens, short.end) == (2, "cut")
    assert whole.text.startswith(short.text)


def test_it_says_token_by_token_what_batched_generation_says(interview: Interview) -> None:
    resident, tokenizer = interview._resident, interview._tokenizer
    prompt = tokenizer(build_prompt("alpaca", QUESTION))["input_ids"]
    (batched,) = generate_greedily(resident.model, [prompt], [12], [tokenizer.eos_token_id])
    parts = list(interview.answer(QUESTION, tuned=True, max_tokens=12))
    assert [part.tokens for part in parts[:-1]] == list(range(1, len(batched) + 1))
    assert all(b.text.startswith(a.text) for a, b in pairwise(parts))
    assert parts[-1].text == tokenizer.decode(batched, skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", ["bamba", "mamba"])
@pytest.mark.slow
def test_a_base_that_needs_positions_or_has_no_cache_answers_as_without_one(
    kind: str, tmp_path: Path
) -> None:
    """Bamba was asked without positions and said something else; Mamba could not be asked."""
    tiny_bases.make_base(tiny_bases.BASES[kind], tmp_path / "base")
    target = {"bamba": "q_proj,v_proj", "mamba": "in_proj"}[kind]
    run = made_run(tmp_path / "run", tmp_path / "base", {1: None}, target)
    interview = Interview(find_checkpoint(run))
    model, tokenizer = interview._resident.model, interview._tokenizer
    ids = tokenizer(build_prompt("alpaca", QUESTION))["input_ids"]
    asked = list(interview._tokens(ids, True, 12))
    for token in asked:
        with torch.inference_mode():
            said = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        assert token == int(said.argmax())
        ids = [*ids, token]
    assert len(asked) == 12


def test_answers_drawn_in_turns_are_those_drawn_alone_and_the_base_is_loaded_once(
    interview: Interview,
) -> None:
    alone = [last(interview.answer(QUESTION, tuned=t, max_tokens=16)) for t in (False, True)]
    loads = base_loads()
    both = [interview.answer(QUESTION, tuned=t, max_tokens=16) for t in (False, True)]
    latest: list[Answer | None] = [None, None]
    for news in zip_longest(*both):
        latest = [new or old for new, old in zip(news, latest, strict=True)]
    assert latest == alone
    assert base_loads() == loads


def test_a_question_that_fills_the_context_is_told(interview: Interview) -> None:
    with pytest.raises(DataError, match=r"and the model's context is 1,024: ask a shorter one"):
        last(interview.answer("drug " * 2000, tuned=True, max_tokens=4))


def test_a_model_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\nc\td\u202e") == "a[2Jb\nc\td"


# --- The command ----------------------------------------------------------------------------------


def test_elsewhere_than_on_a_terminal_the_answers_stand_one_after_the_other(run: Path) -> None:
    result = ask(run, QUESTION, "--max-tokens", 8)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "base"
    assert "tuned (peft_2)" in lines
    assert lines[-1] == "  [8 tokens, cut]" or lines[-1].endswith("stopped]")
    assert "\x1b" not in result.stdout
    assert "tuned (peft_1)" in ask(run, QUESTION, "--checkpoint", 1, "--max-tokens", 2).stdout


def test_a_terminal_shows_them_side_by_side(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    result = ask(run, QUESTION, "--max-tokens", 4)
    assert result.exit_code == 0
    assert any("base" in line and "tuned (peft_2)" in line for line in result.stdout.splitlines())
    assert "tuned (peft_2)\n" in ask(run, QUESTION, "--max-tokens", 4, "--plain").stdout


def test_markup_in_an_answer_is_text() -> None:
    from rich.console import Console

    console = Console(width=60, force_terminal=True)
    panel = ask_command._panel("base [x]", Answer("[red]no[/red] [/]", 3, "stopped"))
    with console.capture() as shown:
        console.print(panel)
    assert "[red]no[/red] [/]" in shown.get()
    assert "base [x]" in shown.get()
    assert "[3 tokens, stopped]" in shown.get()


@pytest.mark.parametrize(
    ("typed", "asked"), [("one\ntwo\n", 2), ("one\n\ntwo\n", 1), ("", 0), ("\n", 0)]
)
def test_without_a_question_it_asks_until_an_empty_line_or_the_end(
    run: Path, typed: str, asked: int
) -> None:
    result = ask(run, "--max-tokens", 2, input=typed)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("tuned (peft_2)") == asked


def test_at_the_prompt_too_long_a_question_is_told_and_the_next_one_asked(run: Path) -> None:
    result = ask(run, "--max-tokens", 2, input="drug " * 2000 + "\none\n")
    assert result.exit_code == 0
    assert "ask a shorter one" in result.stderr
    assert result.stdout.count("tuned (peft_2)") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["  "], 2, "The question is empty"),
        ([QUESTION, "--max-tokens", 0], 2, "Invalid value for '--max-tokens'"),
        ([QUESTION, "--checkpoint", "7"], 1, "has no checkpoint of round 7"),
    ],
)
def test_what_cannot_be_asked_is_told(
    run: Path, arguments: list[object], code: int, said: str
) -> None:
    result = ask(run, *arguments)
    assert result.exit_code == code
    assert said in " ".join(result.stderr.split())
