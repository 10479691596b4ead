"""Every file in configs/ is a whole recipe that both `grandrounds run` and `flwr run` take."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from grandrounds.config import recipes
from grandrounds.config.keys import FIELD_OF_KEY, Config
from grandrounds.config.strategies import STRATEGIES
from grandrounds.config.values import Scalar
from grandrounds.study.plan import masks
from tests.places import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
COHORT_SIZES = {
    "jsl-medllama-3-8b": 3,
    "jsl-medllama-3-8b-100-rounds": 3,
    "qwen2.5-7b-instruct": 3,
    "llama3.1-aloe-8b": 2,
    "mistral-7b-flowertune-baseline": 2,
    "smollm2-135m-laptop": 2,
    "smollm2-135m-instruct": 4,
    "private-consortium": 5,
    "formulary-dpo": 4,
}
PRIVATE = "private-consortium"
"""The recipe with private visits and masks; updates of all others are plain."""

PREFERENCES = "formulary-dpo"
"""The recipe that trains on preferences; all others on answers."""

OBJECTIVE = {
    "train.objective",
    "train.dpo-beta",
    "train.dpo-length-normalised",
    "train.dpo-reference",
    "data.rejected-column",
}

COMPRESSED = "llama3.1-aloe-8b"
"""The recipe whose adapters are compressed both ways; all others send float32."""

COMPRESSED_BY_US = (
    *("communication.uplink-codec", "communication.downlink-codec"),
    "train.optimizer",  # named in the entry's README only
)

LEADERBOARD = [
    name for name in COHORT_SIZES if not name.startswith(("smollm2", PRIVATE, PREFERENCES))
]

PRIVACY = {"secure-aggregation", *(key for key in FIELD_OF_KEY if key.startswith("privacy."))}

LEFT_OUT = {
    *PRIVACY,
    *OBJECTIVE,
    *(key for key in FIELD_OF_KEY if key.startswith("personalisation.")),
    # of one run or one machine, not of a recipe
    "run-directory",
    "resume-from",
    "earlier-schedules",
    "consortium",
    "train.num-threads",
    "train.replay-examples",
    "train.cpu-matmul",
    "train.fused-kernels",
    "train.devices",
    "train.report-to",
    "strategy.round-timeout-seconds",
    "strategy.min-sites",
    "strategy.connect-timeout-seconds",
    # the main branch; the template of a prompt that these recipes do not use
    "model.revision",
    "static.dataset.config",
    "static.dataset.split",
    "static.dataset.revision",
    "data.train-on",
    "model.lora.use-rslora",
    "model.lora.from-adapter",
    "model.lora.from-adapter-sha256",
    "model.lora.rank-pattern",
    "model.lora.alpha-pattern",
    "data.template-date",
    "data.template-options",
    "data.system-prompt",
    "data.subgroup-columns",
    # one value allowed, or the same as another key
    "train.training-arguments.output-dir",
    "train.training-arguments.learning-rate",
    "train.training-arguments.gradient-checkpointing",
    # how a batch goes through the model: what is learned is the same
    "train.response-only-logits",
    "train.logits-chunk-tokens",
    "train.training-arguments.torch-compile",
    # without effect
    "train.training-arguments.num-train-epochs",
    "train.training-arguments.logging-steps",
    "train.training-arguments.save-steps",
    "train.training-arguments.save-total-limit",
    # of partitioners other than iid
    "data.partition-by",
    "data.dirichlet-alpha",
    # of other aggregation rules, of codecs and of what is switched off
    *(f"strategy.{key}" for asks in STRATEGIES.values() for key in asks.keys),
    "strategy.outer-nesterov",
    "communication.downlink",
    "communication.catch-up-codec",
    "communication.block-size",
    "communication.kept-share",
    "communication.entropy-coding",
    "defence.update-norm-bound",
    "defence.min-cosine",
    "defence.largest-spread",
    "defence.preset",
}
"""Keys that change nothing in these recipes, whatever their default; all others are explicit."""

TEMPLATE: dict[str, Scalar] = {
    "model.quantization": 4,
    "model.gradient-checkpointing": True,
    "train.seq-length": 512,
    "train.learning-rate-min": 1e-6,
    "train.training-arguments.output-dir": "",
    "train.training-arguments.learning-rate": "",
    "train.training-arguments.per-device-train-batch-size": 16,
    "train.training-arguments.gradient-accumulation-steps": 1,
    "train.training-arguments.num-train-epochs": 3,
    "train.training-arguments.save-steps": 1000,
    "train.training-arguments.save-total-limit": 10,
    "train.training-arguments.gradient-checkpointing": True,
    "strategy.fraction-evaluate": 0.0,
    "static.dataset.name": "medalpaca/medical_meadow_medical_flashcards",
}
"""Keys and values that the FlowerTune template and the entries made from it have in common."""

ENTRIES: dict[str, dict[str, Scalar]] = {
    "mistral-7b-flowertune-baseline": {
        "model.name": "mistralai/Mistral-7B-v0.3",
        "model.lora.peft-lora-r": 32,
        "model.lora.peft-lora-alpha": 64,
        "train.save-every-round": 5,
        "train.learning-rate-max": 5e-5,
        "train.training-arguments.logging-steps": 10,
        "train.training-arguments.max-steps": 10,
        "train.training-arguments.lr-scheduler-type": "constant",
        "strategy.fraction-fit": 0.1,
        "num-server-rounds": 200,
    },
    "qwen2.5-7b-instruct": {
        "model.name": "Qwen/Qwen2.5-7B-Instruct",
        "model.lora.peft-lora-r": 8,
        "model.lora.peft-lora-alpha": 32,
        "train.save-every-round": 5,
        "train.learning-rate-max": 5e-5,
        "train.training-arguments.logging-steps": 1,
        "train.training-arguments.max-steps": 6,
        "train.training-arguments.warmup-steps": 2,
        "train.training-arguments.max-grad-norm": 1.0,
        "train.training-arguments.lr-scheduler-type": "constant_with_warmup",
        "train.training-arguments.fp16": False,
        "train.training-arguments.bf16": True,
        "train.training-arguments.tf32": True,
        "train.training-arguments.optim": "paged_adamw_8bit",
        "strategy.fraction-fit": 0.15,
        "num-server-rounds": 100,
    },
    "llama3.1-aloe-8b": {
        "model.name": "HPAI-BSC/Llama3.1-Aloe-Beta-8B",
        "model.lora.peft-lora-r": 32,
        "model.lora.peft-lora-alpha": 128,
        "train.save-every-round": 5,
        "train.learning-rate-max": 1e-4,
        "train.learning-rate-min": 1e-5,
        "train.training-arguments.gradient-accumulation-steps": 2,
        "train.training-arguments.logging-steps": 10,
        "train.training-arguments.max-steps": 10,
        "train.training-arguments.lr-scheduler-type": "constant",
        "strategy.fraction-train": 0.1,
        "num-server-rounds": 10,
    },
}
"""The rest of `[tool.flwr.app.config]` of the template and of the entry, as published."""


def config_of(name: str) -> Config:
    """Return a recipe of this repository, resolved."""
    return recipes.resolve(recipes.load_recipe(ROOT / "configs" / f"{name}.toml"))


def test_the_recipes_are_the_ones_listed_here() -> None:
    assert {path.stem for path in CONFIGS} == set(COHORT_SIZES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_header_says_what_it_is_how_to_run_it_and_where_it_comes_from(path: Path) -> None:
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    header = "\n".join(comments)
    assert path.read_text().startswith(header)
    assert comments[0].endswith(".")
    assert f"grandrounds run --config configs/{path.name}\n" in header
    assert f"flwr run . --stream --run-config configs/{path.name} " in header
    assert re.search(r"Source: https://\S+", header)
    assert "https://flower.ai/apps/flwrlabs/flowertune-llm-medical/" in header


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_federation_in_the_header_is_one_that_flower_reads(path: Path) -> None:
    from flwr.common.config import parse_config_args

    text = re.search(r"--federation-config '([^']*)'", path.read_text())
    assert text
    federation = parse_config_args([text[1]])
    assert federation["num-supernodes"] == config_of(path.stem).data.num_partitions
    gpus = federation.get("client-resources-num-gpus", 0)
    assert bool(gpus) == (config_of(path.stem).model.quantization == 4)
    assert set(federation) <= {
        "num-supernodes",
        "client-resources-num-cpus",
        "client-resources-num-gpus",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_key_that_matters_is_explicit(path: Path) -> None:
    keys = set(FIELD_OF_KEY) - LEFT_OUT
    if path.stem == PRIVATE:
        unused = {"privacy.noise-multiplier", "privacy.sampling-rate", "privacy.report-train-loss"}
        keys |= PRIVACY - unused | {"data.partition-by"}
    if path.stem == PREFERENCES:
        keys |= OBJECTIVE
    if path.stem == COMPRESSED:
        keys |= {f"communication.{key}" for key in ("downlink", "block-size", "entropy-coding")}
    assert set(recipes.load_recipe(path)) == keys


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_left_out_keys_do_not_matter_here(path: Path) -> None:
    config = config_of(path.stem)
    assert config.arguments.max_steps > 0
    assert config.data.partitioner in ("iid", "natural")
    assert not STRATEGIES[config.strategy.name].keys
    assert config.is_private == config.is_masked == (path.stem == PRIVATE)
    assert config.is_on_pairs == (path.stem == PREFERENCES)
    codecs = {config.communication.uplink_codec, config.communication.downlink_codec}
    assert codecs == {"ternary" if path.stem == COMPRESSED else "none"}
    assert config.train.replay_examples == 0
    assert (config.defence.update_norm_bound, config.defence.screens) == (0, False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_flower_fuses_the_file_with_our_defaults_to_the_same_configuration(path: Path) -> None:
    """`flwr run --run-config FILE` reads the file with `parse_config_args`, then fuses."""
    from flwr.common.config import flatten_dict, fuse_dicts, parse_config_args

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    defaults = flatten_dict(project["tool"]["flwr"]["app"]["config"])
    fused = fuse_dicts(defaults, parse_config_args([str(path)]))
    assert recipes.resolve(fused) == config_of(path.stem)


@pytest.mark.parametrize(("name", "size"), COHORT_SIZES.items())
def test_cohort_sizes(name: str, size: int) -> None:
    assert config_of(name).cohort_size == size
    assert config_of(name).data.num_partitions == (5 if name == PRIVATE else 20)


def test_the_compressed_recipe_is_planned_under_a_tenth_of_a_gigabyte() -> None:
    from grandrounds.study.plan.forecast import forecast

    plan = forecast(config_of(COMPRESSED)).plan
    assert plan.total_bytes / 2**20 == pytest.approx(54.49, abs=0.01)  # as its header says
    assert plan.total_bytes < 1e8
    published = {  # as its header says, too
        "strategy.name": "fedavg",
        "communication.uplink-codec": "none",
        "communication.downlink-codec": "none",
        "communication.downlink": "complete",
    }
    recipe = recipes.load_recipe(ROOT / "configs" / f"{COMPRESSED}.toml")
    entry = forecast(recipes.resolve(recipe, published)).plan
    assert entry.total_bytes_with_key_names / 2**20 == pytest.approx(2080.93, abs=0.005)


@pytest.mark.parametrize("name", LEADERBOARD)
def test_leaderboard_recipes_are_comparable_with_the_leaderboard(name: str) -> None:
    config = config_of(name)
    assert recipes.leaderboard_differences(config) == []
    assert config.data.held_out_fraction == 0
    assert config.strategy.fraction_evaluate == 0
    assert config.lora.dropout == 0.075


@pytest.mark.parametrize("name", ENTRIES)
def test_recipe_is_the_published_entry_but_for_what_its_header_names(
    name: str, tmp_path: Path
) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\nname = "entry"\n[tool.flwr.federations]\ndefault = "local-simulation"\n'
        "[tool.flwr.federations.local-simulation]\noptions.num-supernodes = 20\n"
        f"[tool.flwr.app.config]\n{recipes.to_toml(TEMPLATE | ENTRIES[name])}"
    )
    entry = recipes.resolve(recipes.load_recipe(project))
    ours = config_of(name)
    named = {
        "seed",  # FlowerTune's partition seed
        "model.lora.target-modules",  # set in the entry's code, or PEFT's choice
        "strategy.name",  # FedProx in the entry's code
        "strategy.proximal-mu",
        "model.gradient-checkpointing",  # only where memory asks for it
        "train.training-arguments.gradient-checkpointing",  # the same as the model's
        "train.batching",  # the template pads
        *(COMPRESSED_BY_US if name == COMPRESSED else ()),
        *LEFT_OUT,
    }
    differing = {line.partition(":")[0] for line in recipes.differences(entry, ours)}
    assert differing <= named


def test_jsl_recipe_has_the_published_numbers() -> None:
    flat = config_of("jsl-medllama-3-8b").flat()
    published = {
        "model.name": "johnsnowlabs/JSL-MedLlama-3-8B-v1.0",
        "num-server-rounds": 10,
        "model.quantization": 4,
        "model.lora.peft-lora-r": 8,
        "model.lora.peft-lora-alpha": 32,
        "model.lora.target-modules": "q_proj,v_proj",
        "model.lora.dropout": 0.075,
        "train.training-arguments.per-device-train-batch-size": 16,
        "train.training-arguments.gradient-accumulation-steps": 1,
        "train.training-arguments.max-steps": 6,
        "train.training-arguments.warmup-steps": 2,
        "train.training-arguments.lr-scheduler-type": "constant_with_warmup",
        "train.training-arguments.bf16": True,
        "train.training-arguments.tf32": True,
        "train.training-arguments.max-grad-norm": 1.0,
        "train.optimizer": "paged_adamw_8bit",
        "train.learning-rate-max": 1e-5,
        "train.learning-rate-min": 1e-6,
        "train.seq-length": 512,
        "train.save-every-round": 4,
        "strategy.name": "fedprox",
        "strategy.proximal-mu": 0.01,
        "strategy.fraction-train": 0.15,
        "static.dataset.name": "medalpaca/medical_meadow_medical_flashcards",
    }
    assert {key: flat[key] for key in published} == published


def test_long_jsl_recipe_differs_in_rounds_only() -> None:
    short, long = config_of("jsl-medllama-3-8b"), config_of("jsl-medllama-3-8b-100-rounds")
    assert recipes.differences(short, long) == ["num-server-rounds: 10 → 100"]


def test_the_private_consortium_hides_patients_and_masks_a_linear_rule() -> None:
    """Noised B factors, summed under masks; no value can leave the masks' range."""
    config = config_of(PRIVATE)
    assert config.strategy.name == "ffa"
    assert config.privacy.unit_guarantee == "example"
    assert config.federation.secure_aggregation == "masked32"
    assert masks.leaves_range(config) == ""


def test_laptop_recipe_needs_neither_gpu_nor_bitsandbytes() -> None:
    config = config_of("smollm2-135m-laptop")
    assert config.model.quantization == 0
    assert config.model.dtype == "float32"
    assert config.train.optimizer == "adamw_torch"
    assert config.strategy.fraction_evaluate > 0
