"""Published entries: offline to the hub's door, on a tiny stand-in of their base to the end.

Their texts are written for the tests, with what was seen in published ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from tests.runs import config_of, read_json, summary_of
from tests.tiny_models import tiny_bases

HEAD = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "entry"
version = "1.0.0"
dependencies = ["flwr[simulation]>=1.13.1", "peft==0.6.2", "trl==0.8.1"]

[tool.flwr.app]
publisher = "someone"

[tool.flwr.app.components]
serverapp = "entry.server_app:app"
clientapp = "entry.client_app:app"
"""

HYPHENS = """
model.quantization = 0
model.gradient-checkpointing = true
model.lora.peft-lora-r = 4
model.lora.peft-lora-alpha = 8
train.save-every-round = 5
train.learning-rate-max = 5e-3
train.learning-rate-min = 1e-3
train.seq-length = 512
train.training-arguments.output-dir = ""
train.training-arguments.learning-rate = ""
train.training-arguments.per-device-train-batch-size = 4
train.training-arguments.gradient-accumulation-steps = 1
train.training-arguments.logging-steps = 10
train.training-arguments.num-train-epochs = 3
train.training-arguments.max-steps = 2
train.training-arguments.save-steps = 1000
train.training-arguments.save-total-limit = 10
train.training-arguments.gradient-checkpointing = true
strategy.fraction-fit = 0.1
strategy.fraction-evaluate = 0.0
num-server-rounds = 200
"""

UNDERSCORES = "".join(
    line if '"' in line else line.replace("-", "_").replace("e_", "e-")
    for line in HYPHENS.splitlines(keepends=True)
)

FEDERATION = """
[tool.flwr.federations]
default = "local-simulation"
[tool.flwr.federations.local-simulation]
options.num-supernodes = 20
"""


@dataclass(frozen=True)
class Entry:
    """A published entry, and what is made of it."""

    base: str
    """`model.name`."""
    tiny: str
    """Its stand-in: a row of `tiny_bases.BASES`, of the same architecture."""
    lines: str
    """What it sets besides the usual."""
    usual: str = HYPHENS
    federation: str = FEDERATION
    data: str = "medalpaca/medical_meadow_medical_flashcards"
    given: tuple[str, ...] = ()
    """Options of the command."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys of the run, with the values that are right."""
    adapted: str = "q_proj v_proj"
    """The modules that are adapted."""
    said: tuple[str, ...] = ()
    """Parts of what the run says."""

    def written(self, folder: Path) -> Path:
        """Write its pyproject.toml."""
        file = folder / "pyproject.toml"
        file.write_text(
            f'{HEAD}\n[tool.flwr.app.config]\nmodel.name = "{self.base}"\n'
            f'static.dataset.name = "{self.data}"\n{self.usual}{self.lines}\n{self.federation}'
        )
        return file


SCHEDULE = "train.training-arguments.lr-scheduler-type"
EVERY = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"

