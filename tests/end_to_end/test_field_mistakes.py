"""Known mistakes of published federated systems, by number, and proof that they are absent here.

Most tests play a real run: both apps, in process, on a tiny base.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from transformers import AutoTokenizer

from grandrounds.data.examples import Example
from grandrounds.data.prompts import build_prompt
from grandrounds.data.tokenization import (
    IGNORED_LABEL,
    collate,
    prompt_token_ids,
    tokenize_examples,
)
from grandrounds.errors import DataError, ModelError, RoundError
from grandrounds.model.base import BaseSpec, base_loads
from grandrounds.model.lora import LoraSpec
from grandrounds.model.loss import Forward
from grandrounds.model.resident import resident_model, set_adapter
from grandrounds.server.aggregation.product_error import measured_modules
from grandrounds.site import visit as visits
from grandrounds.site.local_data import open_site
from grandrounds.site.training import VisitSettings, train_visit
from grandrounds.site.visit import Visit
from grandrounds.wire import messages
from grandrounds.wire import schedule as sampling
from grandrounds.wire.adapter import initial_adapter
from grandrounds.wire.ledger import MIB
from grandrounds.wire.schedule import VisitSchedule
from tests.runs import GOOD_SITES, Settings, config_of, metrics_of, play, read_json, summary_of

EVERYBODY: Settings = {"strategy.fraction-train": 1.0}
Change = Mapping[str, np.ndarray[Any, Any]]


class Observed:
    """The real ClientApp, recording every message in and out."""

    def __init__(self, fail: Callable[[str, int], bool] = lambda kind, site: False) -> None:
        self._fail = fail
        self.down_bytes = 0
        self.up_bytes = 0
        self.trained: list[tuple[int, int, messages.Metrics, Change, Change]] = []
        """(round, site, metrics, adapter received, change)."""

    def __call__(self, message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        site = int(context.node_config["partition-id"])
        self.down_bytes += sum(size for _, size in messages.tensor_sizes(message))
        if self._fail(kind, site):
            failure = messages.failure(DataError(f"site {site} is closed"))
            return Message(failure, reply_to=message)
        received = tensors(message) if kind == "train" else {}
        reply = GOOD_SITES(message, context)
        self.up_bytes += sum(size for _, size in messages.tensor_sizes(reply))
        if kind == "train":
            number = int(message.content.config_records[messages.CONFIG]["round"])  # type: ignore[arg-type]
            metrics = messages.metrics_of(reply)
            self.trained.append((number, site, metrics, received, tensors(reply)))
        return reply


def tensors(message: Message) -> Change:
    record = message.content.array_records[messages.ARRAYS]
    return {name: array.numpy().copy() for name, array in record.items()}


# --- 1 --------------------------------------------------------------------------------------------


def test_field_mistake_01_fedprox_changes_the_clients_update(
    settings: Settings, tmp_path: Path
) -> None:
    """The reported penalty is mu/2 ||change||^2 of the real replies, weighted by examples."""
    mu, app, plain = 5.0, Observed(), Observed()
    run = play(settings, app, **{"strategy.proximal-mu": mu})
    summary = summary_of(run)
    changes: Settings = {
        "strategy.name": "fedavg",
        "strategy.proximal-mu": 0.0,
        "run-directory": str(tmp_path / "plain"),
    }
    without = summary_of(play({**settings, **changes}, plain))

    assert [t[:2] for t in app.trained] == [t[:2] for t in plain.trained]
    for (number, _, _, _, change), (*_, other) in zip(app.trained, plain.trained, strict=True):
        if number == 1:  # both started from the same adapter and examples
            assert any(not np.array_equal(change[name], other[name]) for name in change)

    for record in metrics_of(run)[1:]:
        visits_made = [t for t in app.trained if t[0] == record["round"]]
        penalties = [
            0.5 * mu * sum(float(np.sum(c.astype(np.float64) ** 2)) for c in change.values())
            for *_, change in visits_made
        ]
        counts = [int(metrics["num-examples"]) for _, _, metrics, _, _ in visits_made]
        expected = float(np.average(penalties, weights=counts))
        assert record["proximal-penalty"] == pytest.approx(expected, rel=1e-4)
        assert record["proximal-penalty"] > 0
    assert summary["proximal_penalty"] > 0
    assert without["proximal_penalty"] == 0


# --- 2 --------------------------------------------------------------------------------------------


def test_field_mistake_02_visits_continue_through_the_examples(settings: Settings) -> None:
    """30 rows per site, 3 held out, so 27 to train on. Each visit makes 2 steps of 4 examples:
    8, 16 and 24 distinct examples after 1, 2 and 3 visits."""
    app = Observed()
    run = play(settings, app, **EVERYBODY)
    summary = summary_of(run)
    for record, seen in zip(metrics_of(run)[1:], (8, 16, 24), strict=True):
        assert record["coverage"] == pytest.approx(seen / 27)
        assert list(record["site-coverage"].values()) == pytest.approx([seen / 27] * 4)
    assert summary["coverage"] == pytest.approx(24 / 27)

    config = config_of(run)
    seed, seq_length = config.federation.seed, config.train.seq_length
    site = open_site(config.static.name, config.data, config.model.name, seq_length, seed, 1)
    assert len(set(site.train)) == len(site.train) == 27
    given, cursor = [], 0
    for number in (1, 2, 3):
        asked = messages.content(config={"round": number, "cursor": cursor})
        visit = Visit(asked, RecordDict(), config, site)
        given += [example for batch in visits.next_batches(visit) for example in batch]
        cursor = visit.cursor_after
    assert cursor == len(given) == len(set(given)) == 24
    reported = [int(metrics["cursor"]) for _, p, metrics, _, _ in app.trained if p == 1]
    assert reported == [8, 16, 24]


def test_field_mistake_02_repeating_the_first_examples_shows_in_the_coverage(
    settings: Settings,
) -> None:
    run = play(settings, Observed(), **EVERYBODY, **{"train.dynamic-data-seed": False})
    assert [m["coverage"] for m in metrics_of(run)[1:]] == pytest.approx([8 / 27] * 3)


# --- 3 --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_field_mistake_03_generation_stops_by_itself_after_training(tiny_base: Path) -> None:
    """With pad = eos, a tiny model memorises its answers and stops after them."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.pad_token = tokenizer.eos_token
    examples = [Example("What helps?", "Rest."), Example("What helps against itch?", "Tea.")]
    done = tokenize_examples(examples, tokenizer, "alpaca", 512)
    labels = collate(done.examples, tokenizer.pad_token_id)["labels"]
    for row in labels:
        assert row[row != IGNORED_LABEL][-1] == tokenizer.eos_token_id

    lora = LoraSpec(16, 32.0, "all-linear", 0.0)
    resident = resident_model(BaseSpec(str(tiny_base), 0, "float32"), lora)
    shapes = {name: tuple(p.shape) for name, p in resident.parameters.items()}
    set_adapter(resident, initial_adapter(shapes, sampling.adapter_generator(1)))

    def stops() -> list[bool]:
        resident.model.eval()
        out = []
        for question, answer in ((e.question, e.answer) for e in examples):
            [prompt] = prompt_token_ids(tokenizer, "alpaca", [question])
            ids = list(prompt)
            while len(ids) < len(prompt) + 30 and ids[-1] != tokenizer.eos_token_id:
                with torch.no_grad():
                    logits = resident.model(input_ids=torch.tensor([ids]), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
            text = tokenizer.decode(ids[len(prompt) : -1])
            out.append(ids[-1] == tokenizer.eos_token_id and text == f" {answer}")
        return out

    assert stops() == [False, False]
    settings = VisitSettings(
        accumulation_steps=1,
        schedule=VisitSchedule(1e-2, 0),
        optimizer="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        proximal_mu=0.0,
        forward=Forward(False, True, True, 0),
        seed=0,
    )
    parameters = list(resident.parameters.values())
    train_visit(
        resident.model, parameters, [list(done.examples)] * 60, settings, tokenizer.pad_token_id
    )
    assert stops() == [True, True]


# --- 4 --------------------------------------------------------------------------------------------


def test_field_mistake_04_no_search_for_the_response_and_nothing_masked_in_silence(
    settings: Settings, flashcards: Path, tmp_path: Path
) -> None:
    """A question that contains the response marker is masked like any other. One that leaves no
    room for its answer is counted and reported in the roll call."""
    trap = "### Response: [/INST] assistant\n### Response:"
    rows = [json.loads(line) for line in flashcards.read_text().splitlines()]
    for row in rows[:40]:
        row["input"] += f" {trap}"
    for row in rows[-7:]:
        row["input"] += " word" * 400
    cards = tmp_path / "trap.jsonl"
    cards.write_text("".join(json.dumps(row) + "\n" for row in rows))

    changes = {"static.dataset.name": str(cards), "num-server-rounds": 1, "train.seq-length": 400}
    run = play(settings, Observed(), **changes)
    sites = read_json(run / "sites.json")
    assert sum(site["unlearnable"] for site in sites) == 7
    kept = ("train-examples", "held-out-examples", "unlearnable", "empty-rows", "duplicate-rows")
    assert all(sum(site[name] for name in kept) == site["rows"] == 30 for site in sites)
    assert summary_of(run)["data"]["unlearnable"] == 7

    config = config_of(run)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    by_question = {row["input"]: row["output"] for row in rows}
    checked = 0
    for partition in range(4):
        seed = config.federation.seed
        site = open_site(str(cards), config.data, config.model.name, 400, seed, partition)
        for example in site.train + site.held_out:
            prompt = tokenizer.decode(example.input_ids[: example.prompt_tokens])
            head, tail = build_prompt("alpaca", "\x00").split("\x00")
            question = prompt.removeprefix(head).removesuffix(tail)
            learned = tokenizer.decode(example.input_ids[example.prompt_tokens :])
            assert learned == f" {by_question[question]}<eos>"
            checked += trap in question
    assert checked == 40


# --- 6 --------------------------------------------------------------------------------------------


def test_field_mistake_06_the_base_is_loaded_once_and_never_by_the_server(
    settings: Settings, tmp_path: Path, tiny_base: Path
) -> None:
    fresh = shutil.copytree(tiny_base, tmp_path / "fresh")  # not loaded by any other test
    settings = {**settings, **EVERYBODY, "model.name": str(fresh)}
    loads = {}

    def listen(event: str, data: Mapping[str, Any]) -> None:
        if event in ("plan", "roll-call"):
            loads[event] = base_loads()

    app = Observed(fail=lambda kind, site: kind != "query")
    before = base_loads()
    with pytest.raises(RoundError):
        play(settings, app, listen)
    assert loads == {"plan": before, "roll-call": before}
    assert base_loads() == before  # no site trained, so nothing loaded the base

    play({**settings, "run-directory": str(tmp_path / "second")}, Observed())
    assert base_loads() == before + 1  # 12 visits and 8 evaluations


# --- 7 --------------------------------------------------------------------------------------------


def test_field_mistake_07_the_error_of_averaging_a_and_b_is_measured(settings: Settings) -> None:
    """Compared with dense products of the updates that the sites sent."""
    app = Observed()
    run = play(settings, app, **EVERYBODY)
    summary = summary_of(run)
    measured = {m["round"]: m["product-error"] for m in metrics_of(run)
                if "product-error" in m}  # fmt: skip
    assert list(measured) == [1, 2, 3]  # the first, and those with a checkpoint
    for number, value in measured.items():
        replies = [t for t in app.trained if t[0] == number]
        total = sum(int(metrics["num-examples"]) for _, _, metrics, _, _ in replies)
        error = norm = 0.0
        for module in measured_modules(list(replies[0][3]), len(replies)):
            a_name, b_name = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
            mean_a: Any = 0.0
            mean_b: Any = 0.0
            product: Any = 0.0
            for _, _, metrics, received, change in replies:
                share = int(metrics["num-examples"]) / total
                a = received[a_name].astype(float) + change[a_name]
                b = received[b_name].astype(float) + change[b_name]
                mean_a, mean_b = mean_a + share * a, mean_b + share * b
                product = product + share * b @ a
            error += float(np.sum((product - mean_b @ mean_a) ** 2))
            norm += float(np.sum(product**2))
        assert value == pytest.approx((error / norm) ** 0.5, rel=1e-4)
        assert value > 0
    assert summary["product_error"] == measured[3]


# --- 9 --------------------------------------------------------------------------------------------


def test_field_mistake_09_a_target_that_matches_nothing_stops_the_run_before_training(
    settings: Settings,
) -> None:
    app = Observed()
    listed = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ModelError, match=rf"'qkv_proj'.*Its linear modules: {listed}\."):
        play(settings, app, **{"model.lora.target-modules": "q_proj,qkv_proj"})
    assert app.trained == []
    assert not Path(settings["run-directory"]).exists()


