"""What published FlowerTune entries write in their pyproject.toml, and what is made of it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config.entries import IN_CODE
from grandrounds.config.keys import Config
from grandrounds.config.recipes import from_options, load_recipe, notes, resolve
from grandrounds.errors import ConfigError, ModelError
from grandrounds.study import preflight
from grandrounds.study.plan.forecast import forecast

LEAST = """
model.name = "org/base"
static.dataset.name = "org/cards"
"""
"""The keys without which an entry says nothing."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pyproject.toml"


def written(file: Path, lines: str, rest: str = "") -> Path:
    file.write_text(f'[project]\nname = "entry"\n[tool.flwr.app.config]\n{lines}\n{rest}')
    return file


def resolved(file: Path, lines: str) -> Config:
    return resolve(load_recipe(written(file, lines)))


SITES = "[tool.flwr.federations]\ndefault = 'a'\n[tool.flwr.federations.a]\n"
"""A federation; its number of sites follows."""


@dataclass(frozen=True)
class Row:
    """What is seen in published entries, and what is made of it."""

    lines: str
    """Of `[tool.flwr.app.config]`, beside `LEAST`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys with the values that are right."""
    said: str = ""
    """Part of a note; empty if nothing need be said."""
    refused: str = ""
    """Part of the error; empty if the entry can be run."""
    given: str = ""
    """What `--set` gives."""


