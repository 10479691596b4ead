"""Run directories and adapters as targets, and every argument that is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grandrounds.errors import ConfigError, DataError, GrandRoundsError, ModelError
from grandrounds.model.saved import first_mismatch
from grandrounds.study.evaluation.benchmarks import HELD_OUT, Questions, load_questions
from grandrounds.study.evaluation.tasks import EvaluationTasks, find_target
from tests.study.evaluation.small import evaluate_target, medmcqa_rows, write_lines

# --- A run directory ------------------------------------------------------------------------------


def make_run(folder: Path, settings: dict[str, Any], adapter: Path, summary: Any) -> Path:
    """Write a run directory with two checkpoints, as far as an evaluation reads it."""
    from grandrounds.config import recipes
    from grandrounds.server.directory import RunDirectory

    run = RunDirectory.create(folder, recipes.resolve(settings))
    for name in ("peft_2", "peft_3"):
        shutil.copytree(adapter, run.path / name)
    if summary is not None:
        run.write_json("summary.json", summary)
    return run.path


SUMMARY = {"adapter": "peft_3", "best_adapter": {"adapter": "peft_2", "held_out_loss": 1.0}}


def test_a_run_is_asked_with_its_last_and_best_checkpoint_and_its_own_base(
    settings: dict[str, Any], adapter: Path, data: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "a-run", settings, adapter, SUMMARY)
    evaluation = evaluate_target(str(run), benchmarks=["pubmedqa"], data=data)
    assert [row["model"] for row in evaluation["rows"]] == ["base", "peft_3", "peft_2"]
    assert evaluation["base"] == settings["model.name"]
    assert evaluation["models"]["peft_3"]["role"] == "last checkpoint"
    assert evaluation["models"]["peft_2"]["role"] == "lowest held-out loss"
    assert (run / "evaluation" / "evaluation.json").is_file()
    same = [row["correct"] for row in evaluation["rows"] if row["model"] != "base"]
    assert same[0] == same[1]


def test_a_checkpoint_is_evaluated_as_its_run_is(
    settings: dict[str, Any], adapter: Path, tmp_path: Path
) -> None:
    """Its precision and its default benchmarks were those of an adapter without a run."""
    data = tmp_path / "cards.jsonl"
    data.write_text('{"input": "Why?", "output": "Rest."}\n')
    own = settings | {"model.quantization": 8, "model.dtype": "bfloat16"}
    own |= {"static.dataset.name": str(data), "data.held-out-fraction": 0.5}
    run = make_run(tmp_path / "a-run", own, adapter, SUMMARY)
    whole, one = (find_target(str(target)) for target in (run, run / "peft_2"))
    assert (one.quantization, one.dtype, one.benchmarks) == (8, "bfloat16", (HELD_OUT,))
    assert dataclasses.replace(one, adapters=(), out=run, run=whole.run) == dataclasses.replace(
        whole, adapters=(), out=run
    )
    assert find_target(str(run / "peft_2"), quantization=0).quantization == 0


def test_the_prompt_of_an_adapter_away_from_its_run_is_told_as_assumed(
    settings: dict[str, Any], adapter: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "a-run", settings, adapter, SUMMARY)
    alone = tmp_path / "peft_2"
    shutil.copytree(run / "peft_2", alone)
    questions = load_questions(["formulary"])
    told = EvaluationTasks(find_target(str(alone)), questions).assumption
    assert "peft_2 is not in a run directory" in told
    assert "in the template 'alpaca' without chat settings" in told
    assert not EvaluationTasks(find_target(str(run / "peft_2")), questions).assumption
    published = Questions((), None)
    assert not EvaluationTasks(find_target(str(alone)), published).assumption


def test_one_checkpoint_that_is_last_and_best_is_asked_once(
    settings: dict[str, Any], adapter: Path, data: Path, tmp_path: Path
) -> None:
    summary = {"adapter": "peft_3", "best_adapter": {"adapter": "peft_3", "held_out_loss": 1.0}}
    run = make_run(tmp_path / "a-run", settings, adapter, summary)
    evaluation = evaluate_target(str(run), benchmarks=["pubmedqa"], data=data)
    assert list(evaluation["models"]) == ["peft_3"]
    role = evaluation["models"]["peft_3"]["role"]
    assert role == "last checkpoint and lowest held-out loss"


@pytest.mark.parametrize("summary", [None, {"adapter": None, "best_adapter": None}])
def test_a_run_without_a_checkpoint_is_refused(
    settings: dict[str, Any], adapter: Path, tmp_path: Path, summary: Any
) -> None:
    run = make_run(tmp_path / "a-run", settings, adapter, summary)
    with pytest.raises(GrandRoundsError, match="has no checkpoint"):
        evaluate_target(str(run))


# --- Refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"benchmarks": ["medqua"]}, ConfigError, "unknown benchmark.*Did you mean 'medqa'"),
        ({"protocol": "likelyhood"}, ConfigError, "unknown protocol.*Did you mean 'likelihood'"),
        ({"limit": 0}, ConfigError, "limit must be at least 1, got 0"),
        ({"batch_size": 0}, ConfigError, "batch-size must be at least 1, got 0"),
        ({"permutations": -1}, ConfigError, "permutations must be at least 0, got -1"),
        ({"quantization": 5}, ConfigError, "quantization must be one of 0, 4, 8 bits, got 5"),
        ({"base": None}, ConfigError, "needs a base model: use --base MODEL"),
        ({"benchmarks": ["medqa"], "data": None}, DataError, "hub.*--data DIR"),
        ({"base": "no/such-model"}, ModelError, "cannot be loaded"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    ask: Callable[..., dict[str, Any]],
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        ask(**arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [({"cop": 4}, "line 2, column 'cop'"), ({"opc": None}, "line 2, column 'opc'")],
)
def test_a_row_that_cannot_be_is_named(
    ask: Callable[..., dict[str, Any]], tmp_path: Path, fault: dict[str, Any], message: str
) -> None:
    rows = medmcqa_rows(3)
    rows[1] |= fault
    write_lines(tmp_path / "medmcqa.jsonl", rows)
    with pytest.raises(DataError, match=message):
        ask(data=tmp_path, benchmarks=["medmcqa"])


def test_a_folder_that_is_neither_run_nor_adapter_is_refused(
    ask: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="is no such folder: expected a run directory"):
        ask(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="is neither: expected a run directory"):
        ask(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has no adapter: adapter_model\.safetensors is missing"):
        ask(tmp_path)


def test_an_adapter_of_another_base_is_refused_naming_the_first_mismatch(
    ask: Callable[..., dict[str, Any]], adapter: Path
) -> None:
    with pytest.raises(
        ModelError,
        match=r"does not fit the base 'formulary': .*layers\.0\.self_attn\.q_proj\.lora_A\.weight "
        "has shape 4 x 32, and the base needs 4 x 128",
    ):
        ask(adapter, base="formulary")


def test_the_first_mismatch_is_a_missing_tensor_a_shape_or_a_foreign_tensor() -> None:
    needed = {"a": (2, 3), "b": (3, 2)}
    assert first_mismatch(needed, needed) is None
    assert "tensor b" in str(first_mismatch({"a": (2, 3)}, needed))
    assert "b has shape 2 x 3" in str(first_mismatch({"a": (2, 3), "b": (2, 3)}, needed))
    assert "no module for the tensor c" in str(first_mismatch({**needed, "c": (1,)}, needed))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "needs a tensor .*lora_magnitude_vector, and the adapter has none"),
        ({"rank_pattern": {"q_proj": 2}}, "has shape 4 x 32, and the base needs 2 x 32"),
        ({"peft_type": "IA3"}, "type IA3, not LORA"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights = 'loftq', which changed its base"),
        ({"init_lora_weights": "pissa_niter_4"}, "randomised.*its answers would be random"),
        ({"init_lora_weights": "corda"}, "init_lora_weights = 'corda'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights = 'lora_ga'"),
        ({"alora_invocation_tokens": [1]}, "an activated LoRA"),
        ({"layer_replication": [[0, 1]]}, "replicated layers"),
        ({"use_qalora": True}, "a QALoRA adapter"),
        ({"of_a_later_peft": True}, "an adapter with of_a_later_peft = True"),
        ({"target_modules": ["query"]}, "does not fit the base.*'query'"),
        ({"r": None}, "must have r, lora_alpha and target_modules"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_refused_by_its_kind(
    ask: Callable[..., dict[str, Any]],
    adapter: Path,
    tmp_path: Path,
    config: dict[str, Any],
    message: str,
) -> None:
    mine = shutil.copytree(adapter, tmp_path / "mine")
    file = mine / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    with pytest.raises(ModelError, match=message):
        ask(mine)
