"""What a person gets wrong is answered in one line that helps, and nothing is left behind."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from grandrounds import cli
from grandrounds.cli import app
from grandrounds.cli import run as run_command
from tests.listening import Telling
from tests.runs import Settings, options


def command(settings: Settings, *arguments: str) -> Result:
    """Give `grandrounds run` each setting as `--set`, and further arguments."""
    return CliRunner().invoke(app, ["run", *options(settings), *arguments])


def complaint(result: Result, exit_code: int) -> str:
    """Return the one line on stderr of a command that failed as an expected failure does."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == exit_code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("grandrounds: ")
    assert "Traceback" not in result.output
    return lines[0]


@pytest.fixture
def nothing_left(settings: Settings, tmp_path: Path) -> Any:
    """Check after the test that there is no run directory, nor anything hidden beside it."""
    yield
    assert not Path(settings["run-directory"]).exists()
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.glob(".*"))


# --- The configuration: exit code 2, before anything is imported or written -----------------------


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("key", "suggested"),
    [
        ("num-server-round", "num-server-rounds"),
        ("train.lerning-rate-max", "train.learning-rate-max"),
        ("model.lora.peft-lora-alfa", "model.lora.peft-lora-alpha"),
        ("strategy.fraction-trian", "strategy.fraction-train"),
        ("train.training-arguments.max_steps", "train.training-arguments.max-steps"),
        ("num_partitions", None),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(
    settings: Settings, key: str, suggested: str | None
) -> None:
    line = complaint(command({**settings, key: 3}), 2)
    assert f"Unknown configuration key {key!r}." in line
    assert "`grandrounds docs configuration`" in line
    if suggested:
        assert f"Did you mean {suggested!r}?" in line


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num-server-rounds", 0, "at least 1"),
        ("num-server-rounds", -3, "-3"),
        ("num-server-rounds", 10**11, "at most 100000"),
        ("num-server-rounds", "many", "an integer"),
        ("num-server-rounds", 2.5, "an integer"),
        ("num-server-rounds", "true", "an integer"),
        ("seed", -1, "at least 0"),
        ("seed", 2**31, "at most"),
        ("train.learning-rate-max", 0, "more than 0"),
        ("train.learning-rate-max", "nan", "nan"),
        ("train.learning-rate-max", "inf", "inf"),
        ("train.learning-rate-max", 2, "at most 1"),
        ("train.learning-rate-min", 0.5, "exceeds train.learning-rate-max"),
        ("strategy.fraction-train", 1.5, "at most 1"),
        ("strategy.name", "fedprocks", "Did you mean 'fedprox'?"),
        ("strategy.proximal-mu", -1, "at least 0"),
        ("model.quantization", 3, "one of 0, 4, 8"),
        ("model.lora.peft-lora-r", 0, "at least 1"),
        ("data.partitioner", "irid", "Did you mean 'iid'?"),
        ("data.partitioner", "natural", "data.partition-by"),
        ("data.held-out-fraction", 1, "at most 0.9"),
        ("data.held-out-fraction", 0, "strategy.fraction-evaluate"),
        ("train.training-arguments.max-steps", 0, "max-steps = 0"),
        ("train.training-arguments.fp16", "true", "bf16"),
        ("model.name", '""', "model.name is empty"),
    ],
)
def test_an_impossible_value_is_refused_by_the_name_of_its_key(
    settings: Settings, key: str, value: Any, words: str
) -> None:
    line = complaint(command({**settings, key: value}), 2)
    assert key in line
    assert words in line


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("assignment", ["seed", "=7", " = 7", ""])
def test_an_override_without_key_and_value_is_refused(settings: Settings, assignment: str) -> None:
    line = complaint(command(settings, "--set", assignment), 2)
    assert "use KEY=VALUE" in line


@pytest.mark.usefixtures("nothing_left")
def test_an_override_with_a_list_says_how_to_write_one(settings: Settings) -> None:
    line = complaint(command(settings, "--set", 'model.lora.target-modules=["q_proj"]'), 2)
    assert '"q_proj,v_proj"' in line


