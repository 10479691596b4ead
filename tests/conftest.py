"""A tiny real base model and tiny data: nothing is mocked, nothing is downloaded."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# One thread for linear algebra, in subprocesses too: pytest-xdist already uses every core, and
# idle OpenMP and OpenBLAS threads spin.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# Modules are compiled once, not by every worker and every subprocess.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.dont_write_bytecode = False

WORDS = ["fever", "cough", "rash", "pain", "chill", "ache", "cramp", "itch", "sneeze", "nausea"]


def make_base(folder: Path, *, layers: int = 2, hidden: int = 32, vocabulary: int = 384) -> Path:
    """Save a random Llama with grouped-query attention and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"What helps against {w}? Rest." for w in WORDS], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="right"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=fast.pad_token_id,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_flashcards(path: Path, count: int) -> Path:
    """Write `count` distinct flashcards as JSON lines, in the schema of Medical Meadow."""
    with path.open("w") as file:
        for i in range(count):
            word, other = WORDS[i % len(WORDS)], WORDS[(i // len(WORDS)) % len(WORDS)]
            row = {
                "instruction": "Answer this question truthfully",
                "input": f"What helps patient {i} against {word} and {other}?",
                "output": f"Rest, and {1 + i % 7} cups of tea against {other}.",
                "ward": f"ward {i % 4}",
            }
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def flashcards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 120 flashcards."""
    return write_flashcards(tmp_path_factory.mktemp("data") / "cards.jsonl", 120)


@pytest.fixture(scope="session")
def federation(tiny_base: Path, flashcards: Path) -> dict[str, Any]:
    """Settings of a small federation: 4 sites, 2 per round, 3 rounds of 2 steps."""
    return {
        "model.name": str(tiny_base),
        "static.dataset.name": str(flashcards),
        "num-server-rounds": 3,
        "data.num-partitions": 4,
        "data.held-out-fraction": 0.1,
        "strategy.fraction-train": 0.5,
        "strategy.fraction-evaluate": 0.5,
        "model.lora.target-modules": "q_proj,v_proj",
        "model.lora.peft-lora-r": 4,
        "model.lora.peft-lora-alpha": 8,
        "train.save-every-round": 2,
        "train.num-threads": 1,
        "train.training-arguments.max-steps": 2,
        "train.training-arguments.per-device-train-batch-size": 4,
    }


@pytest.fixture
def settings(federation: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The small federation's settings with the test's own run directory."""
    return {**federation, "run-directory": str(tmp_path / "run")}


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Use one thread, so that sums have one order and test processes do not compete."""
    import torch

    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let each worker begin with its share of the longest tests, so that none ends with one.

    pytest-xdist gives each worker an equal slice of the list. Tests that take minutes have a time
    limit of their own; those of one file stay together, since they share fixtures.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    long: dict[Path, list[pytest.Item]] = {}
    rest = []
    for item in items:
        limit = item.get_closest_marker("timeout")
        (long.setdefault(item.path, []) if limit and limit.args[0] > 300 else rest).append(item)
    files, share = [*long.values()], -(-len(rest) // workers)
    items[:] = [
        item
        for k in range(workers)
        for part in (*files[k::workers], rest[k * share : (k + 1) * share])
        for item in part
    ]


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Do not flush files to the disk in this process: a tenth of a run's time, and unseen by any
    test but those of a power failure, which put their own function in this place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # an error for what is no open file, as before
        yield


@pytest.fixture(scope="session", autouse=True)
def signals_end_what_tests_start() -> None:
    """Let Ctrl-C and SIGHUP end it: in the background, and under nohup, they are ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def base() -> tuple[Any, Any]:
    """The embedded base: model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grandrounds.data.formulary import base_path

    return (
        AutoModelForCausalLM.from_pretrained(base_path(), local_files_only=True),
        AutoTokenizer.from_pretrained(base_path(), local_files_only=True),
    )


@pytest.fixture(scope="session")
def base_scores(base: tuple[Any, Any]) -> dict[str, dict[str, int]]:
    """The embedded base's scores in the formulary exam."""
    from grandrounds.site.exam import score_formulary

    return score_formulary(*base)


@pytest.fixture(autouse=True)
def a_task() -> None:
    """Set what Flower's runtimes set before an app starts; `Message()` reads it."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0


@pytest.fixture
def by_the_runs_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sites with a site.toml take their examples in the order of the run, as others do.

    Nothing that an agent can be given does this; `tests.seeded_agent` does it for a process.
    """
    from grandrounds.site.custody import order

    monkeypatch.setattr(order, "choose", lambda *_: None)
