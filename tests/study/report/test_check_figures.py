"""`scripts/check_figures` explains every number of pages, cards and trackers, and finds errors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config.recipes import load_recipe, resolve
from grandrounds.errors import RoundError
from grandrounds.server.guarantees import AUDIT
from grandrounds.server.listeners import Listener
from grandrounds.server.listeners.tracker_libraries import TensorBoard, TrackedRun
from grandrounds.server.listeners.trackers import Tracked
from grandrounds.server.personal import summarised
from grandrounds.site.private.rehearsal import mechanism_of
from grandrounds.study.audit.extraction import Extraction
from grandrounds.study.audit.membership import membership
from grandrounds.study.audit.one_run import most_that_shows, one_run_bound
from grandrounds.study.audit.run import Audit
from grandrounds.study.comparison.results import results
from grandrounds.study.comparison.units import Unit
from grandrounds.study.report.comparison_page import comparison_page
from grandrounds.study.report.one_run import run_page
from grandrounds.study.report.page import html, write_page
from grandrounds.study.report.read import read_run
from grandrounds.study.report.several_runs import several_page
from scripts.check_figures.check import check
from scripts.check_figures.comparison_rules import check_comparison_page
from scripts.check_figures.page import texts_of
from scripts.check_figures.raw import disagreements, read
from scripts.check_figures.run_rules import check_run_page
from scripts.check_figures.several_rules import check_several_page
from scripts.check_figures.sheet import Sheet
from scripts.check_figures.shown import numbers_in, of_duration
from scripts.check_figures.tracker_rules import check_tracker, scalars_of
from tests.end_to_end.sites import fail_from
from tests.runs import (
    GOOD_SITES,
    Settings,
    copy_of,
    interrupted_at,
    play,
    unfinished_of,
)
from tests.study.comparison.test_comparison import EXAMS, unit
from tests.study.report.run_files import comparison

# --- Numbers --------------------------------------------------------------------------------------


def test_a_number_is_right_if_it_is_the_value_rounded_as_it_is_shown() -> None:
    def shows(text: str, *raw: float) -> bool:
        return [s.shows(r) for s, r in zip(numbers_in(text), raw, strict=True)] == [True] * len(raw)

    assert shows("1,234 of 5.68 MiB, -0.3 to 1.2e-05", 1234.4, 5.6789, -0.3, 1.24e-5)
    assert not shows("5.68 MiB", 5.69)
    assert shows("12 min 5 s", *of_duration(724.6))
    assert shows("p < 0.001", 1e-9)
    assert not shows("p < 0.001", 0.01)
    assert not numbers_in("float32, q_proj2 and run-7b", ["run-7b"])


# --- Pages without training -----------------------------------------------------------------------


def planted(texts: Mapping[str, str]) -> dict[str, str]:
    """Return place → text with a wrong number, one for each kind of place on a page."""
    kinds: dict[str, str] = {}
    for place, text in texts.items():
        if numbers_in(text) and place != "footer":
            kind = "/".join(part for part in place.split("/") if not part[-1:].isdigit())
            kinds.setdefault(kind, place)
    number = re.compile(r"\d[\d,]*(\.\d+)?(e-?\d+)?(?![A-Za-z0-9])")
    return {place: number.sub("98,765", texts[place]) for place in kinds.values()}


def assert_finds_every_error(texts: Mapping[str, str], checked: Callable[..., Sheet]) -> None:
    """Assert that a page has no finding, and one for a wrong number of every kind."""
    assert checked(dict(texts)).findings == []
    wrong = {**planted(texts), "aside/0": "12 sites were unlucky"}
    ticks = {
        place: text for place, text in wrong.items() if "/tick/" in place
    }  # beside right marks
    others = {place: text for place, text in wrong.items() if place not in ticks}
    findings = checked({**texts, **others}).findings + checked({**texts, **ticks}).findings
    for place in wrong:
        named = re.sub(r"/tick/.*", ": the ticks", place)
        assert any(finding.startswith(named) for finding in findings), f"{place}: not found"
    assert "aside/0: no rule explains '12 sites were unlucky'" in findings
    gone = {
        place
        for place, text in texts.items()
        if re.match("tile/.*/value$|figure/.*/(mark|cell/0)/0$", place) and numbers_in(text)
    }
    findings = checked({p: t for p, t in texts.items() if p not in gone}).findings
    assert len(findings) >= len(gone) > 3


def test_the_figures_of_a_run_of_before_are_right_and_every_planted_error_is_found(
    tmp_path: Path,
) -> None:
    run = copy_of("ffa-ternary-incremental", tmp_path)
    raw = read(run)
    assert disagreements(raw) == []
    assert_finds_every_error(page_of(run), lambda texts: check_run_page(texts, raw))


def test_the_figures_of_personal_adapters_and_subgroups_are_right_and_every_error_is_found(
    tmp_path: Path,
) -> None:
    run = copy_of("ffa-ternary-incremental", tmp_path)
    own: dict[str, dict[str, float | int]] = {
        str(site): {
            "federated": 1.2 + 0.1 * site,
            "personal": 1.4 - 0.05 * site,
            "weight": 0.25 * site,
            "held-out-examples": 20 + site,
        }
        for site in range(4)
    }
    told = {"name": "local-tail", "sites": {**own, "4": {}}, "failed": {"5": "2 tensors lack"}}
    of_ward = {"held-out-loss": 1.875, "held-out-examples": 1240, "sites": [0, 1, 3]}
    group = {"columns": ["ward 7"], "groups": {"ward 7 = 12": of_ward}, "silent": [2, 4]}
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"personal": {**told, **summarised(own)}, "subgroups": {**group, "failed": {}}}
    (run / "summary.json").write_text(json.dumps(summary))
    texts, raw = page_of(run), read(run)
    assert "note/personal/1" in texts
    assert_finds_every_error(texts, lambda texts: check_run_page(texts, raw))
    summary["personal"]["mean"]["personal"] += 0.5
    (run / "summary.json").write_text(json.dumps(summary))
    assert [
        finding.partition(" says")[0] for finding in check_run_page(page_of(run), raw).findings
    ] == ["note/personal/1"]


def test_the_figures_of_a_comparison_are_right_and_every_planted_error_is_found(
    tmp_path: Path,
) -> None:
    content = {
        **comparison(),
        **results(units(), EXAMS),
        "exams": {name: {**exam, "title": f"facts, {name}"} for name, exam in EXAMS.items()},
        "seeds": [1, 2],
        "sites": [
            {"site": k, "train-examples": {"1": 9, "2": 9}, "held-out-examples": {"1": 12, "2": 15}}
            for k in range(2)
        ],
    }
    texts = texts_of(html(comparison_page(content, tmp_path / "wards" / "comparison.json")))
    assert_finds_every_error(texts, lambda texts: check_comparison_page(texts, content, "wards"))


def units() -> dict[Unit, dict[str, Any]]:
    """Return the units of a comparison: two sites, two seeds, three arms and one without a site."""
    made = {}
    for seed, answers in ((1, "1110"), (2, "1111")):
        made[Unit("base", seed)] = unit(None, (30, 90), "1000", "11")
        made[Unit("federated", seed)] = unit(None, (9 + seed, 60), answers, "10")
        made[Unit("federated", seed)] |= {"failed-replies": seed}
        made[Unit("local", seed, 0)] = unit(0, (20, 120), "1000", "11")
        made[Unit("local", seed, 1)] = unit(1, (40, 45), "0110", "01")
        made[Unit("leave-one-out", seed, 1)] = unit(1, (5, 90), "1100", "11")
    return made


def page_of(run: Path) -> dict[str, str]:
    return texts_of(html(run_page(read_run(run))))


# --- Five runs ------------------------------------------------------------------------------------


class Recorded:
    """A tracker that writes its calls to a file, as JSON lines."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def start(self, run: TrackedRun) -> str:
        return str(self._file)

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps({"round": round_number, "figures": dict(figures)}) + "\n")

    def finish(self, completed: bool) -> None:
        pass