ROWS = {
    "underscores": Row(
        "train.training_arguments.warmup_steps = 0\nstrategy.proximal_mu = 0\n"
        'model.lora.peft_lora_target_modules = "q_proj"',
        {"strategy.proximal-mu": 0, "model.lora.target-modules": "q_proj"},
    ),
    "FlexLoRA on": Row("use_flexlora = 1", {"strategy.name": "product"}),
    "FlexLoRA off": Row('strategy.use-flexlora = "off"', {"strategy.name": "fedavg"}),
    "FlexLoRA by its rule": Row(
        'use-flexlora = true\nstrategy.name = "product"', {"strategy.name": "product"}
    ),
    "no FlexLoRA and another rule": Row(
        'use-flexlora = false\nstrategy.name = "fedprox"\nstrategy.proximal-mu = 0.1',
        {"strategy.name": "fedprox"},
    ),
    "FlexLoRA and another rule": Row(
        'use-flexlora = true\nstrategy.name = "fedprox"\nstrategy.proximal-mu = 0.1',
        refused="use-flexlora = True and strategy.name = 'fedprox' contradict each other",
    ),
    "FlexLoRA on and off": Row(
        "use-flexlora = true\nstrategy.use_flexlora = false",
        refused="strategy.use-flexlora = False and use-flexlora = True contradict each other",
    ),
    "FlexLoRA of no meaning": Row(
        'use-flexlora = "enabled"', refused="use-flexlora = 'enabled' must be true or false"
    ),
    "all modules": Row(
        'model.lora.peft_lora_target_modules = "all"', {"model.lora.target-modules": "all-linear"}
    ),
    "modules of which some match nothing": Row(
        'model.lora.peft_lora_target_modules = ["q_proj", "W_pack"]',
        {"model.lora.target-modules": "q_proj?,W_pack?"},
    ),
    "fraction-train given over fraction-fit": Row(
        "strategy.fraction-fit = 0.1",
        {"strategy.fraction-train": 0.3},
        given="strategy.fraction-train=0.3",
    ),
    "DoRA": Row("model.lora.peft-use-dora = true", {"model.lora.peft-use-dora": True}),
    "DoRA with FlexLoRA": Row(
        'model.lora.peft-use-dora = true\nstrategy.use-flexlora = "on"',
        refused="does not go with strategy.name = 'product'",
    ),
    "rank-stabilised LoRA": Row("model.lora.use-rslora = true", {"model.lora.use-rslora": True}),
    "a trainer's learning rate": Row(
        "train.training-arguments.learning-rate = 5e-5",
        refused="it must be empty. Set train.learning-rate-max",
    ),
    "no DoRA": Row("model.lora.peft-use-dora = false", {"model.lora.peft-use-dora": False}),
    "warm-up of a constant schedule": Row(
        "train.training-arguments.warmup-steps = 2\n"
        'train.training-arguments.lr-scheduler-type = "constant"',
        {"train.training-arguments.warmup-steps": 0},
        said="warmup-steps = 2 has no effect",
    ),
    "linear": Row(
        'train.training-arguments.lr-scheduler-type = "linear"',
        {"train.training-arguments.lr-scheduler-type": "linear"},
    ),
    "cosine": Row(
        'train.training-arguments.lr-scheduler-type = "cosine"',
        {"train.training-arguments.lr-scheduler-type": "cosine"},
    ),
    "Unsloth's checkpointing": Row(
        'model.gradient-checkpointing = "unsloth"',
        {"model.gradient-checkpointing": True},
        said="= 'unsloth' is read as true: activations are recomputed",
    ),
    "Unsloth's checkpointing, twice": Row(
        'model.gradient-checkpointing = "unsloth"\n'
        'train.training-arguments.gradient-checkpointing = "unsloth"',
        {"train.training-arguments.gradient-checkpointing": True},
    ),
    "Weights & Biases": Row(
        "use-wandb = true",
        {"train.report-to": "none"},
        said="use-wandb = true is not used: a run logs to a tracker only if",
    ),
    "no Weights & Biases": Row("use_wandb = false", {"train.report-to": "none"}),
    "a trainer's tracker": Row(
        'train.training-arguments.report-to = "wandb"',
        {"train.report-to": "none"},
        said="report-to = wandb is not used",
    ),
    "a run's name": Row(
        'train.training-arguments.run-name = "third"', said="is named by its directory: --run-dir"
    ),
    "an attention": Row('model.attn = "sdpa"', said="model.attn = sdpa is not used: attention"),
    "modules": Row('model.lora.modules = "v_proj"', {"model.lora.target-modules": "v_proj"}),
    "dropout": Row("model.lora.peft-lora-dropout = 0.1", {"model.lora.dropout": 0.1}),
    "no federation": Row(
        "", {"data.num-partitions": 20}, said="values are used: model.quantization = 4"
    ),
    "no federation, said": Row("", said="data.num-partitions = 20"),
    "a fraction of one site": Row(
        "strategy.fraction-fit = 0.05",
        {"strategy.fraction-train": 0.05},
        said="a fraction of 0.05 of 20 sites is 1 site a round; Flower's FedAvg would train 2",
    ),
    "another task": Row(
        'task.name = "finance"', refused="task.name = 'finance' cannot be honoured"
    ),
    "formats left out": Row("", {"train.training-arguments.bf16": True}, said="bf16 and tf32"),
    "one format left out": Row(
        "train.training-arguments.bf16 = false",
        {"train.training-arguments.bf16": False},
        said="the entry does not set tf32: it is used",
    ),
}
"""Situation → a small file for it."""


@pytest.mark.parametrize("name", ROWS)
def test_what_published_entries_write_is_read_said_or_refused(file: Path, name: str) -> None:
    row = ROWS[name]
    path = written(file, LEAST + row.lines)
    given = [row.given] if row.given else None
    if row.refused:
        with pytest.raises(ConfigError, match=re.escape(row.refused)):
            resolve(from_options(path, given))
        return
    settings = from_options(path, given)
    flat = resolve(settings).flat()
    assert {key: flat[key] for key in row.settings} == row.settings
    assert any(row.said in note for note in notes(settings, path))


