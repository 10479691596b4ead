"""Every file of a run directory, damaged in every way: a resume has the same bits, or is refused.

One run is played and stopped after its last round; each damage is done to a copy of it. A resume
goes on from what `check` and `prepare` read and leave, so that most damages need no training.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grandrounds.api.asked import resolved_run
from grandrounds.cli import app
from grandrounds.config.recipes import load_recipe
from grandrounds.errors import GrandRoundsError, RunDirectoryError
from grandrounds.server import resumption, states
from grandrounds.server.directory import find_checkpoint
from grandrounds.server.resumption import WRITTEN
from tests.runs import (
    Settings,
    adapter_bytes,
    copy_of,
    interrupted_at,
    metrics_of,
    play,
    summary_of,
)

# --- One run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(federation: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped after round 4 of 4, before its summary; it has checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    settings = {
        **federation,
        "num-server-rounds": 4,
        "strategy.name": "fedadam",  # whose moments are in the state
        "train.training-arguments.max-steps": 1,
    }
    with pytest.raises(KeyboardInterrupt):
        play(settings, listener=interrupted_at("round", 5), **{"run-directory": str(folder)})
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return shutil.copytree(stopped, tmp_path / "run")


def resumed(run: Path, from_round: int | None = None) -> list[str]:
    """Make a run ready to go on, as the command does; return what is told."""
    config = resolved_run(None, None, run, None, {})
    told = resumption.check(config, from_round)
    resumption.prepare(config, from_round)
    return told


def content(run: Path) -> dict[str, bytes]:
    """Return file → content; of a link, where it leads. What was set aside is left out."""
    return {
        str(file.relative_to(run)): b"-> " + bytes(file.readlink())
        if file.is_symlink()
        else file.read_bytes()
        for file in sorted(run.rglob("*"))
        if file.is_file() and "aside-1" not in file.parts
    }


def command(*arguments: object) -> tuple[int, str]:
    """Return exit code and standard error of a command, which must end without a traceback."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stderr


# --- What is kept ---------------------------------------------------------------------------------


def test_the_last_two_states_and_those_of_checkpoints_are_kept(stopped: Path) -> None:
    kept = {f.name: {one.name for one in f.iterdir()} for f in states.folders(stopped)}
    whole = {"SHA256SUMS", "adapter.safetensors", "rule.safetensors", "state.json", *states.COPIES}
    assert kept == {
        "round-000002": whole - {"adapter.safetensors"},  # which its checkpoint has
        "round-000003": whole,
        "round-000004": whole,
    }
    sums = (stopped / "state" / "round-000004" / "SHA256SUMS").read_text()
    assert {line.split("  ")[1] for line in sums.splitlines()} == {
        *(whole - {"SHA256SUMS"}),
        "../../peft_4/adapter_model.safetensors",
        "../../peft_4/adapter_config.json",
    }


def test_an_undamaged_run_is_resumed_without_a_word(run: Path) -> None:
    before = content(run)
    assert resumed(run) == []
    del before["summary.json"]
    assert content(run) == before


# --- All files, all damages -----------------------------------------------------------------------


def shortened(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def with_nul_tail(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))


def flipped(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    before = FIGURES.get(file.name, b"")
    place = whole.rfind(before) + len(before) if before else len(whole) * 2 // 3
    whole[place] ^= 1
    file.write_bytes(whole)


FIGURES = {
    "config.toml": b'"seed" = ',
    "metrics.jsonl": b'"communication-mib": ',
    "sites.json": b'"train-examples": ',
    "ledger.json": b'"tensor_bytes": ',
    "summary.json": b'"rounds": ',
}
"""File → what stands before a digit whose last bit is flipped, so that the file can be read."""


def of_another_type(file: Path) -> None:
    whole = file.read_bytes().lstrip()
    file.write_bytes(b"{}\n" if whole.startswith(b"[") else b"[3]\n")


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_link(file: Path) -> None:
    elsewhere = Path(os.environ["ELSEWHERE"]) / file.name
    shutil.copyfile(file, elsewhere)
    file.unlink()
    file.symlink_to(elsewhere)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "shortened": shortened,
    "NUL tail": with_nul_tail,
    "all NUL": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "a flipped bit": flipped,
    "not UTF-8": lambda file: file.write_bytes(b"\xff\xfe" + file.read_bytes()),
    "another type": of_another_type,
    "too deep": lambda file: file.write_bytes(b"[" * 100_000),
    "null": lambda file: file.write_bytes(b"null\n"),
    "a folder": a_folder,
    "a link": a_link,
}

