"""Every configuration key changes the adapter, is rejected, or is reported as having no effect."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from grandrounds.config import recipes
from grandrounds.config.keys import FIELD_OF_KEY
from grandrounds.config.strategies import STRATEGIES
from grandrounds.config.validation import parse
from grandrounds.errors import ConfigError
from grandrounds.server.listeners.start_rows import without_effect
from grandrounds.site import training
from tests.end_to_end.sites import RecordedVisit
from tests.runs import Settings, adapter_bytes, metrics_of, play, summary_of

OTHER_VALUE: Settings = {
    "seed": 7,
    "model.dtype": "bfloat16",
    "model.lora.peft-lora-r": 2,
    "model.lora.peft-lora-alpha": 64,
    "model.lora.target-modules": "o_proj",
    "model.lora.dropout": 0.5,
    "train.learning-rate-min": 0.001,
    "train.seq-length": 150,
    "train.optimizer": "adamw_8bit",
    "train.replay-examples": 2,
    "train.batching": "length-grouped",  # which examples share a batch
    "train.training-arguments.per-device-train-batch-size": 3,
    "train.training-arguments.gradient-accumulation-steps": 2,
    "train.training-arguments.max-steps": 3,
    "train.training-arguments.max-grad-norm": 0.001,
    "train.training-arguments.weight-decay": 0.5,
    "strategy.proximal-mu": 100.0,
    "strategy.fraction-train": 0.25,
    "communication.uplink-codec": "int8",
    "defence.update-norm-bound": 0.001,
    "defence.largest-norm": 1.0,
    "data.num-partitions": 5,
    "data.partitioner": "size-skewed",
    "data.held-out-fraction": 0.2,
    "data.question-column": "instruction",
    "data.answer-column": "ward",
}
"""Another value for each key that changes the adapter by itself."""

ALSO_OTHER: dict[str, Settings] = {
    "num-server-rounds": {"num-server-rounds": 2},
    "train.training-arguments.num-train-epochs": {
        "train.training-arguments.max-steps": -1,
        "train.training-arguments.num-train-epochs": 1,
    },
    "train.training-arguments.warmup-steps": {
        "train.training-arguments.warmup-steps": 2,
        "train.training-arguments.lr-scheduler-type": "constant_with_warmup",
    },
    "strategy.name": {"strategy.name": "fedavg", "strategy.proximal-mu": 0.0},
    "communication.block-size": {
        "communication.uplink-codec": "int8",
        "communication.block-size": 32,
    },
    "communication.kept-share": {
        "communication.uplink-codec": "topk",
        "communication.kept-share": 0.5,
    },
    "data.partition-by": {"data.partition-by": "ward", "data.partitioner": "natural"},
    "data.dirichlet-alpha": {
        "data.partition-by": "ward",
        "data.partitioner": "dirichlet",
        "data.dirichlet-alpha": 1.0,
    },
}
"""Keys that only have an effect together with others."""

IN_TWO_ROUNDS: Settings = {
    "train.dynamic-data-seed": False,  # the first visit of a site begins at the same examples
    "train.learning-rate-max": 0.02,  # the last round has the minimum
}
"""Keys whose effect first shows in the second round."""

TESTED_ELSEWHERE = {
    "model.name": "a different base is a different run",
    "static.dataset.name": "different data are a different run",
    "run-directory": "the server's",
    "resume-from": "the server's",
    "earlier-schedules": "test_longer_runs.py",
    "consortium": "tests/engines/deployment",
    "secure-aggregation": "test_masked_runs.py",
    "model.quantization": "below, slow",
    "model.gradient-checkpointing": "below: same adapter, computed differently",
    "train.response-only-logits": "below: same adapter, computed differently",
    "train.logits-chunk-tokens": "below: same adapter, computed differently",
    "train.training-arguments.torch-compile": "below: same adapter, computed differently",
    "train.save-every-round": "test_run_directory.py",
    "train.num-threads": "below",
    "train.cpu-matmul": "tests/model/test_products.py: no effect on a base as small as these",
    "train.fused-kernels": "for a GPU: tests/model/test_fused.py",
    "train.devices": "tests/site/devices",
    "train.report-to": "tests/server/listeners/test_trackers.py: the adapter is the same",
    "train.training-arguments.lr-scheduler-type": "with warmup-steps",
    "train.training-arguments.bf16": "for a GPU",
    "train.training-arguments.tf32": "for a GPU",
    "train.training-arguments.gradient-checkpointing": "must agree with the model's",
    "strategy.cohorts": "tests/wire/test_schedule.py, and test_learning.py",
    "strategy.largest-weight": "tests/server/test_weights.py and test_rounds.py",
    "strategy.weighting": "tests/server/test_rounds.py; these sites have as many examples each",
    **dict.fromkeys(
        (f"strategy.{key}" for asks in STRATEGIES.values() for key in asks.keys),
        "test_rules_and_codecs.py and tests/server/aggregation",
    ),
    "strategy.outer-nesterov": "test_rules_and_codecs.py and tests/server/aggregation",
    **dict.fromkeys(
        (
            "communication.downlink-codec",
            "communication.downlink",
            "communication.catch-up-codec",
            "communication.entropy-coding",
            "defence.min-cosine",
            "defence.largest-spread",
            "defence.preset",
        ),
        "test_rules_and_codecs.py and tests/wire/test_downlink.py",
    ),
    "personalisation.name": "test_personal_runs.py: what travels is as without",
    **dict.fromkeys(
        (f"personalisation.{key}" for key in ("steps", "learning-rate", "proximal-mu", "weights")),
        "test_personal_runs.py",
    ),
    "strategy.fraction-evaluate": "test_run_directory.py",
    "strategy.min-reply-fraction": "test_failing_sites.py",
    "strategy.round-timeout-seconds": "never cuts off a visit in process",
    "strategy.min-sites": "tests/site/custody/test_custody.py and tests/server/test_rounds.py",
    "strategy.connect-timeout-seconds": "tests/server/test_rounds.py",
    "data.prompt-template": "tests/data/test_tokenization.py",
    "data.template-date": "tests/data/test_chat_settings.py",
    "data.template-options": "tests/data/test_chat_settings.py",
    "data.system-prompt": "tests/data/test_chat_settings.py",
    "model.revision": "tests/model/test_tokenizers.py",
    "static.dataset.config": "tests/data/test_sources.py",
    "static.dataset.split": "tests/data/test_sources.py",
    "static.dataset.revision": "tests/data/test_sources.py",
    "data.train-on": "tests/data/test_chat.py",
    "data.rejected-column": "tests/data/test_pairs.py",
    "data.subgroup-columns": "tests/server/test_told_subgroups.py",
    **dict.fromkeys(
        (f"train.{k}" for k in ("objective", "dpo-length-normalised", "dpo-reference")),
        "test_preference_runs.py",
    ),
    "train.dpo-beta": "tests/model/test_pair_loss.py",
    "model.lora.from-adapter": "test_continued_runs.py",
    "model.lora.from-adapter-sha256": "test_continued_runs.py",
    "model.lora.use-rslora": "tests/model/test_stabilised.py",
    "model.lora.peft-use-dora": "test_dora_runs.py",
    "model.lora.rank-pattern": "tests/end_to_end/test_own_ranks.py",
    "model.lora.alpha-pattern": "tests/end_to_end/test_own_ranks.py",
    **{
        key: "tests/site/private/test_private_visit.py"
        for key in FIELD_OF_KEY
        if key.startswith("privacy.")
    },
}


SHORT: Settings = {
    "num-server-rounds": 1,
    "strategy.fraction-train": 1.0,
    "strategy.fraction-evaluate": 0.0,
}
"""One round with every site, without evaluation."""


def short_run(settings: Settings, changes: Settings) -> bytes:
    """Return the adapter file of a short run with a changed configuration."""
    return adapter_bytes(play({**settings, **SHORT, **changes}))


@pytest.fixture(scope="module")
def reference(
    federation: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], bytes]:
    """Return a function from a number of rounds to the reference adapter, computed once each."""

    @cache
    def played(rounds: int) -> bytes:
        folder = tmp_path_factory.mktemp("reference") / "run"
        changes = {"num-server-rounds": rounds, "run-directory": str(folder)}
        return short_run(federation, changes)

    return played


def test_every_key_is_covered_here_or_in_a_named_test() -> None:
    only = {"logging-steps", "save-steps", "save-total-limit"}
    idle = {f"train.training-arguments.{key}" for key in only}
    refused = {
        "train.training-arguments.output-dir",
        "train.training-arguments.learning-rate",
        "train.training-arguments.fp16",
    }
    shown = [set(OTHER_VALUE), set(ALSO_OTHER), set(IN_TWO_ROUNDS), set(TESTED_ELSEWHERE)]
    kinds = [*shown, idle, refused]
    assert set().union(*kinds) == set(FIELD_OF_KEY)
    assert sum(len(kind) for kind in kinds) == len(FIELD_OF_KEY)


@pytest.mark.parametrize("key", [*OTHER_VALUE, *ALSO_OTHER, *IN_TWO_ROUNDS])
@pytest.mark.slow
def test_another_value_gives_another_adapter(
    settings: Settings, key: str, reference: Callable[[int], bytes]
) -> None:
    rounds = 2 if key in IN_TWO_ROUNDS else 1
    alone = {key: {**OTHER_VALUE, **IN_TWO_ROUNDS}.get(key)}
    changes = {"num-server-rounds": rounds, **ALSO_OTHER.get(key, alone)}
    assert short_run(settings, changes) != reference(rounds)


@pytest.mark.parametrize("key", ["logging-steps", "save-steps", "save-total-limit"])
def test_a_key_without_effect_is_reported(settings: Settings, key: str) -> None:
    name = f"train.training-arguments.{key}"
    assert without_effect(recipes.resolve(settings)) == []
    assert without_effect(recipes.resolve({**settings, name: 7})) == [name]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.training-arguments.output-dir", "/tmp/out"),
        ("train.training-arguments.learning-rate", "1e-3"),
        ("train.training-arguments.fp16", True),
        ("train.training-arguments.warmup-steps", 10_000),  # more than there are
        ("train.training-arguments.lr-scheduler-type", "polynomial"),
        ("train.optimizer", "sgd"),
    ],
)
def test_an_unsupported_value_is_rejected(settings: Settings, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        parse({**settings, key: value}, recipes.defaults())


@pytest.mark.parametrize(
    "change",
    [
        {"model.gradient-checkpointing": True},
        {"train.response-only-logits": False},
        {"train.logits-chunk-tokens": 3},
        pytest.param({"train.training-arguments.torch-compile": True}, marks=pytest.mark.slow),
    ],
    ids=lambda change: next(iter(change)),
)
def test_memory_saving_options_give_nearly_the_same_adapter(
    settings: Settings, change: Settings, reference: Callable[[int], bytes]
) -> None:
    plain, saving = load(reference(1)), load(short_run(settings, change))
    for name, tensor in plain.items():
        np.testing.assert_allclose(saving[name], tensor, rtol=1e-3, atol=1e-5)


def test_num_threads_reaches_torch(settings: Settings) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        short_run(settings, {"train.num-threads": 1})
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantization_gives_another_adapter(
    settings: Settings, bits: int, reference: Callable[[int], bytes]
) -> None:
    pytest.importorskip("bitsandbytes")
    run = play({**settings, **SHORT, "model.quantization": bits})
    assert adapter_bytes(run) != reference(1)
    said = summary_of(run)["precision"]
    assert {4: "4-bit NF4, double quantisation", 8: "8-bit (LLM.int8)"}[bits] in said


def test_a_static_data_seed_starts_every_visit_at_the_same_examples(
    settings: Settings, visited: list[RecordedVisit]
) -> None:
    run = play(settings, **{"train.dynamic-data-seed": False, "strategy.fraction-train": 1.0})
    for partition in range(4):
        first, *later = (
            {e.input_ids for e in v.examples} for v in visited if v.partition == partition
        )
        assert len(first) == 8
        assert later == [first, first]
    assert {line["coverage"] for line in metrics_of(run)[1:]} == {32 / 108}


@pytest.mark.parametrize(("epochs", "examples", "steps"), [(1, 27, 7), (0.5, 14, 4), (2, 54, 14)])
@pytest.mark.slow
def test_max_steps_of_minus_one_counts_epochs(
    settings: Settings,
    visited: list[RecordedVisit],
    epochs: float,
    examples: int,
    steps: int,
) -> None:
    """Each site has 27 training examples; the batch size is 4."""
    play(
        settings,
        **{
            "num-server-rounds": 1,
            "train.training-arguments.max-steps": -1,
            "train.training-arguments.num-train-epochs": epochs,
        },
    )
    assert [(len(v.examples), v.result.steps) for v in visited] == [(examples, steps)] * 2
    different = [len({e.input_ids for e in v.examples}) for v in visited]
    assert different == [min(27, examples)] * 2


def test_gradient_accumulation_uses_more_examples_in_the_same_number_of_steps(
    settings: Settings, visited: list[RecordedVisit]
) -> None:
    key = "train.training-arguments.gradient-accumulation-steps"
    play(settings, **{"num-server-rounds": 1, key: 3})
    assert [(len(v.examples), v.result.steps) for v in visited] == [(2 * 4 * 3, 2)] * 2


def test_warmup_lowers_the_learning_rate_of_the_first_steps(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    set_rate = training.set_learning_rate

    def remember(optimizer: torch.optim.Optimizer, rate: float) -> None:
        set_rate(optimizer, rate)
        rates.extend(group["lr"] for group in optimizer.param_groups)

    monkeypatch.setattr(training, "set_learning_rate", remember)
    play(
        settings,
        **{
            "num-server-rounds": 1,
            "strategy.fraction-train": 0.25,
            "train.learning-rate-max": 0.004,
            "train.learning-rate-min": 0.004,
            "train.training-arguments.max-steps": 4,
            "train.training-arguments.warmup-steps": 3,
            "train.training-arguments.lr-scheduler-type": "constant_with_warmup",
        },
    )
    assert rates == pytest.approx([0.001, 0.002, 0.003, 0.004])