@pytest.mark.parametrize(
    "base",
    [
        "ContactDoctor/Bio-Medical-Llama-3-8B",
        "dmis-lab/meerkat-7b-v1.0",
        "microsoft/Phi-4-mini-instruct",
        "Qwen/Qwen3-4B",
        "Qwen/Qwen3-8B",
        "google/gemma-2-2b-it",
        "google/gemma-2-9b-it",
        "codellama/CodeLlama-7b-hf",
        "codellama/CodeLlama-13b-Instruct-hf",
        "deepseek-ai/deepseek-coder-1.3b-base",
        "deepseek-ai/deepseek-coder-6.7b-instruct",
        "deepseek-ai/deepseek-coder-7b-instruct-v1.5",
    ],
)
def test_the_bases_of_entries_are_planned_offline(file: Path, base: str) -> None:
    """Their shapes were unknown, so that 15 entries could not be planned."""
    lines = LEAST.replace("org/base", base) + 'model.lora.target-modules = "all-linear"'
    planned = forecast(resolved(file, lines), rows=1000)
    assert planned.plan.total_bytes > 0


def test_targets_that_match_nothing_are_named(file: Path) -> None:
    lines = LEAST.replace("org/base", "Qwen/Qwen3-4B") + "model.lora.target-modules = {}"
    config = resolved(file, lines.format('["v_proj", "W_pack", "q_proj"]'))
    assert forecast(config, rows=1000).targets == ["v_proj", "q_proj"]
    (told,) = (line for line in preflight.check(config) if "match nothing" in line)
    assert told.startswith("W_pack of model.lora.target-modules match nothing in Qwen/Qwen3-4B: ")
    for modules, why in (
        ('["W_pack", "c_attn"]', "'W_pack,c_attn' names no module of 'Qwen/Qwen3-4B'"),
        ('["q_proj", "lm_head"]', "'lm_head', an output head or an embedding"),
    ):
        with pytest.raises(ModelError, match=re.escape(why)):
            preflight.check(resolved(file, lines.format(modules)))


@pytest.mark.parametrize("key", ["model.name", "static.dataset.name"])
def test_an_entry_without_its_base_or_data_is_refused(file: Path, key: str) -> None:
    """30 of 258 published versions; each trained the packaged base or data and said completed."""
    rest = "".join(line + "\n" for line in LEAST.splitlines() if not line.startswith(key))
    with pytest.raises(ConfigError, match=f"{key} is empty"):
        resolved(file, rest)
    given = from_options(written(file, rest), None, model="a/b", data="c/d")
    assert resolve(given).model.name == "a/b"


def test_what_an_entry_leaves_out_is_the_templates_and_said(file: Path) -> None:
    """The packaged values are 24 rounds, rank 16 and 4 of 20 sites."""
    config = resolved(file, LEAST)
    assert config.federation.num_server_rounds == 200
    assert (config.lora.peft_lora_r, config.lora.peft_lora_alpha) == (32, 64)
    assert config.strategy.fraction_train == 0.1
    assert (config.arguments.max_steps, config.train.learning_rate_max) == (10, 5e-5)
    assert config.model.quantization == 4
    flat = config.flat()
    assert {key: flat[key] for key in IN_CODE} == IN_CODE
    said, formats = notes(load_recipe(file), file)
    assert "template's values are used: model.quantization = 4," in said
    assert "data.num-partitions = 20" in said
    assert "does not set bf16 and tf32" in formats
    settings = from_options(file, ["num-server-rounds=3"])
    assert "num-server-rounds" not in notes(settings, file)[0]


def test_hyphens_and_underscores_are_the_same(file: Path) -> None:
    config = resolved(
        file,
        LEAST + 'strategy.name = "fedprox"\nstrategy.proximal_mu = 0.5\n'
        "train.training_arguments.max_steps = 7\nmodel.lora.peft_lora_r = 4\n"
        'model.lora.peft_lora_target_modules = "q_proj"\n',
    )
    assert (config.strategy.proximal_mu, config.arguments.max_steps) == (0.5, 7)
    assert (config.lora.peft_lora_r, config.lora.target_modules) == (4, "q_proj")
    with pytest.raises(ConfigError, match=r"max-steps = 6 and \S+max_steps = 7 are the same key"):
        resolved(
            file,
            LEAST + "train.training-arguments.max-steps = 6\n"
            "train.training-arguments.max_steps = 7\n",
        )