LAST, BEFORE, OLD = (f"state/round-00000{number}" for number in (4, 3, 2))
OF_A_STATE = ("state.json", "adapter.safetensors", "rule.safetensors", "SHA256SUMS", *states.COPIES)

EXPECTED: dict[str, str] = {
    "config.toml": "refused",
    **dict.fromkeys(("metrics.jsonl", "sites.json", "ledger.json", "summary.json"), "mended"),
    **{f"{LAST}/{name}": "the round before" for name in OF_A_STATE},
    "peft_2/adapter_model.safetensors": "told",
    "peft_2/adapter_config.json": "told",
    "peft_4/adapter_model.safetensors": "told",
    "peft_4/adapter_config.json": "told",
    # each resume writes these anew
    **dict.fromkeys(("plan.json", "environment.json", "packages.json"), "unread"),
}
"""File → what a resume makes of any damage to it."""

UNREAD = [
    *("peft_2/README.md", "peft_4/README.md"),
    *(f"{BEFORE}/{name}" for name in OF_A_STATE),
    *(f"{OLD}/{name}" for name in OF_A_STATE if name not in ("adapter.safetensors", "SHA256SUMS")),
]
"""Files that this resume has no use for; they are damaged all at once."""

BESIDES = {
    ("summary.json", "missing"): "unread",  # a killed run has none
    ("ledger.json", "missing"): "unread",  # a run killed in its first round has none
    # a kill leaves these two with what was before the state
    ("summary.json", "a flipped bit"): "unread",
    ("ledger.json", "a flipped bit"): "unread",
    (f"{LAST}/adapter.safetensors", "missing"): "unread",  # its checkpoint has it too
    **{(name, damage): "refused" for name in WRITTEN for damage in ("a folder", "a link")},
}


def outcome(run: Path, name: str, whole: dict[str, bytes], back: dict[str, bytes]) -> str:
    """Return what a resume makes of a damaged file.

    Parameters
    ----------
    whole, back
        Content of an undamaged run that was made ready to go on, after its last round and after
        the one before.
    """
    before = content(run)
    try:
        told = resumed(run)
    except GrandRoundsError as error:
        in_one_line = name in str(error) and "\n" not in str(error)
        return "refused" if in_one_line and content(run) == before else f"refused: {error}"
    after = content(run)
    if told and not (len(told) == 1 and Path(name).name in told[0] and "\n" not in told[0]):
        return f"told otherwise: {told}"
    if after == back:
        return "the round before" if told else "the round before, in silence"
    if after == whole and told:
        return "mended"
    for files in (after, whole := dict(whole)):
        files.pop(name, None)
    if after == whole:
        return "told" if told else "unread"
    return f"another run: {[f for f in after | whole if after.get(f) != whole.get(f)]}, {told}"


def test_every_file_of_a_run_is_in_the_table(stopped: Path) -> None:
    files = {*EXPECTED, *UNREAD, f"{OLD}/SHA256SUMS"}  # without which nothing is told of peft_2
    assert files == set(content(stopped))


QUICK = ("missing", "shortened", "a flipped bit", "a link")
"""Damages that the default test run makes; CI makes the others too."""