@pytest.mark.usefixtures("nothing_left")
def test_a_missing_configuration_file_is_named(settings: Settings, tmp_path: Path) -> None:
    line = complaint(command(settings, "--config", str(tmp_path / "no.toml")), 2)
    assert str(tmp_path / "no.toml") in line
    assert "No such file" in line


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"seed 7", "is not valid TOML"),
        (b"\xff\xfe", "is not valid TOML"),
        (b"[a]\nb = [1, 2]", "a.b = [1, 2] is a list"),
        (b"tool = 1", "tool"),
        (b"tool.flwr.app.config = 1", "config"),
    ],
)
def test_a_configuration_file_that_is_none_is_refused(
    settings: Settings, tmp_path: Path, content: bytes, words: str
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(content)
    assert words in complaint(command(settings, "--config", str(recipe)), 2)


@pytest.mark.usefixtures("nothing_left")
def test_a_folder_as_configuration_file_is_refused(settings: Settings, tmp_path: Path) -> None:
    assert str(tmp_path) in complaint(command(settings, "--config", str(tmp_path)), 2)


# --- Data -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_left")
def test_a_missing_data_file_is_named(settings: Settings, flashcards: Path) -> None:
    missing = flashcards.with_name("card.jsonl")
    line = complaint(command(settings, "--data", str(missing)), 1)
    assert f"{missing}: no such file." in line
    assert "Did you mean 'cards.jsonl'?" in line


@pytest.mark.usefixtures("nothing_left")
def test_a_missing_column_is_answered_with_those_there_are(settings: Settings) -> None:
    line = complaint(command({**settings, "data.question-column": "inputs"}), 1)
    assert "'inputs'" in line
    assert "instruction, input, output, ward" in line
    assert "Did you mean 'input'?" in line


@pytest.mark.usefixtures("nothing_left")
def test_a_line_that_is_no_json_is_named_by_its_number(
    settings: Settings, flashcards: Path, tmp_path: Path
) -> None:
    lines = flashcards.read_text().splitlines()
    lines[41] = lines[41][:-5]
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join(lines))
    line = complaint(command(settings, "--data", str(broken)), 1)
    assert f"{broken}, line 42: not valid JSON" in line


@pytest.mark.usefixtures("nothing_left")
def test_fewer_examples_than_sites_are_refused(settings: Settings) -> None:
    line = complaint(command({**settings, "data.num-partitions": 121}), 1)
    assert "120 rows cannot fill 121 sites" in line