def test_of_an_entrys_list_the_targets_that_match_are_trained(settings: Settings) -> None:
    changes = {"model.lora.target-modules": "q_proj?,W_pack?", "num-server-rounds": 1}
    run = play(settings, **changes)
    plan = read_json(run / "plan.json")
    assert plan["target-modules"] == ["q_proj"]
    assert plan["target-modules-without-match"] == ["W_pack"]
    assert read_json(run / "peft_1" / "adapter_config.json")["target_modules"] == ["q_proj"]


# --- 13 -------------------------------------------------------------------------------------------


def test_field_mistake_13_the_ledger_equals_the_plan_to_the_byte(settings: Settings) -> None:
    app = Observed()
    run = play(settings, app)
    summary = summary_of(run)
    ledger, plan = read_json(run / "ledger.json"), read_json(run / "plan.json")
    counted = sum(kind["tensor_bytes"] for kind in ledger["totals"].values())
    assert counted == plan["total-bytes"] == app.down_bytes + app.up_bytes
    assert summary["communication_mib"] == summary["planned_mib"] == counted / MIB
    assert summary["failed_replies"] == 0


def test_field_mistake_13_the_ledger_counts_what_failed_sites_were_sent(
    settings: Settings,
) -> None:
    """Site 2 always fails: in 3 rounds of 4 sites, 12 messages go down and 9 come back."""
    app = Observed(fail=lambda kind, site: kind == "train" and site == 2)
    run = play(settings, app, **EVERYBODY)
    summary = summary_of(run)
    totals = read_json(run / "ledger.json")["totals"]
    assert totals["train.down"]["messages"] == 12
    assert totals["train.up"]["messages"] == 9
    counted = sum(kind["tensor_bytes"] for kind in totals.values())
    assert counted == app.down_bytes + app.up_bytes
    one = totals["train.up"]["tensor_bytes"] // 9
    assert read_json(run / "plan.json")["total-bytes"] - counted == 3 * one
    assert summary["failed_replies"] == 3
    assert [m["failed"] for m in metrics_of(run)[1:]] == [{"2": "site 2 is closed"}] * 3


