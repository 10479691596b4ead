"""DoRA in whole runs: where its magnitudes start, the sites' mean, resumes, hostile sites."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MessageType
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from grandrounds.errors import EngineError, ModelError, RoundError
from grandrounds.model.base import BaseSpec, base_loads, load_base
from grandrounds.server.directory import find_checkpoint
from grandrounds.server.unfinished import UNFINISHED, lines_of, traffic_of
from grandrounds.study.ask import Interview
from grandrounds.study.evaluation.models import Models
from grandrounds.study.evaluation.tasks import Subject
from grandrounds.study.export import export
from grandrounds.wire.adapter import MAGNITUDE, Adapter, is_magnitude
from grandrounds.wire.ledger import Ledger, Traffic
from grandrounds.wire.messages import MAGNITUDES, from_arrays
from tests.end_to_end.sites import spoilt
from tests.runs import (
    GOOD_SITES,
    Settings,
    adapter_bytes,
    interrupted_at,
    metrics_of,
    play,
    read_json,
    summary_of,
)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return {
        **settings,
        "model.lora.peft-use-dora": True,
        "strategy.name": "fedavg",
        "strategy.proximal-mu": 0.0,
        "num-server-rounds": 2,
        "train.save-every-round": 1,
    }


def state_of(run: Path, number: int) -> dict[str, Any]:
    return load_file(run / "state" / f"round-{number:06d}" / "adapter.safetensors")


def test_the_mean_of_the_sites_is_that_of_float64_and_the_plan_the_ledger(
    settings: Settings,
) -> None:
    """w + sum_i n_i d_i / n over all tensors, magnitudes included."""
    arrived: list[tuple[Adapter, int]] = []

    def sites(message: Message, context: Context) -> Message:
        reply = GOOD_SITES(message, context)
        if message.metadata.message_type == MessageType.TRAIN and len(arrived) < 2:
            arrays = reply.content.array_records["arrays"]
            weight = int(reply.content.metric_records["metrics"]["num-examples"])  # type: ignore[arg-type]
            shapes = {name: tuple(array.shape) for name, array in arrays.items()}
            arrived.append((from_arrays(arrays, shapes), weight))
        return reply

    run = play(settings, sites, **{"num-server-rounds": 1})
    start, after = state_of(run, 0), state_of(run, 1)
    total = sum(weight for _, weight in arrived)
    for name, tensor in start.items():
        moved = sum(change[name].astype(np.float64) * weight for change, weight in arrived)
        np.testing.assert_array_equal(after[name], (tensor + moved / total).astype(np.float32))
        assert is_magnitude(name) == (tensor.ndim == 1)
        assert (after[name] != tensor).any()
    assert metrics_of(run)[0]["magnitudes-from"] == [0, 1]
    plan, ledger = read_json(run / "plan.json"), read_json(run / "ledger.json")
    assert plan["totals"] == ledger["totals"]
    assert ledger["totals"]["magnitudes.up"]["messages"] == 2
    assert read_json(run / "peft_1" / "adapter_config.json")["use_dora"] is True
    assert "DoRA, r = 4" in (run / "peft_1" / "README.md").read_text()


CODECS: dict[str, Settings] = {
    "float32": {},
    "int8": {"communication.uplink-codec": "int8", "communication.downlink-codec": "int8"},
    "incremental": {
        "communication.downlink": "incremental",
        "communication.downlink-codec": "int4",
        "communication.uplink-codec": "ternary",
    },
}


@pytest.mark.parametrize(
    "codecs",
    [
        pytest.param("float32", marks=pytest.mark.slow),
        "int8",
        pytest.param("incremental", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_resumes_to_the_bit(
    settings: Settings, tmp_path: Path, codecs: str
) -> None:
    settings = {**settings, **CODECS[codecs]}
    whole = play(settings, **{"run-directory": str(tmp_path / "whole")})
    with pytest.raises(KeyboardInterrupt):
        play(settings, listener=interrupted_at("checkpoint", 1))
    resumed = play(settings, asks_nothing, **{"resume-from": settings["run-directory"]})
    assert adapter_bytes(resumed, "peft_2") == adapter_bytes(whole, "peft_2")
    for run, lost in ((resumed, lines_of((resumed / UNFINISHED).read_bytes())), (whole, [])):
        sent = Ledger(
            {k: Traffic(**t) for k, t in read_json(run / "ledger.json")["totals"].items()}
        )
        for line in lost:  # of the round that was interrupted
            sent = sent.minus(traffic_of(line))
        plan = read_json(run / "plan.json")["totals"]
        assert {kind: asdict(traffic) for kind, traffic in sent.totals.items()} == plan
    assert [m.get("held-out-loss") for m in metrics_of(resumed)] == [
        m.get("held-out-loss") for m in metrics_of(whole)
    ]


def asks_nothing(message: Message, context: Context) -> Message:
    """Sites of a run that has its start."""
    assert message.metadata.message_type != MAGNITUDES
    return GOOD_SITES(message, context)


# --- Sites that tell another start ----------------------------------------------------------------


def telling(change: Callable[[np.ndarray], Any], partitions: list[int]) -> Any:
    """Return sites of which some tell changed magnitudes."""

    def damage(message: Message, reply: Message) -> Message:
        record = reply.content.array_records["arrays"]
        reply.content["arrays"] = ArrayRecord(
            {name: Array(change(array.numpy())) for name, array in record.items()}
        )
        return reply

    return spoilt(damage, partitions, MAGNITUDES)


def one_more(norms: np.ndarray) -> np.ndarray:
    return np.nextafter(norms, np.float32(np.inf))


def test_two_sites_that_differ_in_a_bit_end_the_run_and_are_named(settings: Settings) -> None:
    with pytest.raises(EngineError, match=r"site 0 has \w{16}; site 1 has \w{16}; most in "):
        play(settings, telling(one_more, [1]))
    assert not Path(settings["run-directory"]).exists()


def test_what_is_no_norm_is_refused_and_another_site_is_asked(settings: Settings) -> None:
    with pytest.raises(EngineError) as refused:
        play(settings, telling(np.negative, [0, 1, 2]))
    assert "which 2 sites must tell, and 1 of 4 did" in str(refused.value)
    assert str(refused.value).count("norms from -") == 3
    run = play(settings, telling(np.negative, [0]), **{"num-server-rounds": 1})
    assert metrics_of(run)[0]["magnitudes-from"] == [1, 2]


def test_a_site_whose_base_differs_from_the_start_refuses_its_visits(settings: Settings) -> None:
    """Two hostile sites agree on a start: no honest one trains from it."""
    with pytest.raises(RoundError, match="the base's weights, or the precision of a quantised"):
        play(settings, telling(one_more, [0, 1]))


def test_a_single_site_tells_the_start_alone_and_the_log_says_so(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    one = {
        "data.num-partitions": 1,
        "strategy.fraction-train": 1.0,
        "strategy.fraction-evaluate": 1.0,
    }
    with caplog.at_level(logging.WARNING, "grandrounds"):
        run = play({**settings, **one}, **{"num-server-rounds": 1})
    assert "with a single site nothing is compared" in caplog.text
    assert summary_of(run)["communication_mib"] == summary_of(run)["planned_mib"]


# --- What is done with the adapter ----------------------------------------------------------------

TOKENS = torch.arange(3, 27).reshape(2, 12)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(TOKENS).logits
    return logits


def test_the_adapter_is_evaluated_asked_and_merged_as_peft_loads_it(
    settings: Settings, tmp_path: Path, tiny_base: Path
) -> None:
    learned = {"train.learning-rate-max": 0.2, "train.learning-rate-min": 0.2}
    run = play(settings, **{"num-server-rounds": 1}, **learned)
    checkpoint = find_checkpoint(run)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    untuned = logits_of(base)
    expected = logits_of(PeftModel.from_pretrained(base, checkpoint.folder))
    assert (expected - untuned).abs().max() > 0.01
    models = Models(
        BaseSpec(str(tiny_base), 0, "float32"), (tuned := Subject("t", checkpoint.folder, "", ""),)
    )
    with models.asked(tuned) as model:
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
    with models.asked(Subject("base", None, "", "")) as model:
        torch.testing.assert_close(logits_of(model), untuned, rtol=1e-4, atol=1e-5)
    interview = Interview(checkpoint)
    *_, answer = interview.answer("What helps?", tuned=True, max_tokens=4)
    assert answer.end in ("cut", "stopped")
    folder = export(checkpoint, merge=True, to=tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_base_in_4_bits_starts_at_its_dequantised_norms(settings: Settings) -> None:
    pytest.importorskip("bitsandbytes")
    run = play(settings, **{"num-server-rounds": 1, "model.quantization": 4})
    base = load_base(BaseSpec(settings["model.name"], 4, "float32"))
    weights = {
        f"base_model.model.{path}{MAGNITUDE}": dequantize_module_weight(module)
        for path, module in base.named_modules()
        if path.endswith(("q_proj", "v_proj"))
    }
    start = {name: norms for name, norms in state_of(run, 0).items() if is_magnitude(name)}
    assert start.keys() == weights.keys()
    for name, norms in start.items():
        np.testing.assert_allclose(norms, weights[name].norm(dim=1).detach(), rtol=1e-6)
    assert metrics_of(run)[1]["failed"] == {}


def test_a_base_in_8_bits_on_a_cpu_is_refused_before_it_is_loaded(settings: Settings) -> None:
    pytest.importorskip("bitsandbytes")
    before = base_loads()
    with pytest.raises(ModelError, match=r"quantization = 8 .* runs on a GPU only"):
        play(settings, **{"model.quantization": 8})
    assert base_loads() == before
