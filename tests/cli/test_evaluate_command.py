"""`grandrounds evaluate` as a person meets it: tables, lines, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer.main
from click.testing import Result
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.study.evaluation import flowertune, recorded_prompts, runner
from grandrounds.study.evaluation.benchmarks import get_benchmark, load_items, placeholder_item
from tests.conftest import WORDS
from tests.places import ROOT
from tests.runs import copy_of

RECORDED = ROOT.parent / "shared" / "data" / "recorded"

ITEMS = 6


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def one_line(result: Result) -> str:
    """Return the one line of an expected failure."""
    (line,) = result.stderr.splitlines()
    assert line.startswith("grandrounds: ")
    return line


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        {
            "question": f"What helps against {WORDS[i]}?",
            **{name: f"{WORDS[i]} tea {name}" for name in ("opa", "opb", "opc", "opd")},
            "cop": i % 4,
        }
        for i in range(ITEMS)
    ]
    (folder / "medmcqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def asked(tiny_base: Path, data: Path, tmp_path: Path) -> list[object]:
    """Arguments of a small evaluation of a base."""
    arguments: list[object] = ["none", "--base", tiny_base, "--benchmarks", "medmcqa"]
    return [*arguments, "--data", data, "--out", tmp_path / "out", "--batch-size", 1]


# --- A good evaluation ----------------------------------------------------------------------------


def test_a_good_evaluation_prints_plain_tables_and_notes_and_exits_with_0(
    asked: list[object], tmp_path: Path
) -> None:
    result = evaluate(*asked, "--protocol", "all", "--permutations", 1)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"about .* to go, from the first batch of each benchmark", lines[0])
    assert lines[1:3] == [
        f"flowertune  base  MedMCQA: {ITEMS} asked",
        f"likelihood  base  MedMCQA: {2 * ITEMS} asked",
    ]
    titles = [line for line in lines if re.match(r"[a-z]", line)]
    assert titles[3:] == [
        "accuracy, protocol flowertune",
        "format of the answers",
        "accuracy, protocol likelihood",
        "length and order of the options",
        f"written: {tmp_path}/out/evaluation.json",
    ]
    notes = [line for line in lines if line.startswith("- ")]
    assert len(notes) == len(set(notes))  # what holds for both is said once


def test_a_terminal_gets_boxed_tables(asked: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    result = evaluate(*asked, "--permutations", 0)
    assert result.exit_code == 0
    assert "┏" in result.stdout
    assert "95 % interval" in result.stdout
    plain = evaluate(*asked, "--permutations", 0, "--resume", "--plain")
    assert "┏" not in plain.stdout
    assert f"0 asked, {ITEMS} kept from before" in plain.stdout


def test_a_finished_run_is_evaluated_by_its_folder_alone(tmp_path: Path) -> None:
    """The embedded base and formulary, as after `grandrounds run`, with few items."""
    run = copy_of("finished", tmp_path)
    exam = tmp_path / "exam.csv"
    exam.write_text("question,A,B,answer\nWhat is tea?,a drink,a drug,A\n")
    benchmarks = ("--benchmarks", "formulary,held-out", "--benchmark", exam)
    result = evaluate(run, "--limit", 8, "--answer-tokens", 4, *benchmarks)
    assert result.exit_code == 0, result.stderr
    assert "Formulary (fictional), private" in result.stdout
    assert re.search(r"exam\.csv +base +[01]/1", result.stdout)
    assert re.search(r"Held-out rows +peft_4 +\d/8", result.stdout)
    assert "peft_4: last checkpoint and lowest held-out loss" in result.stdout
    verified = evaluate("--verify", run / "evaluation" / "evaluation.json")
    assert verified.exit_code == 0
    assert "no fault found" in verified.stdout
    page = CliRunner().invoke(app, ["report", str(run)])
    assert page.exit_code == 0, page.stderr
    written = (run / "report.html").read_text()
    for said in ("Accuracy by checkpoint: exam.csv", "Held-out rows, token F1", "exact match"):
        assert said in written


def test_ctrl_c_keeps_the_answers_and_says_in_one_line_how_to_go_on(
    asked: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, calls = runner.generate_greedily, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(runner, "generate_greedily", interrupted)
    result = evaluate(*asked, "--protocol", "flowertune")
    assert result.exit_code == 130
    assert one_line(result) == (
        f"grandrounds: interrupted; answers so far are kept in {tmp_path}/out; continue with the "
        "same command and --resume"
    )
    answers = tmp_path / "out" / "answers_base_medmcqa_flowertune.jsonl"
    assert len(answers.read_text().splitlines()) == 4
    resumed = evaluate(*asked, "--protocol", "flowertune", "--resume")
    assert "2 asked, 4 kept from before" in resumed.stdout


# --- Rescore --------------------------------------------------------------------------------------


def recorded(folder: Path, outputs: str, accuracy: str | None) -> Path:
    """Write recorded generations whose gold answer is always A."""
    names = flowertune.result_names("medmcqa", "mine")
    records = [flowertune.Generation(f"Question {i}", "A", o) for i, o in enumerate(outputs)]
    flowertune.write_generations(folder / names[0], records)
    if accuracy is not None:
        (folder / names[1]).write_text(accuracy)
    return folder / names[0]


@pytest.mark.parametrize(
    ("accuracy", "shown"),
    [("Accuracy: 0.75. ", r"0\.75 +yes"), ("Accuracy: 0.7. ", r"0\.7 +NO"), (None, "- +- ")],
)
def test_rescore_shows_the_recorded_accuracy_beside_its_own(
    tmp_path: Path, accuracy: str | None, shown: str
) -> None:
    result = evaluate("--rescore", recorded(tmp_path, "AAAB", accuracy))
    assert result.exit_code == 0
    assert re.search(rf"3/4 +75\.0 .*{shown}", result.stdout)
    assert ("recorded 'Accuracy: 0.7.'" in result.stdout) == (accuracy == "Accuracy: 0.7. ")


@pytest.mark.skipif(not RECORDED.is_dir(), reason="recorded answers of published entries not here")
def test_six_recorded_files_are_rescored_to_their_recorded_accuracy() -> None:
    files = sorted(RECORDED.glob("generation_*"))
    result = evaluate("--rescore", *files)
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if "generation_" in line]
    assert len(lines) == len(files) == 6
    assert all(re.search(r"0\.\d+ +yes +0 ", line) for line in lines)  # and no altered prompt


def protocols(count: int, name: str = "medqa") -> list[flowertune.Generation]:
    """Return the prompts of some items, answered with A."""
    benchmark = get_benchmark(name)
    items = [placeholder_item(benchmark, f"Fact {i}, {i} as much") for i in range(count)]
    varied = [
        replace(item, options=tuple(f"option {i * k}" for k in range(4)))
        for i, item in enumerate(items)
    ]
    return [
        flowertune.Generation(flowertune.build_prompt(benchmark, item), "A", "A") for item in varied
    ]


@pytest.mark.parametrize(
    ("old", "new", "altered", "example"),
    [
        ("", "", "0", ""),
        ("You are a medical doctor", "You are a nurse", "60 (100.0 %)", "has 'You are a nurse"),
        ("guidelines.", "guidelines. Think first.", "60 (100.0 %)", "Think first. Question: Fact"),
        ("\nThe answer is:\n", "\nAnswer:\n", "60 (100.0 %)", "ends in "),
        ("much?", "much", "60 (100.0 %)", "to which FlowerTune adds a question mark"),
        ("\n\nOptions:", "\nOptions:", "60 (100.0 %)", "has no block of options 'A. ...'"),
        (
            "\nThe answer",
            "\nGive one letter only.\nThe answer",
            "60 (100.0 %)",
            "all prompts have 'Give one letter only.' at the end of option D",
        ),
    ],
)
def test_altered_prompts_are_counted_with_an_example(
    tmp_path: Path, old: str, new: str, altered: str, example: str
) -> None:
    """2 of 73 published files had another instruction or one more sentence, and were rescored "by
    FlowerTune's rule" without a word."""
    names = flowertune.result_names("medqa", "mine")
    records = [
        replace(record, prompt=record.prompt.replace(old, new) if old else record.prompt)
        for record in protocols(60)
    ]
    flowertune.write_generations(tmp_path / names[0], records)
    result = evaluate("--rescore", tmp_path / names[0], "--json")
    told, shown = json.loads(result.stdout), result.stderr
    assert [row["altered prompts"] for row in told] == [altered]
    assert example in told[0]["example of an altered prompt"]
    line = "60 of 60 prompts are not FlowerTune's for MedQA (USMLE, 4 options), so its score"
    assert (line in shown) == (altered != "0")
    assert "altered prompts" in shown


