"""A run that was interrupted, killed or failed resumes to the same bits as one that was not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from flwr.app import Context, Message, MessageType

from grandrounds.config import recipes
from grandrounds.errors import RoundError, RunDirectoryError
from grandrounds.server import resumption
from grandrounds.server.directory import RunDirectory
from tests.runs import (
    GOOD_SITES,
    Settings,
    interrupted_at,
    metrics_of,
    options,
    play,
    read_json,
    summary_of,
    unfinished_of,
)

FAILED = ("failed", "evaluate-failed", "formulary-failed")


def without_seconds(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if "seconds" not in name}


def counted_apart(run: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of metrics.jsonl in tensor bytes that leave out rounds that did not finish."""
    lost = [line for line in unfinished_of(run) if (line["after-round"] or 0) < record["round"]]
    sent = {
        f"communication-{way}mib": sum(
            traffic["tensor_bytes"]
            for line in lost
            for kind, traffic in line["totals"].items()
            if kind.endswith(way.rstrip("-"))
        )
        for way in ("", "up-")
    }
    apart = {key: round(record[key] * 2**20) - lost for key, lost in sent.items()}
    return without_seconds(record) | apart


def card_of(run: Path, record: Mapping[str, Any]) -> str:
    """Return the card of a round's checkpoint without what counts unfinished rounds.

    The communication is the record's.
    """
    card = (run / record["checkpoint"] / "README.md").read_text()
    sent = f"{record['communication-mib']:,.2f}"
    assert f"| communication so far | {sent} MiB" in card
    before = [line for line in unfinished_of(run) if (line["after-round"] or 0) < record["round"]]
    finished = [line for line in metrics_of(run) if line["round"] <= record["round"]]
    count = sum(len(line.get(kind, ())) for line in (*before, *finished) for kind in FAILED)
    failed = f"failed replies so far | {count}"
    assert failed in card
    return card.replace(sent, "").replace(failed, "")


def outcome(run: Path) -> dict[str, Any]:
    """Return the contents of a run directory that must not depend on interruptions.

    What rounds that did not finish sent is taken out of the figures that count it.
    """
    lost, summary = unfinished_of(run), without_seconds(summary_of(run))
    for per_process in ("base_loads", "processes"):
        del summary[per_process]
    ledger = read_json(run / "ledger.json")
    assert summary.pop("communication_mib") == ledger["communication_mib"]
    totals = {kind: Counter(traffic) for kind, traffic in ledger["totals"].items()}
    for line in lost:
        for kind, traffic in line["totals"].items():
            totals[kind].subtract(traffic)
        summary["failed_replies"] -= sum(len(line.get(k, ())) for k in FAILED)
    state = max((run / "state").glob("round-*"))  # a kill may leave the one before it behind
    return {
        "adapters": {
            f.parent.name: f.read_bytes() for f in run.glob("peft_*/adapter_model.safetensors")
        },
        "cards": {
            f"peft_{record['round']}": card_of(run, record)
            for record in metrics_of(run)
            if "checkpoint" in record
        },
        "metrics": [counted_apart(run, record) for record in metrics_of(run)],
        "ledger": totals,
        "summary": summary,
        "state": (state.name, (state / "adapter.safetensors").read_bytes()),
        "partial": [f.name for f in run.rglob(".*")],
    }


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """A federation in which every site is visited before and after an interruption."""
    return {
        **settings,
        "seed": 2026,
        "num-server-rounds": 4,
        "strategy.fraction-train": 0.75,
        "train.training-arguments.max-steps": 1,
    }


@pytest.fixture(scope="module")
def memory() -> dict[str, dict[str, Any]]:
    """Outcomes of uninterrupted runs, cached for this module."""
    return {}