ENTRIES = {
    "FlexLoRA on all modules, in underscores, on Mistral": Entry(
        "mistralai/Mistral-7B-v0.3",
        "mistral",
        'use_flexlora = true\nmodel.lora.peft_lora_target_modules = "all"\n'
        'train.training_arguments.lr_scheduler_type = "linear"\n'
        "train.training_arguments.warmup_steps = 1",
        usual=UNDERSCORES,
        settings={"strategy.name": "product", SCHEDULE: "linear", "model.lora.peft-lora-r": 4},
        adapted=EVERY,
    ),
    "DoRA in 4 bits on modules of which some match nothing, on Qwen2.5": Entry(
        "Qwen/Qwen2.5-7B-Instruct",
        "qwen2",
        'model.lora.peft_lora_target_modules = ["q_proj", "W_pack", "v_proj"]\n'
        f'{SCHEDULE} = "constant"\ntrain.training-arguments.warmup-steps = 2\n'
        "model.lora.peft_use_dora = true",
        usual=HYPHENS.replace("quantization = 0", "quantization = 4"),
        settings={
            "train.training-arguments.warmup-steps": 0,
            "model.quantization": 4,
            "model.lora.peft-use-dora": True,
        },
        said=("W_pack", "warmup-steps = 2 has no effect with lr-scheduler-type = 'constant'"),
    ),
    "Unsloth, a tracker, no federation and one site a round, on Gemma 2": Entry(
        "google/gemma-2-9b-it",
        "gemma2",
        'model.attn = "flash_attention_2"\nuse-wandb = true\nrun-name = "third"\n'
        'strategy.use-flexlora = "off"',
        usual=HYPHENS.replace("checkpointing = true", 'checkpointing = "unsloth"').replace(
            "fit = 0.1", "fit = 0.05"
        ),
        federation="",
        settings={"data.num-partitions": 20, "train.report-to": "none", "strategy.name": "fedavg"},
        said=(
            "'unsloth' is read as true",
            "use-wandb = true is not used",
            "data.num-partitions = 20",
            "0.05 of 20 sites is 1 site a round; Flower's FedAvg would train 2",
        ),
    ),
    "a fraction on the command line over one in the file, on a medical Llama 3": Entry(
        "ContactDoctor/Bio-Medical-Llama-3-8B",
        "llama",
        f'{SCHEDULE} = "cosine"\nuse_flexlora = 0\nmodel.lora.peft-use-rslora = true',
        given=("--set", "strategy.fraction-train=0.15"),
        settings={
            "strategy.fraction-train": 0.15,
            SCHEDULE: "cosine",
            "model.lora.use-rslora": True,
        },
        said=("does not set bf16 and tf32", "rsLoRA r 4"),
    ),
    "DoRA on all modules, on a Llama 3.1": Entry(
        "meta-llama/Llama-3.1-8B-Instruct",
        "llama",
        'model.lora.peft-use-dora = true\nmodel.lora.peft_lora_target_modules = "all"',
        settings={"model.lora.peft-use-dora": True, "strategy.name": "fedavg"},
        adapted=EVERY,
        said=("DoRA, LoRA r 4, alpha 8",),
    ),
    "DoRA by its other name, on a SmolLM2": Entry(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "llama",
        'model.lora.use_dora = true\nstrategy.use-flexlora = false\nmodel.lora.modules = "q_proj"',
        settings={"model.lora.peft-use-dora": True},
        adapted="q_proj",
    ),
    "FlexLoRA as 1 on the fused modules of Phi-4 mini": Entry(
        "microsoft/Phi-4-mini-instruct",
        "phi3",
        'strategy.use-flexlora = 1\nmodel.lora.peft-target-modules = "all-linear"',
        settings={"strategy.name": "product"},
        adapted="down_proj gate_up_proj o_proj qkv_proj",
    ),
    "another task's data without its name, on Qwen3": Entry(
        "Qwen/Qwen3-4B",
        "qwen3",
        'model.lora.modules = "v_proj"\ntrain.training-arguments.bf16 = false\n'
        "train.training-arguments.tf32 = false",
        data="FinGPT/fingpt-sentiment-train",
        settings={"train.training-arguments.bf16": False},
        adapted="v_proj",
        said=("instruction and input make the question",),
    ),
    "ranks of single modules, and the start of every run by name, on a code Llama": Entry(
        "deepseek-ai/deepseek-coder-6.7b-instruct",
        "llama",
        "model.lora.peft_init_lora_weights = true\nmodel.lora.rank_pattern.q_proj = 2\n"
        'strategy.name = "fedprox"\nstrategy.proximal_mu = 0.01',
        settings={"model.lora.rank-pattern": '{"q_proj": 2}', "strategy.proximal-mu": 0.01},
        said=("r 4 (q_proj: 2)",),
    ),
}

SLOW = ("DoRA in 4 bits", "DoRA by its", "FlexLoRA as 1", "another task's", "a fraction on")


def started(*words: object) -> Any:
    return CliRunner().invoke(app, ["run", "--config", *map(str, words)])