@pytest.mark.usefixtures("nothing_left")
def test_a_site_whose_rows_have_no_answers_is_named(settings: Settings, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text(
        "".join(json.dumps({"input": f"question {i}", "output": " "}) + "\n" for i in range(40))
    )
    line = complaint(command(settings, "--data", str(empty)), 1)
    assert "none of its 40 rows has a question ('input') and an answer ('output')" in line
    assert "column 'output' is empty" in line


@pytest.mark.usefixtures("nothing_left")
def test_prompts_that_fill_the_sequence_are_refused(settings: Settings) -> None:
    line = complaint(command({**settings, "train.seq-length": 8}), 1)
    assert "train.seq-length = 8" in line


@pytest.mark.usefixtures("nothing_left")
def test_a_data_set_that_cannot_be_fetched_offline_is_named(settings: Settings) -> None:
    line = complaint(command(settings, "--data", "nobody/no-such-data"), 1)
    assert "nobody/no-such-data" in line
    assert "HF_HUB_OFFLINE" in line


# --- The model ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_left")
def test_a_model_that_is_not_there_while_offline_is_named(settings: Settings) -> None:
    line = complaint(command(settings, "--model", "nobody/no-such-model"), 1)
    assert "nobody/no-such-model" in line
    assert "HF_HUB_OFFLINE" in line


@pytest.mark.usefixtures("nothing_left")
def test_a_folder_without_a_model_is_refused(settings: Settings, tmp_path: Path) -> None:
    assert str(tmp_path) in complaint(command(settings, "--model", str(tmp_path)), 1)


@pytest.mark.usefixtures("nothing_left")
def test_a_base_without_weights_is_refused_before_training(
    settings: Settings, tmp_path: Path, tiny_base: Path
) -> None:
    """The server needs no weights, so only the sites can notice."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    (folder / "model.safetensors").unlink()
    line = complaint(command(settings, "--model", str(folder)), 1)
    assert "base model" in line
    assert str(folder) in line


@pytest.mark.usefixtures("nothing_left")
def test_a_target_module_that_matches_nothing_is_answered_with_those_there_are(
    settings: Settings,
) -> None:
    line = complaint(command({**settings, "model.lora.target-modules": "q_proj,qkv_proj"}), 1)
    assert "'qkv_proj'" in line
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in line


@pytest.mark.usefixtures("nothing_left")
def test_a_chat_template_that_the_tokenizer_lacks_is_refused(settings: Settings) -> None:
    line = complaint(command({**settings, "data.prompt-template": "chat"}), 2)
    assert "chat template" in line
    assert "data.prompt-template" in line
    assert "Flower's code" not in line


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.quantization": 4}, "model.quantization = 4 needs bitsandbytes"),
        ({"model.quantization": 8}, "model.quantization = 8 needs bitsandbytes"),
        ({"train.optimizer": "adamw_8bit"}, 'train.optimizer = "adamw_8bit" needs bitsandbytes'),
    ],
)
def test_without_bitsandbytes_what_needs_it_is_refused_before_training(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, changes: Settings, words: str
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    line = complaint(command({**settings, **changes}), 1)
    assert words in line
    assert "Install it" in line


def test_a_run_that_needs_no_bitsandbytes_works_without_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version

    def lacking(name: str) -> str:
        if name == "bitsandbytes":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", lacking)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = command(settings)
    assert (result.exit_code, result.stderr) == (0, ""), result.exception


# --- The run directory ----------------------------------------------------------------------------


def test_a_run_directory_below_a_file_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    line = complaint(command({**settings, "run-directory": str(tmp_path / "file" / "run")}), 1)
    assert str(tmp_path / "file" / "run") in line
    assert "Not a directory" in line
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_run_directory_without_permission_is_refused(settings: Settings, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    line = complaint(command({**settings, "run-directory": str(locked / "run")}), 1)
    assert "Permission denied" in line


@pytest.mark.parametrize("name", ["thesis.txt", ".hidden"])
def test_a_run_directory_with_something_in_it_is_refused_and_left_alone(
    settings: Settings, name: str
) -> None:
    run = Path(settings["run-directory"])
    run.mkdir()
    (run / name).write_text("kept")
    line = complaint(command(settings), 1)
    assert f"{run} exists and is not an empty folder" in line
    assert [f.name for f in run.iterdir()] == [name]


def test_a_file_in_the_place_of_the_run_directory_is_refused(settings: Settings) -> None:
    run = Path(settings["run-directory"])
    run.write_text("kept")
    assert "is not an empty folder" in complaint(command(settings), 1)
    assert run.read_text() == "kept"


def test_an_empty_run_directory_is_used(settings: Settings) -> None:
    Path(settings["run-directory"]).mkdir()
    result = command(settings)
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_completed_run_is_neither_resumed_nor_overwritten(settings: Settings) -> None:
    run = Path(settings["run-directory"])
    assert command(settings).exit_code == 0
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    assert "exists and is not an empty folder" in complaint(command(settings), 1)
    line = complaint(CliRunner().invoke(app, ["run", "--resume", str(run)]), 1)
    assert "completed run of 3 rounds; there is nothing to resume" in line
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before


def test_a_resume_of_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        line = complaint(CliRunner().invoke(app, ["run", "--resume", str(folder)]), 1)
        assert f"{folder} is not a run directory" in line
    assert not (tmp_path / "nowhere").exists()


def test_a_resume_with_another_run_directory_is_refused(tmp_path: Path) -> None:
    arguments = ["run", "--resume", str(tmp_path), "--run-dir", str(tmp_path / "other")]
    assert "leave --run-dir out" in complaint(CliRunner().invoke(app, arguments), 2)


def test_a_round_to_go_back_to_belongs_to_a_resume() -> None:
    line = complaint(CliRunner().invoke(app, ["run", "--from-round", "3"]), 2)
    assert "--from-round belongs to --resume DIR" in line


def test_a_resume_with_another_configuration_names_the_keys(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stopping_after(2, monkeypatch):
        assert command({**settings, "seed": 4}).exit_code == cli.INTERRUPTED
    run, changes = settings["run-directory"], ["--set", "seed=5", "--sites", "5"]
    line = complaint(CliRunner().invoke(app, ["run", "--resume", run, *changes]), 1)
    assert "data.num-partitions: 4 → 5" in line
    assert "seed: 4 → 5" in line
    assert line.count("→") == 2


# --- A full disk ----------------------------------------------------------------------------------


def wrapped_reporter(before: Callable[[str, Mapping[str, Any]], None]) -> Any:
    """Return a `run.reporter` whose display calls `before` at each event."""
    make = run_command.reporter

    def wrapped(config: Any, screen: Any) -> Any:
        return Telling(before, make(config, screen))

    return wrapped


class stopping_after:  # noqa: N801
    """Press Ctrl-C after the round with a number."""

    def __init__(self, round_number: int, patch: pytest.MonkeyPatch) -> None:
        self._patch, self._round = patch, round_number

    def __enter__(self) -> None:
        def stop(event: str, data: Mapping[str, Any]) -> None:
            if event == "round" and data["round"] == self._round:
                raise KeyboardInterrupt

        self._patch.setattr(run_command, "reporter", wrapped_reporter(stop))

    def __exit__(self, *error: object) -> None:
        self._patch.undo()


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "place",
    [
        *("Path.replace", "fsync"),
        *(
            pytest.param(f"Path.{name}", marks=pytest.mark.slow)
            for name in ("rename", "mkdir", "write_text", "open")
        ),
    ],
)
def test_on_a_full_disk_finished_rounds_are_kept_and_the_run_can_be_resumed(
    settings: Settings, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full from the end of round 2 on."""
    owner: Any = Path if place.startswith("Path.") else os
    name = place.removeprefix("Path.")
    working = getattr(owner, name)

    def fill_disk(event: str, data: Mapping[str, Any]) -> None:
        if event != "round" or data["round"] != 2:
            return

        def fail(*args: Any, **kwargs: Any) -> Any:
            reads = name == "open" and (args[1:] or (kwargs.get("mode", "r"),))[0] in ("r", "rb")
            if reads:
                return working(*args, **kwargs)
            raise full()

        monkeypatch.setattr(owner, name, fail)

    monkeypatch.setattr(run_command, "reporter", wrapped_reporter(fill_disk))
    result = command(settings)
    monkeypatch.undo()
    run = settings["run-directory"]
    line = complaint(result, 1)
    assert "No space left on device" in line
    assert f"grandrounds run --resume {run}" in line
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines][:3] == [0, 1, 2]
    assert (Path(run) / "peft_2" / "adapter_model.safetensors").is_file()
    resumed = CliRunner().invoke(app, ["run", "--resume", run])
    assert (resumed.exit_code, resumed.stderr) == (0, "")
    assert json.loads((Path(run) / "summary.json").read_text())["status"] == "completed"