@pytest.fixture
def whole(settings: Settings, tmp_path: Path, memory: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The outcome of the uninterrupted run."""
    if "whole" not in memory:
        play(settings, **{"run-directory": str(tmp_path / "whole")})
        memory["whole"] = outcome(tmp_path / "whole")
    return memory["whole"]


def resume(settings: Settings) -> Path:
    """Resume in this process with fresh site state, as after a restart; return the directory."""
    run = settings["run-directory"]
    play(settings, **{"resume-from": run})
    return Path(run)


@pytest.mark.parametrize(
    ("event", "count", "finished"),
    [
        ("round", 1, 0),
        ("round", 2, 1),
        ("round", 5, 4),
        ("reply", 1, 0),
        ("reply", 5, 1),
        ("reply", 10, 3),
        ("checkpoint", 1, 1),
        ("checkpoint", 2, 3),
    ],
)
def test_an_interrupted_run_resumes_to_the_bit(
    settings: Settings, whole: dict[str, Any], event: str, count: int, finished: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        play(settings, listener=interrupted_at(event, count))
    run = Path(settings["run-directory"])
    assert summary_of(run)["status"] == "stopped"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == finished + 1
    assert outcome(resume(settings)) == whole


def test_a_run_interrupted_after_its_summary_stays_completed(
    settings: Settings, whole: dict[str, Any]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        play(settings, listener=interrupted_at("finished", 1))
    run = Path(settings["run-directory"])
    assert summary_of(run)["status"] == "completed"
    assert outcome(run) == whole


def test_the_summary_of_a_stopped_run_counts_finished_rounds_only(settings: Settings) -> None:
    with pytest.raises(KeyboardInterrupt):
        play(settings, listener=interrupted_at("checkpoint", 2))
    run = Path(settings["run-directory"])
    summary = summary_of(run)
    assert summary["rounds"] == len((run / "metrics.jsonl").read_text().splitlines()) - 1 == 3
    # what the summary says was sent is what the last finished round says, or more: never less
    assert summary["communication_mib"] >= metrics_of(run)[-1]["communication-mib"]


def test_a_run_interrupted_in_every_round_resumes_to_the_bit(
    settings: Settings, whole: dict[str, Any]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        play(settings, listener=interrupted_at("reply", 2))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            play(
                settings,
                listener=interrupted_at("reply", 5),
                **{"resume-from": settings["run-directory"]},
            )
    assert outcome(resume(settings)) == whole


def test_a_run_interrupted_before_anything_was_measured_leaves_no_directory(
    settings: Settings,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        play(settings, listener=interrupted_at("roll-call", 1))
    assert not Path(settings["run-directory"]).exists()


def test_a_run_that_failed_twice_resumes_to_the_bit_and_counts_what_it_sent(
    settings: Settings, whole: dict[str, Any]
) -> None:
    def sites(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN and (
            message.content.config_records["config"]["round"] == 3
        ):
            raise RuntimeError("no power")
        return GOOD_SITES(message, context)

    run, sent = Path(settings["run-directory"]), [0.0]
    for again in ({}, {"resume-from": settings["run-directory"]}):
        with pytest.raises(RoundError):
            play(settings, sites, **again)
        summary, ledger = summary_of(run), read_json(run / "ledger.json")
        sent.append(summary["communication_mib"])
        assert (summary["status"], summary["failed_replies"]) == ("failed", 3 * (len(sent) - 1))
        assert ledger["communication_mib"] == sent[-1] > sent[-2]
    first, second = unfinished_of(run)
    assert first["after-round"] == second["after-round"] == 2
    assert first["cohort"] == [int(site) for site in first["failed"]]
    assert all(why.endswith("RuntimeError: no power") for why in first["failed"].values())
    assert second["communication-mib"] == sent[2] - sent[1] > 0
    assert metrics_of(run)[-1]["communication-mib"] == sent[1] - first["communication-mib"]
    assert outcome(resume(settings)) == whole
    assert summary_of(run)["failed_replies"] == 6


# --- Killed at every write ------------------------------------------------------------------------


class Killed(BaseException):
    """Stands in for SIGKILL: no handler in the package catches it."""


class Killer:
    """Wraps functions so that the `fatal`-th call across all of them raises instead."""

    def __init__(self, fatal: int = -1) -> None:
        self.calls = 0
        self._fatal = fatal

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self._fatal:
                raise Killed
            return function(*args, **kwargs)

        return call

    def install(self, patch: pytest.MonkeyPatch, *places: tuple[Any, str]) -> None:
        for owner, name in places:
            patch.setattr(owner, name, self.wrap(getattr(owner, name)))


METHODS = tuple(
    (RunDirectory, name)
    for name in ("write_json", "append_metrics", "save_checkpoint", "save_state")
)
SYSTEM_CALLS = ((os, "fsync"), (shutil, "rmtree"), (Path, "rename"), (Path, "replace"))


def killed_and_resumed(
    settings: Settings, run: Path, places: tuple[tuple[Any, str], ...], fatal: int
) -> bool:
    """Kill a run before the `fatal`-th call and resume it; return False if it has fewer calls.

    A run whose summary was in place already is complete, though not yet flushed.
    """
    killer = Killer(fatal)
    with pytest.MonkeyPatch.context() as patch:
        killer.install(patch, *places)
        try:
            play(settings, **{"run-directory": str(run)})
        except Killed:
            pass
        else:
            return False
    if not (run / "config.toml").is_file():
        with pytest.raises(RunDirectoryError, match="is not a run directory"):
            RunDirectory.open(run)
        shutil.rmtree(run, ignore_errors=True)  # a run that cannot begin leaves nothing
        play(settings, **{"run-directory": str(run)})
    elif not (run / "summary.json").is_file():
        play(settings, **{"run-directory": str(run), "resume-from": str(run)})
    return True


def numbered(start: int, step: int = 1) -> Iterator[int]:
    while True:
        yield start
        start += step


@pytest.mark.slow
def test_a_run_killed_between_any_two_writes_resumes_to_the_bit(
    settings: Settings, tmp_path: Path
) -> None:
    settings = {**settings, "num-server-rounds": 2, "train.save-every-round": 1}
    play(settings, **{"run-directory": str(tmp_path / "whole")})
    expected = outcome(tmp_path / "whole")
    for fatal in numbered(1):
        run = tmp_path / f"killed-{fatal}"
        if not killed_and_resumed(settings, run, METHODS, fatal):
            break
        assert outcome(run) == expected, f"killed before write {fatal}"
    # environment, plan, sites; per round state, metrics, ledger, twice a checkpoint; summary
    assert fatal > 3 + 3 * 3 + 2 + 1


@pytest.mark.slow
def test_a_run_killed_before_any_system_call_of_a_write_resumes_to_the_bit(
    settings: Settings, tmp_path: Path
) -> None:
    settings = {**settings, "num-server-rounds": 2, "train.save-every-round": 1}
    play(settings, **{"run-directory": str(tmp_path / "whole")})
    expected = outcome(tmp_path / "whole")
    for fatal in numbered(1, 2):  # a file is flushed, renamed and its folder flushed: all of these
        run = tmp_path / f"killed-{fatal}"
        if not killed_and_resumed(settings, run, SYSTEM_CALLS, fatal):
            break
        assert outcome(run) == expected, f"killed before system call {fatal}"
    assert fatal > 80


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["a finished round", "a checkpoint", "a while", "a long while"])
def test_a_killed_process_resumes_to_the_bit(
    settings: Settings, tmp_path: Path, memory: dict[str, dict[str, Any]], moment: str
) -> None:
    """SIGKILL to the real command, at a moment that varies with the load of the machine. Once the
    command resumes it too, else this process does."""
    settings = {**settings, "num-server-rounds": 30, "train.save-every-round": 4}
    if "thirty rounds" not in memory:
        whole = tmp_path / "whole"
        play(settings, **{"run-directory": str(whole)})
        memory["thirty rounds"] = outcome(whole)
    run = Path(settings["run-directory"])
    command = [sys.executable, "-m", "grandrounds"]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            [*command, "run", *options(settings)], stdout=output, stderr=output
        )
        try:
            wait_for(moment, run, process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL, (tmp_path / "output").read_text()
    assert not (run / "summary.json").exists()
    if moment == "a checkpoint":
        resumed = subprocess.run(
            [*command, "run", "--resume", str(run)], capture_output=True, text=True, check=False
        )
        assert (resumed.returncode, resumed.stderr) == (0, "")
        assert summary_of(run)["base_loads"] in (1, 2)
    else:
        play(recipes.load_recipe(run / "config.toml"), **{"resume-from": str(run)})
    assert outcome(run) == memory["thirty rounds"]


def wait_for(moment: str, run: Path, process: subprocess.Popen[bytes]) -> None:
    """Block until the run has started and reached the given moment."""
    metrics = run / "metrics.jsonl"
    ready: dict[str, Callable[[], bool]] = {
        "a finished round": lambda: metrics.read_text().count("\n") >= 6,
        "a checkpoint": lambda: (run / "peft_8").exists(),
        "a while": lambda: True,
        "a long while": lambda: True,
    }
    while not (metrics.exists() and ready[moment]()):
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.002)
    longest = {"a while": 0.3, "a long while": 1.2}.get(moment, 0.0)
    time.sleep(random.Random(moment).uniform(longest / 2, longest))


# --- What cannot be resumed -----------------------------------------------------------------------


@pytest.fixture
def stopped(settings: Settings) -> Settings:
    """The settings of a run that was stopped after round 1."""
    with pytest.raises(KeyboardInterrupt):
        play(settings, listener=interrupted_at("round", 2))
    return settings


def test_a_completed_run_is_not_resumed(settings: Settings, whole: dict[str, Any]) -> None:
    play(settings)
    run = Path(settings["run-directory"])
    before = outcome(run)
    with pytest.raises(RunDirectoryError, match="completed run of 4 rounds; there is nothing"):
        resume(settings)
    assert outcome(run) == before == whole


def test_a_run_is_not_resumed_while_another_process_writes_it(stopped: Settings) -> None:
    """The first process may still be alive when only its SuperLink or terminal died."""
    first = RunDirectory(Path(stopped["run-directory"]))
    first.hold()
    with pytest.raises(RunDirectoryError, match="in use by a run that has not ended"):
        resume(stopped)
    first.release()
    resume(stopped)
    assert not (first.path / ".lock").exists()


def test_a_serverapp_that_is_about_to_end_is_waited_for(stopped: Settings) -> None:
    """A run resumed after its SuperLink was killed met the lock of the ServerApp before it."""
    run = str(stopped["run-directory"])
    first = FileLock(f"{run}/.lock", thread_local=False)
    first.acquire()
    ends = threading.Timer(0.3, first.release)
    ends.start()
    config = recipes.resolve({**stopped, "resume-from": run})
    assert resumption.check(config, patience_seconds=30) == []
    ends.join()


def test_a_folder_without_a_run_is_not_resumed(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"no config\.toml"):
        play(settings, **{"resume-from": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num-server-rounds", 9, "num-server-rounds: 4 → 9"),
        ("seed", 1, "seed: 2026 → 1"),
        ("train.learning-rate-max", 0.001, "train.learning-rate-max: 0.003 → 0.001"),
        ("model.lora.peft-lora-r", 8, "model.lora.peft-lora-r: 4 → 8"),
    ],
)
def test_another_configuration_is_refused_by_the_name_of_its_key(
    stopped: Settings, key: str, value: Any, words: str
) -> None:
    run = Path(stopped["run-directory"])
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    with pytest.raises(RunDirectoryError) as raised:
        resume({**stopped, key: value})
    assert words in str(raised.value)
    assert "→" in str(raised.value)
    assert str(raised.value).count("→") == 1
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before


def test_a_half_written_line_of_metrics_is_dropped(
    stopped: Settings, whole: dict[str, Any]
) -> None:
    run = Path(stopped["run-directory"])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "learning-r')
    assert [m["round"] for m in RunDirectory.open(run).read_metrics()] == [0, 1]
    assert outcome(resume(stopped)) == whole


def test_files_written_after_the_last_saved_state_are_dropped(
    stopped: Settings, whole: dict[str, Any]
) -> None:
    run = Path(stopped["run-directory"])
    shutil.copytree(run, run / "peft_7")
    (run / ".peft_2.partial").mkdir()
    (run / ".peft_2.partial" / "adapter_model.safetensors").write_bytes(b"half")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "train-loss": 0.0}\n')
    assert outcome(resume(stopped)) == whole


CHANGES: dict[str, Callable[[list[str]], list[str]]] = {
    "fewer rows": lambda lines: lines[:100],
    "another answer": lambda lines: [*lines[:-1], lines[-1].replace("Rest", "Walk")],
    "another order": lambda lines: [lines[1], lines[0], *lines[2:]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_with_different_data_is_refused(stopped: Settings, change: str) -> None:
    """Judged by counts, a replaced answer or another order was trained on in silence."""
    source = Path(stopped["static.dataset.name"])
    kept = source.read_text()
    try:
        source.write_text("".join(line + "\n" for line in CHANGES[change](kept.splitlines())))
        with pytest.raises(RunDirectoryError, match="has changed since the run started"):
            resume(stopped)
    finally:
        source.write_text(kept)


def test_a_visit_whose_reply_was_unusable_is_repeated_even_after_a_resume(
    settings: Settings, tmp_path: Path
) -> None:
    """Site 1 replies with NaN in round 1. It repeats those examples at its next visit, and a run
    stopped after round 1 ends like an uninterrupted one."""
    import numpy as np
    from flwr.app import Array

    def sites(message: Message, context: Context) -> Message:
        reply = GOOD_SITES(message, context)
        round_number = dict(message.content.config_records.get("config", {})).get("round")
        is_train = message.metadata.message_type == "train"
        if is_train and round_number == 1 and context.node_config["partition-id"] == 1:
            arrays = reply.content.array_records["arrays"]
            name = next(iter(arrays))
            arrays[name] = Array(np.full_like(arrays[name].numpy(), np.nan))
        return reply

    settings = {**settings, "strategy.fraction-train": 1.0, "num-server-rounds": 3}
    play(settings, sites, **{"run-directory": str(tmp_path / "whole")})
    with pytest.raises(KeyboardInterrupt):
        play(settings, sites, interrupted_at("round", 2))
    play(settings, sites, **{"resume-from": settings["run-directory"]})
    run = Path(settings["run-directory"])
    assert outcome(run) == outcome(tmp_path / "whole")
    lines = metrics_of(run)
    assert list(lines[1]["failed"]) == ["1"]
    # two used visits of the same length as the others' three: a third less covered
    assert lines[3]["site-coverage"]["1"] == pytest.approx(lines[2]["site-coverage"]["0"])