@pytest.mark.parametrize("key", ["strategy.use-flexlora", "use-flexlora", "use_flexlora"])
@pytest.mark.parametrize(
    ("value", "rule"),
    [("true", "product"), ("1", "product"), ('"on"', "product"), ("0", "fedavg")],
)
def test_flexlora_is_read_in_its_three_spellings(
    file: Path, key: str, value: str, rule: str
) -> None:
    assert resolved(file, f"{LEAST}{key} = {value}").strategy.name == rule


@pytest.mark.parametrize(
    ("value", "targets"),
    [
        ('"all"', "all-linear"),
        ('"all_linear"', "all-linear"),
        ('"ALL-LINEAR"', "all-linear"),
        ('["q_proj", "v_proj"]', "q_proj?,v_proj?"),
        ('"[q_proj, v_proj]"', "q_proj?,v_proj?"),
        ('"q_proj"', "q_proj"),
    ],
)
def test_targets_may_be_all_or_a_list_of_which_some_match(
    file: Path, value: str, targets: str
) -> None:
    config = resolved(file, f"{LEAST}model.lora.peft_lora_target_modules = {value}")
    assert config.lora.target_modules == targets


def test_the_command_line_wins_over_an_alias_in_the_file(file: Path) -> None:
    """216 of 224 entries set fraction-fit; with --set fraction-train they were contradictions."""
    path = written(file, f"{LEAST}strategy.fraction-fit = 0.1")
    assert resolve(load_recipe(path)).strategy.fraction_train == 0.1
    given = resolve(from_options(path, ["strategy.fraction-train=0.3"]))
    assert given.strategy.fraction_train == 0.3
    between = resolve(load_recipe(path), {"strategy.fraction-train": 0.3})  # as site approve does
    assert between.strategy.fraction_train == 0.3
    path = written(file, f"{LEAST}strategy.fraction-train = 0.1")
    assert resolve(from_options(path, ["strategy.fraction-fit=0.3"])).strategy.fraction_train == 0.3


def test_a_constant_schedule_has_no_warm_up(file: Path) -> None:
    arguments = "train.training-arguments."
    lines = f'{LEAST}{arguments}warmup-steps = 2\n{arguments}lr-scheduler-type = "constant"\n'
    assert resolved(file, lines).arguments.warmup_steps == 0
    assert any("warmup-steps = 2 has no effect" in note for note in notes(load_recipe(file), file))


def test_the_sites_of_the_default_federation_are_read(file: Path) -> None:
    path = written(file, LEAST, f"{SITES}options.num-supernodes = 7\n")
    assert resolve(load_recipe(path)).data.num_partitions == 7
    assert "num-partitions" not in notes(load_recipe(path), path)[0]


def test_another_projects_pyproject_is_told_as_one(file: Path) -> None:
    file.write_text('[project]\nname = "something"\nversion = "1"\n')
    with pytest.raises(ConfigError, match=r"without \[tool.flwr.app.config\], so no FlowerTune"):
        load_recipe(file)
    with pytest.raises(ConfigError, match=r"of another Flower app and no FlowerTune entry: its"):
        load_recipe(written(file, "num-server-rounds = 3\nlearning-rate = 0.1\n"))


def test_instructions_of_another_task_are_part_of_its_questions(file: Path) -> None:
    """239 of 400 rows were "empty", and the run went on with the others."""
    cards = file.with_name("cards.jsonl")
    rows = [
        {"instruction": f"Tell {i}.", "input": "it" * (i % 2), "output": "Yes."} for i in range(40)
    ]
    cards.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = LEAST.replace("org/cards", str(cards))
    told = preflight.check(resolved(file, lines))
    assert any("Alpaca triples: instruction and input make the question" in line for line in told)
    both = resolved(file, f'{lines}data.question-column = "instruction,input"')
    assert not any("left out" in told for told in preflight.check(both))


def test_a_plan_of_an_entry_says_what_it_took_from_the_template(file: Path) -> None:
    path = written(file, LEAST.replace("org/base", "mistralai/Mistral-7B-v0.3"))
    done = CliRunner().invoke(app, ["plan", str(path), "--plain"])
    assert done.exit_code == 0, done.output
    assert "template's values are used" in " ".join(done.output.split())