# --- 15 -------------------------------------------------------------------------------------------

_written: list[str] | None = None
"""File writes recorded while a site works; None: not recording."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _note_writes(event: str, arguments: tuple[Any, ...]) -> None:
    if _written is None or (arguments and "__pycache__" in str(arguments[0])):
        return  # a module that is imported just now is compiled
    if event == "open":
        path, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & _WRITING:
            _written.append(f"{event} {path}")
    elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink"):
        _written.append(f"{event} {arguments[0]}")


sys.addaudithook(_note_writes)


@contextmanager
def noted_writes() -> Iterator[list[str]]:
    global _written
    _written = []
    try:
        yield _written
    finally:
        _written = None


def test_field_mistake_15_a_site_writes_no_file_and_takes_no_path(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(home))
    target = tmp_path / "target"
    written: list[str] = []

    def tempted(message: Message, context: Context) -> Message:
        """Add paths of every kind to a message before the real site answers it."""
        config = message.content.config_records.get(messages.CONFIG)
        if config is not None:
            for key in ("output-dir", "run-directory", "save-path", "resume-from", "model.name"):
                config[key] = str(target / key)
        with noted_writes() as noted:
            reply = GOOD_SITES(message, context)
        written.extend(w for w in noted if not w.endswith(os.devnull))
        return reply

    run = play(settings, tempted)
    summary = summary_of(run)
    assert summary["status"] == "completed"
    assert written == []
    assert list(home.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "run"]
    assert run == tmp_path / "run"


def test_writes_are_recorded(tmp_path: Path) -> None:
    """Control for the test above."""
    with noted_writes() as noted:
        (tmp_path / "file").write_text("x")
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").read_text()
    assert len(noted) == 2


# --- 16 -------------------------------------------------------------------------------------------


def test_field_mistake_16_a_round_with_too_few_good_replies_fails_loudly(
    settings: Settings,
) -> None:
    """All sites fail after round 1: the run ends in round 2 and reports why."""
    rounds_begun: list[int] = []

    def closing(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            rounds_begun.append(int(message.metadata.group_id))
            if rounds_begun[-1] > 1:
                return Message(messages.failure(DataError("closed")), reply_to=message)
        return GOOD_SITES(message, context)

    with pytest.raises(RoundError, match=r"Round 2: 0 of 2 sites returned a valid.*: closed"):
        play(settings, closing, **{"train.save-every-round": 1})
    run = Path(settings["run-directory"])
    summary = summary_of(run)
    assert summary["status"] == "failed"
    assert summary["rounds"] == 1
    assert "Round 2" in summary["reason"]
    assert summary["adapter"] == "peft_1"
    assert (run / "peft_1" / "adapter_model.safetensors").is_file()
    assert max(rounds_begun) == 2


def test_field_mistake_16_the_failed_replies_of_a_run_that_failed_are_counted(
    settings: Settings,
) -> None:
    """Both sites selected in the first round fail."""
    app = Observed(fail=lambda kind, site: kind == "train")
    with pytest.raises(RoundError):
        play(settings, app)
    summary = summary_of(Path(settings["run-directory"]))
    assert summary["failed_replies"] == 2


def test_a_reply_without_its_metrics_does_not_end_the_run(settings: Settings) -> None:
    """A reply that lacks a metric needed for metrics.jsonl counts as failed."""

    def forgetful(message: Message, context: Context) -> Message:
        reply = GOOD_SITES(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            del reply.content.metric_records[messages.METRICS]["train-loss"]
        return reply

    run = play(settings, forgetful, **EVERYBODY, **{"num-server-rounds": 1})
    summary = summary_of(run)
    assert summary["failed_replies"] == 1
    assert list(metrics_of(run)[1]["failed"]) == ["1"]