def play_tracked(settings: Settings, folder: Path, *how: Any, **changes: Any) -> None:
    """Play a run that reports to TensorBoard and to a file of calls."""
    listener = next((one for one in how if isinstance(one, Listener)), Listener())
    sites = next((one for one in how if not isinstance(one, Listener)), GOOD_SITES)
    told = {**settings, "run-directory": str(folder), **changes}
    calls = Recorded(folder.with_suffix(".calls"))
    trackers = {"tensorboard": TensorBoard(), "recorded": calls}
    with Tracked(resolve(told), listener, trackers) as tracked:
        play(told, sites, tracked)


@pytest.fixture(scope="module")
def runs(federation: Settings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One that failed, the same when it was resumed, an interrupted, a private, a masked one, and
    two of codecs, of which one was evaluated.
    """
    folder = tmp_path_factory.mktemp("runs")
    quick = {
        **federation,
        "num-server-rounds": 2,
        "train.training-arguments.max-steps": 1,
        "train.save-every-round": 1,
    }
    everybody = {**quick, "strategy.fraction-train": 1.0}
    formulary = {**everybody, "model.name": "formulary", "static.dataset.name": "formulary"}
    with suppress(RoundError):
        play_tracked(formulary, folder / "failed", fail_from(2, {0, 1, 3}))
    shutil.copytree(folder / "failed", folder / "resumed")
    shutil.copy(folder / "failed.calls", folder / "resumed.calls")
    again = load_recipe(folder / "resumed" / "config.toml")
    play_tracked(again, folder / "resumed", **{"resume-from": str(folder / "resumed")})
    with suppress(KeyboardInterrupt):
        play_tracked(quick, folder / "interrupted", interrupted_at("reply", 3))
    play_tracked(quick, folder / "flora", **{"strategy.name": "flora"})
    coded = {
        "communication.uplink-codec": "ternary",
        "communication.downlink-codec": "int8",
        "communication.downlink": "incremental",
        "data.partitioner": "natural",
        "data.partition-by": "ward",
        "defence.min-cosine": 0.0,
    }
    play_tracked(everybody, folder / "incremental", **coded)
    private = {
        "privacy.unit-guarantee": "example",
        "privacy.noise-multiplier": 2.0,
        "privacy.declared-units": 30,
    }
    play_tracked(everybody, folder / "private", **private)
    (folder / "private" / AUDIT).write_text(json.dumps(audit_of(folder / "private")))
    play_tracked(everybody, folder / "summed", **{"secure-aggregation": "masked32"})
    words = ["evaluate", str(folder / "flora"), "--benchmarks", "held-out", "--limit", "6"]
    assert CliRunner().invoke(app, words).exit_code == 0
    return {run.name: run for run in sorted(folder.iterdir()) if run.is_dir()}


def audit_of(run: Path) -> dict[str, Any]:
    """Return an audit of 40 canaries, with scores in the place of a model's."""
    rng = np.random.default_rng(3)
    is_in = np.arange(40) % 2 == 0
    scores = rng.normal(size=40) + 2 * is_in
    config = load_recipe(run / "config.toml")
    mechanism = mechanism_of(resolve(config))
    sides = Extraction(3, 20, 1.7, 4), Extraction(1, 20, 1.3, 1)
    told = membership(scores, is_in)
    delta = mechanism.delta
    bound, most = one_run_bound(scores, is_in, delta), most_that_shows(40, delta)
    return Audit(resolve(config), mechanism, 40, 20, bound, most, told, sides, bound, 1.0).as_dict()


@pytest.mark.slow
def test_every_figure_of_seven_runs_is_right_and_every_planted_error_is_found(
    runs: dict[str, Path],
) -> None:
    pytest.importorskip("tensorboard")
    for run in runs.values():
        write_page(run_page(read_run(run)), run / "report.html")
        found = check([run], calls=run.with_suffix(".calls"))
        assert {name: sheet.findings for name, sheet in found.items() if sheet.findings} == {}
        kinds = [name.rpartition("/")[2] for name in found]
        assert {"report.html", "README.md", f"{run.name}.calls"} <= set(kinds)
        assert all(sheet.checked.total() for name, sheet in found.items() if "raw" not in name)
        raw = read(run)
        assert_finds_every_error(page_of(run), lambda texts, raw=raw: check_run_page(texts, raw))
        assert_finds_errors_in_raw_files(run)
    chosen = [runs["failed"], runs["resumed"]]
    texts = texts_of(html(several_page([read_run(run) for run in chosen])))
    both = [read(run) for run in chosen]
    assert_finds_every_error(texts, lambda texts: check_several_page(texts, both))
    same = {**texts, "note/learning/0": "The runs differ in seed"}
    assert "are the same" in " ".join(check_several_page(same, both).findings)
    assert [len(unfinished_of(run)) for run in runs.values()] == [1, 0, 0, 1, 0, 1, 0]
    assert_finds_errors_of_privacy(runs["private"])
    texts = page_of(runs["private"])
    assert {"tile/epsilon/value", "figure/epsilon/mark/1", "note/privacy/2"} <= texts.keys()
    assert any("token F1" in text for text in page_of(runs["flora"]).values())


def assert_finds_errors_of_privacy(run: Path) -> None:
    """Assert that epsilons are found which are not those of noise, sites and the audit's counts."""
    for name, right in {
        "summary.json": r'("epsilon": )\d',
        "metrics.jsonl": r'("epsilon": {"0": )\d',
        "sites.json": r'("noise-multiplier": )\d',
        AUDIT: r'("correct": )\d',
    }.items():
        file = run / name
        content = file.read_text()
        file.write_text(re.sub(right, r"\g<1>9", content, count=1))
        assert file.read_text() != content
        files = check([run])[f"{run}: raw files"]
        assert any("epsilon" in finding for finding in files.findings), name
        file.write_text(content)


def assert_finds_errors_in_raw_files(run: Path) -> None:
    """Assert that a wrong value in any raw file is found."""
    wrong = {
        "ledger.json": (r'("tensor_bytes": )(\d)', r"\g<1>9\2"),
        "summary.json": (r'("communication_mib": )(\d)', r"\g<1>9\2"),
        "metrics.jsonl": (r'("held-out-loss": )(\d)', r"\g<1>9\2"),
        "sites.json": (r'("train-examples": )(\d)', r"\g<1>9\2"),
        "plan.json": (r'("total-mib": )(\d)', r"\g<1>9\2"),
        "unfinished.jsonl": (r'("failed": {)', r'\1"7": "planted", '),
        "environment.json": (r'("torch": ")', r"\g<1>9"),
        "config.toml": (r'("seed" = )(\d)', r"\g<1>9\2"),
        "peft_1/adapter_config.json": (r'("lora_alpha": )(\d)', r"\g<1>9\2"),
        "peft_1/README.md": (r"(after round )(\d)", r"\g<1>9\2"),
        f"../{run.name}.calls": (r'("communication-mib": )(\d)', r"\g<1>9\2"),
    }
    for name, (right, planted) in wrong.items():
        file = run / name
        content = file.read_text() if file.is_file() else ""
        if not re.search(right, content):
            assert name in ("unfinished.jsonl", "peft_1/adapter_config.json", "peft_1/README.md")
            continue
        file.write_text(re.sub(right, planted, content, count=1))
        found = check([run], calls=run.with_suffix(".calls"))
        assert any(sheet.findings for sheet in found.values()), f"{run.name}: {name}"
        file.write_text(content)
    [*_, events] = sorted((run / "tensorboard").glob("events.*"))
    scalars = list(scalars_of(events.read_bytes()))
    assert check_tracker(scalars, read(run)).checked["value"] == len(scalars) > 10
    number, name, value = scalars[0]
    assert check_tracker([(number, name, value + 1), *scalars[1:]], read(run)).findings
    assert check_tracker([*scalars, (1, "luck", 7.0)], read(run)).findings