def joined(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No base and no data set of the hub is on this machine, and the hub is not asked."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("name", ENTRIES)
def test_offline_an_entry_reaches_the_hubs_door(name: str, tmp_path: Path) -> None:
    entry, where = ENTRIES[name], tmp_path / "run"
    done = started(entry.written(tmp_path), *entry.given, "--run-dir", where)
    assert done.exit_code == 1, done.output
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("grandrounds: ")]
    assert f"The configuration of '{entry.base}' cannot be loaded" in line
    assert f"unset it, download the base before (hf download {entry.base})" in line
    assert not where.exists()


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from an architecture to a tiny random base of it."""

    @cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp("base")
        tiny_bases.make_base(tiny_bases.BASES[name], folder)
        return folder

    return made


def flashcards(medical: bool) -> Iterable[dict[str, str]]:
    """Yield rows in the columns of the medical task, or with instructions that count."""
    for i in range(100):
        if medical:
            task = "Answer this question truthfully"
            yield {"instruction": task, "input": f"What helps patient {i}?", "output": f"tea {i}"}
        else:
            yield {"instruction": f"Say {i}.", "input": "it" * (i % 2), "output": "Yes."}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n.startswith(SLOW) else n for n in ENTRIES],
)
def test_on_a_stand_in_of_its_base_an_entry_runs_to_the_end(
    name: str, tmp_path: Path, stand_in: Callable[[str], Path]
) -> None:
    entry, where, cards = ENTRIES[name], tmp_path / "run", tmp_path / "cards.jsonl"
    rows = flashcards("medalpaca" in entry.data)
    cards.write_text("".join(json.dumps(row) + "\n" for row in rows))
    instead = ("--model", stand_in(entry.tiny), "--data", cards, "--rounds", 2)
    done = started(entry.written(tmp_path), *entry.given, *instead, "--run-dir", where)
    assert done.exit_code == 0, done.output
    summary, flat = summary_of(where), config_of(where).flat()
    assert summary["status"] == "completed"
    assert summary["failed_replies"] == 0
    assert summary["communication_mib"] == summary["planned_mib"]
    assert {key: flat[key] for key in entry.settings} == entry.settings
    described = read_json(where / "peft_2" / "adapter_config.json")
    assert sorted(described["target_modules"]) == entry.adapted.split()
    said = joined(done.output)
    assert [part for part in entry.said if part not in said] == []


@pytest.mark.parametrize(
    ("usual", "lines", "exit_code", "told"),
    [
        (HYPHENS, "task.name = 'finance'", 2, "task.name = 'finance' cannot be honoured"),
        (HYPHENS, "model.lora.peft-init-lora-weights = 'olora'", 2, "OLoRA takes A and B from"),
        (HYPHENS, "use-flexlora = true\nstrategy.name = 'fedavg'", 2, "contradict each other"),
        (HYPHENS, "use-flexlora = 1\nmodel.lora.peft-use-dora = true", 2, "does not go with"),
        (UNDERSCORES, "model.lora.peft-lora-r = 8", 2, "are the same key and contradict"),
    ],
)
def test_what_cannot_be_honoured_is_refused_at_once(
    usual: str, lines: str, exit_code: int, told: str, tmp_path: Path
) -> None:
    entry = Entry("mistralai/Mistral-7B-v0.3", "mistral", lines, usual=usual)
    done = started(entry.written(tmp_path), "--run-dir", tmp_path / "run")
    assert (done.exit_code, told in joined(done.stderr)) == (exit_code, True), done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["model.name", "static.dataset.name"])
def test_an_entry_without_its_base_or_data_is_refused_at_once(key: str, tmp_path: Path) -> None:
    """Its own code reads them, and the packaged ones are not meant."""
    file = ENTRIES[next(iter(ENTRIES))].written(tmp_path)
    kept = [line for line in file.read_text().splitlines() if not line.startswith(key)]
    file.write_text("\n".join(kept))
    done = started(file, "--run-dir", tmp_path / "run")
    assert done.exit_code == 2
    assert f"{key} is empty" in done.stderr
    assert not (tmp_path / "run").exists()