def test_some_altered_prompts_are_named_by_their_row(tmp_path: Path) -> None:
    """A file whose name tells no benchmark is compared with the one that fits best."""
    records = protocols(3, "pubmedqa")
    records = [replace(record, gold="yes", output="yes") for record in records]
    records[1] = replace(records[1], prompt=f"Hello. {records[1].prompt}")
    flowertune.write_generations(tmp_path / "mine.jsonl", records)
    shown = evaluate("--rescore", tmp_path / "mine.jsonl", "--plain").stdout
    said = "1 of 3 prompts are not FlowerTune's for PubMedQA, so its score compares with no other"
    assert f"{said}: row 2 has 'Hello. As an expert" in shown


def test_with_all_questions_at_hand_prompts_are_compared_in_full(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = replace(get_benchmark("medmcqa"), expected_items=ITEMS)
    monkeypatch.setattr(recorded_prompts, "benchmarks", lambda: {"medmcqa": benchmark})
    prompts = [flowertune.build_prompt(benchmark, item) for item in load_items(benchmark, data)]
    prompts[2] = prompts[2].replace("What helps", "Think! What helps")
    records = [flowertune.Generation(prompt, "A", "A") for prompt in prompts]
    file = tmp_path / flowertune.result_names("medmcqa", "mine")[0]
    flowertune.write_generations(file, records)
    (by_form,) = json.loads(evaluate("--rescore", file, "--json").stdout)
    assert by_form["altered prompts"] == "0"
    (told,) = json.loads(evaluate("--rescore", file, "--data", data, "--json").stdout)
    assert told["altered prompts"] == "1 (16.7 %)"
    assert "row 3 has '...idelines. Question: Think! What" in told["example of an altered prompt"]
    flowertune.write_generations(file, [replace(records[0], prompt=prompts[0]) for _ in range(2)])
    (same,) = json.loads(evaluate("--rescore", file, "--data", data, "--json").stdout)
    assert same["altered prompts"] == "0"


# --- Verify ---------------------------------------------------------------------------------------


def test_verify_names_what_cannot_be_and_exits_with_1(asked: list[object], tmp_path: Path) -> None:
    assert evaluate(*asked, "--permutations", 0).exit_code == 0
    file = tmp_path / "out" / "evaluation.json"
    evaluation = json.loads(file.read_text())
    evaluation["rows"][0]["correct"] += 1
    file.write_text(json.dumps(evaluation))
    result = evaluate("--verify", file)
    assert result.exit_code == 1
    assert re.search(r"\d faults\n  row 1 \(base, medmcqa\): accuracy", result.stdout)


def test_verify_finds_nothing_to_verify_in_an_empty_file(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text('{"protocol": "all", "evaluations": []}')
    result = evaluate("--verify", file)
    assert result.exit_code == 1
    assert "there are no rows" in result.stdout


@pytest.mark.parametrize(("content", "said"), [("", "not valid JSON"), ("[]", "no rows to verify")])
def test_an_empty_file_holds_no_recorded_answers(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(content)
    result = evaluate("--verify", file)
    assert result.exit_code == 1
    assert said in result.output
    assert "recorded answers" not in result.output


def test_rescore_of_an_evaluation_leads_to_verify(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({"protocol": "flowertune", "rows": []}, indent=1))
    result = evaluate("--rescore", file)
    assert result.exit_code == 1
    assert f"Verify it: grandrounds evaluate --verify {file}" in one_line(result)


def test_rescore_tells_rows_that_are_counted_twice(tmp_path: Path) -> None:
    names = flowertune.result_names("medmcqa", "mine")
    records = [flowertune.Generation(f"Question {i}", "A", "A") for i in (0, 1, 1, 1)]
    flowertune.write_generations(tmp_path / names[0], records)
    result = evaluate("--rescore", tmp_path / names[0])
    assert "2 of 4 rows repeat an earlier one in full" in result.output


@pytest.mark.parametrize("name", ["generation_medmcqa_mine.jsonl", "acc_medmcqa_mine.txt"])
def test_verify_of_recorded_answers_leads_to_rescore(tmp_path: Path, name: str) -> None:
    """Once they were "not valid JSON", or had "no rows to verify"."""
    answers = recorded(tmp_path, "AB", "Accuracy: 0.5. ")
    result = evaluate("--verify", tmp_path / name)
    assert result.exit_code == 1
    assert f"Score them again: grandrounds evaluate --rescore {answers}" in one_line(result)
    zipped = tmp_path / f"{answers.name}.gz"
    flowertune.write_generations(zipped, flowertune.read_generations(answers))
    assert f"--rescore {zipped}" in one_line(evaluate("--verify", zipped))


@pytest.mark.parametrize(("content", "said"), [("{", "not valid JSON"), (None, "cannot be read")])
def test_verify_of_no_json_is_one_line(tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "evaluation.json"
    if content is not None:
        file.write_text(content)
    result = evaluate("--verify", file)
    assert result.exit_code == 1
    assert said in one_line(result)


# --- Overlap --------------------------------------------------------------------------------------


def test_overlap_is_counted_listed_written_and_told_by_the_next_table(
    asked: list[object], data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    row = {"input": "Say, what helps against fever? And what helps against rash?", "output": "Tea"}
    cards = tmp_path / "cards.jsonl"
    cards.write_text(json.dumps({**row, "input": "What helps against fever?"}) + "\n")
    arguments = ("--benchmarks", "medmcqa", "--data", data, "--out", out)
    result = evaluate("--check-overlap", cards, *arguments)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"medmcqa +6 +1 \(16\.7 %\) +1 +0", result.stdout)
    assert "medmcqa item 1, training row 1 (exact): What helps against fever?" in result.stdout
    found = json.loads((out / "overlap.json").read_text())["benchmarks"]["medmcqa"]
    assert found["items"] == 1
    table = evaluate(*asked, "--permutations", 0).stdout
    assert f"- Overlap: 1 of 6 medmcqa questions occur in {cards} (overlap.json)." in table


# --- Refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "give an adapter's folder, a run directory or none: one argument, got 0"),
        (["none"], 2, "use --base MODEL"),
        (["none", "--benchmarks", "pubmedq"], 2, "Did you mean 'pubmedqa'?"),
        (["none", "--benchmarks", ","], 2, "--benchmarks is empty"),
        (["none", "--base", "x", "--protocol", "flowertun"], 2, "Did you mean 'flowertune'?"),
        (["none", "--base", "formulary", "--limit", "0"], 2, "limit must be at least 1, got 0"),
        (["--check-overlap", "x", "--limit", "0"], 2, "limit must be at least 1, got 0"),
        (["--rescore"], 2, "--rescore needs at least one file"),
        (["--verify", "--rescore", "x"], 2, "--rescore and --verify exclude each other"),
        (["--rescore", "nowhere.jsonl"], 1, "the recorded answers cannot be read"),
        (["nowhere"], 1, "'nowhere' is no such folder: expected a run directory"),
        (["none", "--base", "formulary", "--benchmarks", "medqa"], 1, "or use --data DIR"),
    ],
)
def test_what_cannot_be_is_one_line_and_an_exit_code(
    arguments: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = evaluate(*arguments)
    assert result.exit_code == code
    assert said in one_line(result)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_another_evaluation_is_refused(asked: list[object], tmp_path: Path) -> None:
    assert evaluate(*asked, "--limit", 1, "--permutations", 0).exit_code == 0
    result = evaluate(*asked)
    assert result.exit_code == 1
    assert "already contains an evaluation: continue it with --resume" in one_line(result)
    quiet = evaluate(*asked, "--limit", 1, "--permutations", 0, "--resume", "--quiet")
    assert [line for line in quiet.stdout.splitlines() if not line.startswith(" ")] == [
        "accuracy, protocol likelihood",
        "length and order of the options",
    ]
    told = evaluate(*asked, "--limit", 1, "--permutations", 0, "--resume", "--json")
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert json.loads(told.stdout) == content
    assert "accuracy, protocol likelihood" in told.stderr
    result = evaluate(*asked, "--permutations", 0, "--resume")
    assert result.exit_code == 1
    assert "was started with other settings: limit: 1 → None" in one_line(result)


def test_a_folder_that_cannot_be_written_is_one_line(asked: list[object], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = evaluate(*asked, "--out", tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert "file/out cannot be written: Not a directory" in one_line(result)


def test_a_row_that_cannot_be_is_named_with_its_line(asked: list[object], data: Path) -> None:
    file = data / "medmcqa.jsonl"
    file.write_text(file.read_text().replace('"cop": 2', '"cop": 9'))
    result = evaluate(*asked)
    assert result.exit_code == 1
    assert "medmcqa.jsonl, line 3, column 'cop': the value is 9" in one_line(result)


def test_a_slip_is_told_before_anything_heavy_is_loaded() -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom grandrounds.cli import app\n"
        "app(['evaluate', 'none', '--benchmarks', 'medqua'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'peft', 'flwr', 'datasets'} & set(sys.modules)\n"
        "print('loaded:', sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Did you mean 'medqa'?" in done.stderr
    assert done.stdout == "loaded: []\n"


# --- Help and documentation -----------------------------------------------------------------------


def test_help_explains_every_option() -> None:
    root: Any = typer.main.get_command(app)
    words = re.sub(r"[\s│]+", " ", evaluate("--help").output)
    options = [p for p in root.commands["evaluate"].params if p.param_type_name == "option"]
    assert len(options) > 10
    for option in options:
        assert option.opts[0] in words
        assert option.name == "help" or option.help


def test_the_commands_of_the_documentation_parse() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [words for line in lines if (words := shlex.split(line, comments=True))]
    assert len(commands) >= 5
    root: Any = typer.main.get_command(app)
    for words in commands:
        assert words[:2] == ["grandrounds", "evaluate"]
        root.commands["evaluate"].make_context("evaluate", words[2:])


def test_the_documented_python_call_is_the_function() -> None:
    import inspect

    text = (ROOT / "docs" / "evaluation.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    given = set(re.findall(r"(\w+)=", block.partition("evaluate(")[2]))
    assert given
    assert given <= set(inspect.signature(runner.evaluate).parameters)
