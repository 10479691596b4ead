"""What leaves a site is a closed list, and what it says does not depend on what a run asks."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)

from grandrounds import client_app
from grandrounds.config import recipes
from grandrounds.errors import DataError
from grandrounds.model.base import base_loads
from grandrounds.server.directory import find_checkpoint
from grandrounds.server.listeners.plain import PlainReporter
from grandrounds.server.model_card import model_card
from grandrounds.site.custody import answer as custody
from grandrounds.site.custody import audit
from grandrounds.site.custody.disclosure import FAILURE, FIELDS
from grandrounds.site.custody.node import SITE
from grandrounds.site.custody.rules_hash import policy_sha256
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.visit import Visit, introduction
from grandrounds.study.export import findings
from grandrounds.study.report.one_run import run_page
from grandrounds.study.report.read import read_run
from grandrounds.study.report.several_runs import several_page
from grandrounds.wire import messages, subgroups
from tests.asking import made_up
from tests.own_sites import sites_of
from tests.runs import Settings, grid_of, metrics_of, play, read_json, summary_of


def test_the_server_reads_all_that_a_site_tells() -> None:
    """The server drops facts and metrics that it does not know; `server.subgroups` reads lists."""
    told = {field.name for field in FIELDS if field.record == "metrics"}
    assert told <= {*messages.TOLD, *subgroups.FIGURES}
    facts = {field.name for field in FIELDS if field.record == "config"}
    assert facts <= {*messages.FACTS, subgroups.NAMES}


ONE_SITE: Settings = {
    "data.num-partitions": 1,
    "strategy.fraction-train": 1.0,
    "strategy.fraction-evaluate": 1.0,
    "num-server-rounds": 1,
}


def fields_of(reply: Message) -> set[tuple[str, str]]:
    """Return (record, field) of everything in a reply."""
    content = reply.content
    told = {("arrays", "tensors") for _ in content.array_records.get("arrays") or ()}
    for records in (content.config_records, content.metric_records):
        told |= {(record, name) for record, fields in records.items() for name in fields}
    assert set(content) <= {"arrays", "config", "metrics"}
    return told


def listed(
    kind: str, *, exact: bool = False, telemetry: bool = False, policy: bool = False
) -> set[tuple[str, str]]:
    """Return (record, field) that the list lets leave."""
    how = {"as it is", "rounded"} | ({"not told"} if exact else set())
    how |= {"telemetry"} if telemetry else set()
    how |= {"with the policy's hash"} if policy else set()
    return {
        (field.record, field.name) for field in FIELDS if field.kind == kind and field.told in how
    }


def run_of(
    settings: Settings, site: SiteFile, listener: Any = None
) -> tuple[Path, dict[str, Message]]:
    """Play a run of one site; return its directory, and the last reply of each kind."""
    replies: dict[str, Message] = {}

    def heard(message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        replies[message.metadata.message_type] = reply
        return reply

    grid = grid_of(recipes.resolve(settings), heard, [{SITE: str(site.path)}])
    return play(settings, listener=listener, grid=grid), replies


def test_every_field_that_leaves_is_listed_and_the_run_goes_without_the_others(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """97ce3f5 told rows, tokens, coverage, seconds and 20 figures more. Terminal, summary, model
    card and report name what is not told, and never show it as 0."""
    settings = {**settings, **ONE_SITE}
    [site] = sites_of(settings, tmp_path, tell__min_held_out_examples=10)
    run, replies = run_of(settings, site, PlainReporter(recipes.resolve(settings)))
    assert replies.keys() == {"query", "train", "evaluate"}
    for kind, reply in replies.items():
        optional = {("config", "data-source")}
        assert fields_of(reply) == listed(kind) - optional

    said = capsys.readouterr().out
    assert "about 100 for training (100 per site), 10 held out" in said
    assert "not told: real sites keep it" in said
    assert "coverage           not told" in said
    assert "base loads         not told" in said
    assert "device not told" in said
    round_1 = metrics_of(run)[-1]
    assert round_1["train-loss"] == round(round_1["train-loss"], 2) > 0
    assert round_1["held-out-loss"] == round(round_1["held-out-loss"], 2) > 0
    kept = ("coverage", "tokens", "padding-tokens", "examples", "proximal-penalty", "visit-seconds")
    assert [round_1[name] for name in kept] == [None] * 6
    assert round_1["update-norms"]["0"] > 0  # from the tensors
    summary = summary_of(run)
    assert summary["data"]["rows"] is summary["coverage"] is summary["base_loads"] is None
    found = findings(find_checkpoint(run))
    card = model_card(recipes.resolve(settings), ["q_proj"], 1, None, 0.1, found)
    assert "about 100 to train on, 10 held out" in card
    page = run_page(read_run(run))
    several = several_page([read_run(run), read_run(shutil.copytree(run, tmp_path / "again"))])
    assert "not told" in str(several.sections)
    assert [tile.value for tile in page.tiles if tile.name == "coverage"] == ["not told"]
    roll_call, line = audit.read(site.place("state"))[0], audit.read(site.place("state"))[2]
    assert roll_call["data"]["rows"] == 120  # nothing is dropped in silence: it is counted here
    assert line["asked"] == "train"
    for name in ("recipe", "sha256-in"):
        assert re.fullmatch(r"[0-9a-f]{64}", line[name])
    bounds = ("rank", "scale", "steps", "examples", "batch", "sequence-length", "learning-rate")
    assert all(line[name] > 0 for name in (*bounds, "highest-learning-rate", "norm-in"))
    assert line["left"]["norm"] == pytest.approx(round_1["update-norms"]["0"], rel=1e-5)
    assert re.fullmatch(r"[0-9a-f]{64}", line["left"]["sha256"])
    assert line["figures"]["tokens"] > 0
    assert {"tokens", "coverage", "cursor", "seconds", "process-id"} <= set(line["kept"])


def test_a_site_may_tell_everything(settings: Settings, tmp_path: Path) -> None:
    settings = {**settings, **ONE_SITE}
    everything = {"tell__figures": "exact", "tell__telemetry": True, "tell__policy_hash": True}
    [site] = sites_of(settings, tmp_path, **everything)
    loads = base_loads()  # of other tests in this process
    run, replies = run_of(settings, site)
    for kind, reply in replies.items():
        told = listed(kind, exact=True, telemetry=True, policy=True)
        assert fields_of(reply) == told - {("config", "data-source")}
    [introduced] = read_json(run / "sites.json")
    assert introduced["policy-sha256"] == policy_sha256(site)
    strict = dataclasses.replace(site.policy, max_rank=1)
    assert policy_sha256(dataclasses.replace(site, policy=strict)) != policy_sha256(site)
    summary = summary_of(run)
    assert summary["data"]["rows"] == 120
    assert summary["base_loads"] - loads <= summary["processes"] == 1
    assert metrics_of(run)[-1]["coverage"] == pytest.approx(8 / 108)


def asked(
    settings: Settings, site: SiteFile, kind: str, function: Callable[[Visit], RecordDict]
) -> Message:
    """Return what a site answers to a message with one of our own functions in place of a visit."""
    flat = recipes.resolve(settings).flat()
    node = {"partition-id": 0, "num-partitions": 1, SITE: str(site.path)}
    content = messages.content(config={"round": 1, "run": "ab", "learning-rate": 1e-3})
    message = Message(content, 1, kind, group_id="1")
    with made_up():
        return custody.answer(site.path, message, Context(1, 1, node, RecordDict(), flat), function)


@pytest.mark.parametrize("kind", ["query", "train", "evaluate", "evaluate.formulary"])
@pytest.mark.parametrize("figures", ["rounded", "exact"])
def test_what_is_not_listed_cannot_leave(
    settings: Settings, tmp_path: Path, kind: str, figures: str
) -> None:
    """Whatever the code of a visit reports: here 97ce3f5 sent all of it on."""
    settings = {**settings, **ONE_SITE}
    [site] = sites_of(settings, tmp_path, tell__figures=figures)

    def leaky(visit: Visit) -> RecordDict:
        row = ArrayRecord({"row": Array(np.ones(3, dtype=np.float32))})
        return RecordDict(
            {
                "arrays": row,
                "rows": row,
                "config": ConfigRecord({"note": "Jane Roe", "partition-id": 0}),
                "metrics": MetricRecord(
                    {"age": 61, "nll-sum": 3.5, "tokens": 1, "num-examples": 1}
                ),
                "more": ConfigRecord({"note": "Jane Roe"}),
            }
        )

    reply = asked(settings, site, kind, leaky)
    told = listed(kind, exact=figures == "exact", telemetry=True)
    assert fields_of(reply) <= told
    assert ("arrays" in reply.content.array_records) == (kind == "train")
    [line] = audit.read(site.place("state"))
    assert {"age", "note"} <= set(line["kept"])


def test_a_failure_tells_its_reason_alone(settings: Settings, tmp_path: Path) -> None:
    settings = {**settings, **ONE_SITE}
    [site] = sites_of(settings, tmp_path)
    content = messages.content(config={"round": 0, "run": "not a key"})
    grid = grid_of(recipes.resolve(settings), nodes=[{SITE: str(site.path)}])
    [reply] = grid.send_and_receive([Message(content, 1, MessageType.QUERY)])
    assert fields_of(reply) == {("config", name) for name in FAILURE}


# --- The attacks ----------------------------------------------------------------------------------


def test_the_held_out_loss_of_one_row_is_not_told(settings: Settings, tmp_path: Path) -> None:
    """97ce3f5 answered with the loss of one row to 16 digits (5.957233973911831) and its number of
    tokens, for any adapter."""
    settings = {**settings, **ONE_SITE, "data.held-out-fraction": 0.008}
    [site] = sites_of(settings, tmp_path, tell__min_held_out_examples=20)
    with pytest.raises(
        DataError, match="too few different questions or keep their loss to themselves"
    ):
        run_of(settings, site)

    def one_row(visit: Visit) -> RecordDict:
        raise AssertionError("the loss is not even computed")

    reply = asked(settings, site, "evaluate", one_row)
    assert fields_of(reply) == set()


def test_roll_calls_give_no_histogram_of_lengths(settings: Settings, tmp_path: Path) -> None:
    """97ce3f5 told with each roll call how many answers are cut and how many questions do not fit,
    here 4 and 32 of 40 at 192 tokens, 8 and 24 at 256, 18 and 0 at 512: asked for every length,
    that is the length of every row."""
    settings = {**settings, **ONE_SITE}
    [site] = sites_of(settings, tmp_path)
    questions = [" ".join(f"day {day}: fever" for day in range(i)) for i in range(1, 41)]
    rows = [json.dumps({"input": question, "output": f"Rest {question}"}) for question in questions]
    site.place(site.data.source).write_text("\n".join(rows))
    exact: list[dict[str, int]] = []
    told: list[dict[str, Any]] = []

    def introduce(visit: Visit) -> RecordDict:
        exact.append(dict(visit.site.report))
        return messages.content(config=introduction(visit.site, visit.config))

    for length in range(192, 513, 64):
        reply = asked({**settings, "train.seq-length": length}, site, "query", introduce)
        told.append(dict(reply.content.config_records["config"]))
    assert len({tuple(report.items()) for report in exact}) > 3
    assert all(facts == told[0] for facts in told)