def test_a_limit_on_file_length_that_the_weights_exceed_is_told_as_an_unwritable_directory(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are written by safetensors' own code, which has errors of its own.

    The operating system refuses to write beyond the limit, as it does on a full disk.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(event: str, data: Mapping[str, Any]) -> None:
        if event == "round" and data["round"] == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))

    monkeypatch.setattr(run_command, "reporter", wrapped_reporter(limit))
    try:
        result = command(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    line = complaint(result, 1)
    assert settings["run-directory"] in line
    assert "--resume" in line


def test_on_a_disk_that_is_full_from_the_start_nothing_is_left(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise full()

    for write in ("write_text", "write_bytes"):
        monkeypatch.setattr(Path, write, fail)
    line = complaint(command(settings), 1)
    monkeypatch.undo()
    assert "No space left on device" in line
    assert not Path(settings["run-directory"]).exists()
    assert "--resume" not in line  # there is nothing to resume


@pytest.mark.usefixtures("nothing_left")
def test_sites_too_small_to_hold_anything_out_are_told_before_training(
    settings: Settings, tmp_path: Path
) -> None:
    cards = tmp_path / "few.jsonl"
    cards.write_text("".join(f'{{"input": "Why {i}?", "output": "So."}}\n' for i in range(4)))
    line = complaint(command({**settings, "static.dataset.name": str(cards)}), 1)
    assert "has held-out examples" in line
    assert "strategy.fraction-evaluate = 0" in line