@pytest.mark.parametrize(
    "damage", [d if d in QUICK else pytest.param(d, marks=pytest.mark.slow) for d in DAMAGES]
)
@pytest.mark.slow
def test_a_damaged_run_goes_on_with_the_same_bits_or_is_refused_in_one_line(
    stopped: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("ELSEWHERE", str(tmp_path / "elsewhere"))
    ready = {}
    for number in (4, 3):
        run = shutil.copytree(stopped, tmp_path / str(number))
        resumed(run, number)
        ready[number] = content(run)
    found = {}
    for name in EXPECTED:
        run = shutil.copytree(stopped, tmp_path / name.replace("/", "-"))
        DAMAGES[damage](run / name)
        found[name] = outcome(run, name, ready[4], ready[3])
    run = shutil.copytree(stopped, tmp_path / "unread")
    for name in UNREAD:
        DAMAGES[damage](run / name)
    assert resumed(run) == []
    assert content(run) | {name: ready[4][name] for name in UNREAD} == ready[4]
    assert found == {name: BESIDES.get((name, damage), EXPECTED[name]) for name in EXPECTED}


def test_a_damaged_state_of_an_earlier_version_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a run has one state, without checksums: tensors of other values cannot be told."""
    monkeypatch.setenv("ELSEWHERE", str(tmp_path))
    for name in ("state.json", "adapter.safetensors"):
        for damage in DAMAGES.keys() - {"a flipped bit", "NUL tail" * (name != "state.json")}:
            run = copy_of("plain", tmp_path / damage / name)
            DAMAGES[damage](run / "state" / "round-000002" / name)
            with pytest.raises(RunDirectoryError, match=r"round-000002 .*from a copy") as raised:
                resumed(run)
            assert "\n" not in str(raised.value)


def without_state(run: Path) -> None:
    shutil.rmtree(run / "state")


def with_a_linked_state(run: Path) -> None:
    (run / "state").rename(run.parent / "state")
    (run / "state").symlink_to(run.parent / "state")


def with_two_damaged_states(run: Path) -> None:
    for folder in (LAST, BEFORE):
        flipped(run / folder / "adapter.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_state, "state is missing or empty, though the run has finished rounds"),
        (with_a_linked_state, "state is a link, not the folder that a run writes"),
        (with_two_damaged_states, "after rounds 2: grandrounds run --resume .* --from-round 2"),
    ],
)
def test_a_run_without_a_usable_state_is_refused_and_not_begun_again(
    run: Path, damage: Callable[[Path], object], words: str
) -> None:
    """Without `state/`, training began again at round 1 and metrics read 0,1,2,3,4,1,2."""
    damage(run)
    before = content(run)
    code, said = command("run", "--resume", run)
    assert code == 1
    assert re.search(words, said)
    assert said.count("\n") == 1
    assert content(run) == before


# --- Trained again --------------------------------------------------------------------------------


def test_a_run_whose_last_state_is_damaged_ends_with_the_same_bits(
    stopped: Path, run: Path
) -> None:
    flipped(run / LAST / "adapter.safetensors")
    play(load_recipe(run / "config.toml"), **{"resume-from": str(run)})
    assert adapter_bytes(run, "peft_4") == adapter_bytes(stopped, "peft_4")
    assert [m["round"] for m in metrics_of(run)] == [0, 1, 2, 3, 4]
    assert [f.name for f in states.folders(run)] == ["round-000002", "round-000003", "round-000004"]
    kept = {f.name for f in (run / "aside-1").iterdir()}
    assert kept == {"round-000004", "peft_4", "metrics.jsonl", "summary.json"}


def test_a_run_goes_back_to_a_checkpoint_and_ends_with_the_same_bits(
    stopped: Path, run: Path
) -> None:
    """A completed one too. The state of round 2 has the rule's moments; its adapter is peft_2's."""
    code, said = command("run", "--resume", run, "--from-round", 1)
    assert (code, "after rounds 2, 3, 4: " in said) == (1, True)
    play(load_recipe(run / "config.toml"), **{"resume-from": str(run)})
    assert command("run", "--resume", run)[0] == 1  # completed
    assert command("run", "--resume", run, "--from-round", 2) == (0, "")
    assert summary_of(run)["status"] == "completed"
    assert adapter_bytes(run, "peft_4") == adapter_bytes(stopped, "peft_4")
    assert [m["round"] for m in metrics_of(run)] == [0, 1, 2, 3, 4]
    assert (run / "aside-1" / "peft_4").is_dir()


def test_a_run_killed_before_its_first_state_is_resumed_twice(run: Path) -> None:
    """Its states had an empty copy of config.toml, so that the second resume was refused."""
    recipe = (run / "config.toml").read_bytes()
    shutil.rmtree(run)
    run.mkdir()
    (run / "config.toml").write_bytes(recipe)
    with pytest.raises(KeyboardInterrupt):
        play(
            load_recipe(run / "config.toml"),
            listener=interrupted_at("round"),
            **{"resume-from": str(run)},
        )
    assert (run / "state" / "round-000000" / "config.toml").read_bytes() == recipe
    assert resumed(run) == []


def test_a_damaged_checkpoint_is_not_used(run: Path) -> None:
    play(load_recipe(run / "config.toml"), **{"resume-from": str(run)})
    flipped(run / "peft_4" / "adapter_model.safetensors")
    with pytest.raises(RunDirectoryError, match=r"peft_4/adapter_model\.safetensors has another"):
        find_checkpoint(run)
    assert find_checkpoint(run, "2").round == 2
