"""What people type elsewhere is refused with the key and the value that it means here."""

from __future__ import annotations

import tomllib

import pytest

from grandrounds.config import synonyms
from grandrounds.config.keys import ALIASES, FIELD_OF_KEY
from grandrounds.config.recipes import flatten, parse_overrides, resolve
from grandrounds.config.values import Scalar
from grandrounds.errors import ConfigError

BATCH = "train.training-arguments.per-device-train-batch-size"
EPOCHS = "train.training-arguments.num-train-epochs"


def refused(key: str, value: Scalar) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve({key: value})
    return str(caught.value)


@pytest.mark.parametrize(
    ("typed", "value", "written"),
    [
        ("lr", 1e-4, "train.learning-rate-max=0.0001"),
        ("learning-rate", 1e-4, "train.learning-rate-max=0.0001"),
        ("learning_rate", "1e-4", "train.learning-rate-max=0.0001"),
        ("learningRate", 1e-4, "train.learning-rate-max=0.0001"),
        ("train.lr", 1e-4, "train.learning-rate-max=0.0001"),
        ("r", 8, "model.lora.peft-lora-r=8"),
        ("lora_r", 8, "model.lora.peft-lora-r=8"),
        ("lora.rank", 8, "model.lora.peft-lora-r=8"),
        ("lora-alpha", 16, "model.lora.peft-lora-alpha=16"),
        ("alpha", 16, "model.lora.peft-lora-alpha=16"),
        ("data.alpha", 0.1, "data.dirichlet-alpha=0.1"),
        ("lora_dropout", 0.1, "model.lora.dropout=0.1"),
        ("target_modules", "q_proj", 'model.lora.target-modules="q_proj"'),
        ("batch-size", 8, f"{BATCH}=8"),
        ("batch_size", "8", f"{BATCH}=8"),
        ("per-device-train-batch-size", 4, f"{BATCH}=4"),
        ("rounds", 10, "num-server-rounds=10"),
        ("num_rounds", 10, "num-server-rounds=10"),
        ("epochs", 3, f"{EPOCHS}=3 and train.training-arguments.max-steps=-1"),
        ("max-steps", 6, "train.training-arguments.max-steps=6"),
        ("train.training-arguments.max_steps", 6, "train.training-arguments.max-steps=6"),
        ("num-clients", 4, "data.num-partitions=4"),
        ("model", "x/y", 'model.name="x/y"'),
        ("model_name_or_path", "x/y", 'model.name="x/y"'),
        ("dataset", "a.csv", 'static.dataset.name="a.csv"'),
        ("quantization", "4bit", "model.quantization=4"),
        ("quantization", "nf4", "model.quantization=4"),
        ("load_in_8bit", True, "model.quantization=8"),
        ("load_in_4bit", False, "model.quantization=0"),
        ("max_seq_length", 512, "train.seq-length=512"),
        ("mu", 0.1, "strategy.proximal-mu=0.1"),
        ("strategy", "FedAvg", 'strategy.name="fedavg"'),
        ("optim", "adamw", 'train.optimizer="adamw_torch"'),
        ("fp16", "True", "train.training-arguments.bf16=true"),
        ("wandb", True, 'train.report-to="wandb"'),
        ("use-wandb", True, 'train.report-to="wandb"'),
        ("use-wandb", False, 'train.report-to="none"'),
        ("train.training-arguments.report-to", "wandb", 'train.report-to="wandb"'),
        ("model.lora.peft-lora-dropout", 0.1, "model.lora.dropout=0.1"),
        ("output_dir", "runs/a", 'run-directory="runs/a"'),
        ("test_size", 0.1, "data.held-out-fraction=0.1"),
        ("clients_per_round", 2, "--sites-per-round 2"),
    ],
)
def test_a_key_of_elsewhere_is_answered_with_what_to_write(
    typed: str, value: Scalar, written: str
) -> None:
    message = refused(typed, value)
    assert f"Unknown configuration key {typed!r}." in message
    assert f"Write {written}" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "value", "written"),
    [
        ("model.quantization", "4bit", "model.quantization=4"),
        ("model.quantization", False, "model.quantization=0"),
        ("model.dtype", "bf16", 'model.dtype="bfloat16"'),
        ("strategy.name", "FedAvg", 'strategy.name="fedavg"'),
        ("strategy.name", "median", 'strategy.name="fedmedian"'),
        ("data.partitioner", "non-iid", 'data.partitioner="dirichlet"'),
        ("data.partitioner", "by site", 'data.partitioner="natural"'),
        ("data.prompt-template", "llama3", 'data.prompt-template="chat"'),
        ("train.learning-rate-max", "5e-5", "train.learning-rate-max=5e-05"),
        ("train.training-arguments.bf16", "True", "train.training-arguments.bf16=true"),
        ("communication.uplink-codec", "4bit", 'communication.uplink-codec="int4"'),
    ],
)
def test_a_value_of_elsewhere_is_answered_with_what_to_write(
    key: str, value: Scalar, written: str
) -> None:
    assert f"Write {written}." in refused(key, value)


def test_a_value_without_a_meaning_is_not_written_for_anybody() -> None:
    message = refused("lr", "fast")
    assert "Did you mean 'train.learning-rate-max'?" in message
    assert "Write" not in message


def test_what_has_no_key_says_what_to_do_instead() -> None:
    assert "CUDA_VISIBLE_DEVICES" in refused("device", "cuda:0")
    assert "Attention runs on PyTorch's own kernels" in refused("model.attn", "sdpa")
    assert "A run is named by its directory" in refused("run-name", "third")


def test_what_is_written_is_read_back_by_recipes_and_by_set() -> None:
    written = refused("batch_size", 8).partition("Write ")[2].partition(". ")[0]
    read = {BATCH: 8}
    assert parse_overrides([written]) == flatten(tomllib.loads(written)) == read
    assert resolve(read).examples_per_step == 8


def test_every_synonym_leads_to_a_key_and_none_is_a_key() -> None:
    keys = {*FIELD_OF_KEY, *ALIASES}
    meant = {*synonyms.KEY_OF_NAME.values(), *synonyms._WITH_SECTION.values(), *synonyms._VALUES}
    assert meant <= keys
    unknown = {*synonyms.KEY_OF_NAME, *synonyms._WITH_SECTION, *synonyms.PER_ROUND}
    assert unknown & keys == {"seed"} & keys - {"seed"}
