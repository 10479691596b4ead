"""A whole evaluation on a tiny base: rows, files, resume, and every input that is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from grandrounds.errors import ConfigError, DataError, GrandRoundsError, ModelError
from grandrounds.statistics import wilson_interval
from grandrounds.study.evaluation import flowertune, likelihood, runner
from grandrounds.study.evaluation.answers import AnswerFile
from grandrounds.study.evaluation.models import first_mismatch
from grandrounds.study.evaluation.overlap import check_overlap
from grandrounds.study.evaluation.results import evaluations_in, faults_in
from grandrounds.study.evaluation.runner import evaluate
from grandrounds.study.evaluation.tables import notes, tables
from tests.conftest import WORDS

MEDMCQA, PUBMEDQA = 14, 6
"""Items written for the tests."""


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def medmcqa_rows(count: int) -> list[dict[str, Any]]:
    """Rows in the hub's columns, of different lengths."""
    options = ("opa", "opb", "opc", "opd")
    return [
        {
            "question": f"What helps patient {i} against {' and '.join(WORDS[: 1 + i % 5])}?",
            **{name: f"{WORDS[(i + j) % 10]} tea" for j, name in enumerate(options)},
            "cop": i % 4,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a few items of two benchmarks."""
    folder = tmp_path_factory.mktemp("benchmarks")
    write_lines(folder / "medmcqa.jsonl", medmcqa_rows(MEDMCQA))
    rows = [
        {
            "QUESTION": f"Does rest help against {WORDS[i]}?",
            "CONTEXTS": [f"We asked {10 + i} patients.", "They rested."],
            "final_decision": ("yes", "no", "maybe")[i % 3],
        }
        for i in range(PUBMEDQA)
    ]
    write_lines(folder / "pubmedqa.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an adapter that plain PEFT saved, strong enough to change answers."""
    return save_adapter(tiny_base, tmp_path_factory.mktemp("adapters") / "tuned")


def save_adapter(base: Path, folder: Path, **config: Any) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def ask(data: Path, tiny_base: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Evaluate with the tests' items on the tiny base, in `tmp_path / "out"`."""

    def call(target: Path | str = "none", **arguments: Any) -> dict[str, Any]:
        settings = {
            "base": str(tiny_base),
            "benchmarks": ["medmcqa", "pubmedqa"],
            "data": data,
            "out": tmp_path / "out",
            "batch_size": 4,
            **arguments,
        }
        return evaluate(str(target), **settings)

    return call


# --- What comes out -------------------------------------------------------------------------------


def test_every_model_and_benchmark_has_a_row_with_counts_and_the_base_comes_first(
    ask: Callable[..., dict[str, Any]], adapter: Path, tmp_path: Path
) -> None:
    evaluation = ask(adapter, protocol="likelihood")
    rows = evaluation["rows"]
    assert [(row["model"], row["benchmark"], row["n"]) for row in rows] == [
        ("base", "medmcqa", MEDMCQA),
        ("tuned", "medmcqa", MEDMCQA),
        ("base", "pubmedqa", PUBMEDQA),
        ("tuned", "pubmedqa", PUBMEDQA),
    ]
    for row in rows:
        assert row["accuracy"] == row["correct"] / row["n"]
        assert tuple(row["interval"]) == wilson_interval(row["correct"], row["n"])
        assert (row["vs_base"] is None) == (row["model"] == "base")
        assert row["limited"]
    gained = rows[1]["vs_base"]
    assert gained["only_model"] - gained["only_base"] == rows[1]["correct"] - rows[0]["correct"]
    assert gained["difference"] == pytest.approx(rows[1]["accuracy"] - rows[0]["accuracy"])
    assert len(evaluation["adapter_sha256"]) == 64
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == evaluation
    assert faults_in(evaluation) == []


def test_the_base_row_is_that_of_a_model_that_never_had_an_adapter(
    ask: Callable[..., dict[str, Any]], adapter: Path, tmp_path: Path
) -> None:
    ask(adapter, protocol="likelihood", permutations=1)
    ask(protocol="likelihood", permutations=1, out=tmp_path / "alone")
    name = "answers_base_medmcqa_likelihood.jsonl"
    beside, alone = (AnswerFile(tmp_path / folder / name).records for folder in ("out", "alone"))
    tuned = AnswerFile(tmp_path / "out" / name.replace("base", "tuned")).records
    assert beside.keys() == alone.keys()
    for key, record in alone.items():
        assert beside[key]["log_likelihoods"] == pytest.approx(record["log_likelihoods"], abs=1e-5)
        assert tuned[key]["log_likelihoods"] != pytest.approx(record["log_likelihoods"], abs=1e-2)


def test_a_tuned_row_is_that_of_plain_peft(
    ask: Callable[..., dict[str, Any]], adapter: Path, tiny_base: Path, tmp_path: Path, data: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grandrounds.study.evaluation.benchmarks import get_benchmark, load_items

    ask(adapter, benchmarks=["medmcqa"], permutations=0)
    benchmark = get_benchmark("medmcqa")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), adapter)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    items = load_items(benchmark, data)
    expected = likelihood.answer_items(model, tokenizer, benchmark, items)
    found = AnswerFile(tmp_path / "out" / "answers_tuned_medmcqa_likelihood.jsonl").ordered()
    for record, answer in zip(found, expected, strict=True):
        assert record["log_likelihoods"] == pytest.approx(answer.log_likelihoods, abs=1e-4)


def test_the_base_is_loaded_once_for_all_models(
    ask: Callable[..., dict[str, Any]], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grandrounds.model import resident as model
    from grandrounds.model.base import base_loads

    monkeypatch.setattr(model, "_resident", None)
    before = base_loads()
    ask(adapter, protocol="all", permutations=1)
    assert base_loads() == before + 1


def test_likelihood_rows_tell_shuffling_and_position_bias_for_letters_only(
    ask: Callable[..., dict[str, Any]],
) -> None:
    letters, words = ask(permutations=2)["rows"]
    assert len(letters["shuffled"]["correct"]) == 2
    assert letters["shuffled"]["n"] == MEDMCQA
    assert sum(letters["position_bias"]["counts"]) == 2 * MEDMCQA
    assert letters["normalised"]["correct"] == letters["correct"]  # letters have one length
    assert words["shuffled"] is None
    assert words["position_bias"] is None


def test_flowertune_rows_tell_form_and_spread_and_leave_flowertunes_files(
    ask: Callable[..., dict[str, Any]], adapter: Path, tmp_path: Path
) -> None:
    rows = ask(adapter, protocol="flowertune")["rows"]
    for row in rows:
        assert sum(row["spread"].values()) == row["n"]
        assert 0 <= row["format_failures"] <= row["n"]
        names = flowertune.result_names(row["benchmark"], row["model"])
        records = flowertune.read_generations(tmp_path / "out" / names[0])
        score = flowertune.rescore(records)
        assert (score.correct, score.n) == (row["correct"], row["n"])
        line = (tmp_path / "out" / names[1]).read_text()
        assert line == flowertune.accuracy_line(score)


def test_all_protocols_are_one_file_and_each_verifies(
    ask: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    content = ask(protocol="all", permutations=1)
    assert [e["protocol"] for e in evaluations_in(content)] == ["flowertune", "likelihood"]
    assert faults_in(content) == []
    content["evaluations"][1]["rows"][0]["correct"] += 1
    assert any("protocol likelihood: row 1" in fault for fault in faults_in(content))


def test_what_a_batch_computes_together_changes_no_answer(
    ask: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """FlowerTune's answer length follows its own batches of 16, not ours."""
    one = ask(protocol="all", batch_size=1, permutations=1)
    many = ask(protocol="all", batch_size=16, permutations=1, out=tmp_path / "many")
    counts = [
        [(row["benchmark"], row["correct"], row.get("spread")) for row in evaluation["rows"]]
        for content in (one, many)
        for evaluation in evaluations_in(content)
    ]
    assert counts[:2] == counts[2:]
    name = "generation_medmcqa_base.jsonl"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def test_formulary_parts_add_up_and_are_rows_of_the_table(tmp_path: Path) -> None:
    evaluation = evaluate("none", base="formulary", limit=8, out=tmp_path / "out")
    (row,) = evaluation["rows"]
    assert [group["group"] for group in row["groups"]] == ["private"]
    assert row["groups"][0]["n"] == row["n"] == 8
    cells = tables(evaluation)[0].rows
    assert [line[0] for line in cells] == ["Formulary (fictional), private"]
    row["groups"][0]["correct"] += 1
    assert any("groups" in fault for fault in faults_in(evaluation))


def test_a_chat_template_cannot_be_verified_and_is_not_held_against_an_evaluation(
    tmp_path: Path,
) -> None:
    evaluation = evaluate("none", base="formulary", limit=2, out=tmp_path / "out")
    evaluation["rows"][0]["prompt_hash"] = "of a chat template"
    assert any("other prompts were sent" in fault for fault in faults_in(evaluation))
    evaluation["prompt_template"] = "chat"
    assert faults_in(evaluation) == []


def test_tables_and_notes_say_what_a_reader_must_know(
    ask: Callable[..., dict[str, Any]], adapter: Path, tmp_path: Path
) -> None:
    evaluation = ask(adapter)
    accuracy = tables(evaluation)[0]
    assert all(len(row) == len(accuracy.columns) for row in accuracy.rows)
    assert [row[0] for row in accuracy.rows[-2:]] == ["average", "average"]
    text = " ".join(notes(evaluation))
    for words in (
        "Wilson",
        "McNemar",
        "Newcombe",
        "test and interval may disagree",
        "Not adjusted for the 2 comparisons",
        "Average: unweighted mean of medmcqa, pubmedqa",
        f"MedMCQA: the first {MEDMCQA} of 4,183 items",
        "was not checked",
    ):
        assert words in text
    overlap = {"training": "cards.jsonl", "benchmarks": {"medmcqa": {"items": 3, "n": 14}}}
    assert "3 of 14 medmcqa questions occur in cards.jsonl" in " ".join(notes(evaluation, overlap))


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
    evaluation = evaluate(str(run), benchmarks=["pubmedqa"], data=data)
    assert [row["model"] for row in evaluation["rows"]] == ["base", "peft_3", "peft_2"]
    assert evaluation["base"] == settings["model.name"]
    assert evaluation["models"]["peft_3"]["role"] == "last checkpoint"
    assert evaluation["models"]["peft_2"]["role"] == "lowest held-out loss"
    assert (run / "evaluation" / "evaluation.json").is_file()
    same = [row["correct"] for row in evaluation["rows"] if row["model"] != "base"]
    assert same[0] == same[1]


def test_one_checkpoint_that_is_last_and_best_is_asked_once(
    settings: dict[str, Any], adapter: Path, data: Path, tmp_path: Path
) -> None:
    summary = {"adapter": "peft_3", "best_adapter": {"adapter": "peft_3", "held_out_loss": 1.0}}
    run = make_run(tmp_path / "a-run", settings, adapter, summary)
    evaluation = evaluate(str(run), benchmarks=["pubmedqa"], data=data)
    assert list(evaluation["models"]) == ["peft_3"]
    role = evaluation["models"]["peft_3"]["role"]
    assert role == "last checkpoint and lowest held-out loss"


@pytest.mark.parametrize("summary", [None, {"adapter": None, "best_adapter": None}])
def test_a_run_without_a_checkpoint_is_refused(
    settings: dict[str, Any], adapter: Path, tmp_path: Path, summary: Any
) -> None:
    run = make_run(tmp_path / "a-run", settings, adapter, summary)
    with pytest.raises(GrandRoundsError, match="has no checkpoint"):
        evaluate(str(run))


# --- Resume ---------------------------------------------------------------------------------------


class Stop:
    """A listener that interrupts after so many writes, and counts what is asked."""

    def __init__(self, after: int | None = None) -> None:
        self.after = after
        self.answered = 0

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        if event != "answered":
            return
        self.answered += facts["count"]
        if self.after is not None:
            self.after -= 1
            if self.after == 0:
                raise KeyboardInterrupt


TOTAL = 3 * MEDMCQA + 2 * PUBMEDQA
"""Questions of both protocols with one shuffled order, for one model."""


@pytest.mark.parametrize("after", [1, 6, 11])
def test_a_stopped_evaluation_goes_on_and_asks_nothing_twice(
    ask: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    asked: Counter[tuple[int, ...]] = Counter()
    for name in ("generate_greedily", "option_log_likelihoods"):
        count_prompts(monkeypatch, name, asked)
    first, second = Stop(after), Stop()
    arguments = {"protocol": "all", "permutations": 1, "batch_size": 1}
    with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
        ask(**arguments, listener=first)
    kept = sum(
        len(file.read_text().splitlines()) for file in (tmp_path / "out").glob("answers_*.jsonl")
    )
    assert kept == first.answered > 0
    resumed = ask(**arguments, listener=second, resume=True)
    assert first.answered + second.answered == TOTAL
    assert sum(asked.values()) == TOTAL
    assert max(asked.values()) == 1
    assert resumed == ask(**arguments, out=tmp_path / "whole")


def count_prompts(
    monkeypatch: pytest.MonkeyPatch, name: str, asked: Counter[tuple[int, ...]]
) -> None:
    """Count the prompts that really reach the model."""
    from grandrounds.model import scoring

    original = getattr(scoring, name)

    def counted(model: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        asked.update(tuple(prompt) for prompt in prompts)
        return original(model, prompts, *args, **kwargs)

    monkeypatch.setattr(scoring, name, counted)
    if hasattr(runner, name):
        monkeypatch.setattr(runner, name, counted)


def test_a_half_written_last_line_is_dropped_and_its_item_asked_again(
    ask: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    whole = ask(protocol="flowertune", benchmarks=["medmcqa"])
    file = tmp_path / "out" / "answers_base_medmcqa_flowertune.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    listener = Stop()
    again = ask(protocol="flowertune", benchmarks=["medmcqa"], resume=True, listener=listener)
    assert listener.answered == 1
    assert again == whole
    assert len(file.read_text().splitlines()) == MEDMCQA


def test_resuming_a_finished_evaluation_asks_nothing_and_loads_no_base(
    ask: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask()
    listener = Stop()
    monkeypatch.setattr("grandrounds.study.evaluation.models.load_base", None)
    assert ask(resume=True, listener=listener) == whole
    assert listener.answered == 0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"limit": 3}, "limit: 2 → 3"),
        ({"protocol": "flowertune"}, r"protocols: \['likelihood'\] → \['flowertune'\]"),
        ({"permutations": 1}, "permutations: 0 → 1"),
        ({"benchmarks": ["pubmedqa", "medmcqa"]}, "source, medmcqa, file: absent"),
    ],
)
def test_a_resume_with_other_settings_names_what_differs(
    ask: Callable[..., dict[str, Any]], changed: dict[str, Any], named: str
) -> None:
    arguments = {"limit": 2, "benchmarks": ["pubmedqa"], "permutations": 0}
    ask(**arguments)
    with pytest.raises(GrandRoundsError, match=named):
        ask(**{**arguments, **changed}, resume=True)


def test_a_resume_with_another_adapter_base_or_source_names_it(
    ask: Callable[..., dict[str, Any]], adapter: Path, tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"benchmarks": ["pubmedqa"]}
    mine, folder = tmp_path / "mine", tmp_path / "data"
    shutil.copytree(adapter, mine)
    shutil.copytree(data, folder)
    ask(mine, **arguments, data=folder)
    weights = mine / "adapter_model.safetensors"
    weights.write_bytes(other_weights(weights))
    with pytest.raises(GrandRoundsError, match="adapters, mine: "):
        ask(mine, **arguments, data=folder, resume=True)
    shutil.copytree(adapter, mine, dirs_exist_ok=True)
    source = folder / "pubmedqa.jsonl"
    source.write_text(source.read_text() + "\n")
    with pytest.raises(GrandRoundsError, match="source, pubmedqa, sha256: "):
        ask(mine, **arguments, data=folder, resume=True)
    other = tmp_path / "other-base"
    shutil.copytree(tiny_base, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(GrandRoundsError, match="base fingerprint: "):
        ask(mine, **arguments, base=str(other), resume=True)


def other_weights(file: Path) -> bytes:
    from safetensors.torch import load_file, save

    return save({name: tensor + 1 for name, tensor in load_file(file).items()})


def test_a_folder_with_another_evaluation_is_refused_and_one_without_cannot_be_resumed(
    ask: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(GrandRoundsError, match="holds no evaluation to resume"):
        ask(resume=True)
    ask(limit=1)
    with pytest.raises(GrandRoundsError, match="holds another evaluation: continue it with --res"):
        ask(limit=1)


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
        ({"base": None}, ConfigError, "needs a base model: give --base MODEL"),
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
    with pytest.raises(ModelError, match="is no such folder: give a run directory"):
        ask(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="is neither: give a run directory"):
        ask(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds no adapter: there is no adapter_model\.safetens"):
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
    assert "no place for the tensor c" in str(first_mismatch({**needed, "c": (1,)}, needed))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"use_rslora": True}, "use_rslora = True"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"target_modules": ["query"]}, "does not fit the base.*'query'"),
        ({"r": None}, "must have r, lora_alpha and target_modules"),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_refused(
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


@pytest.mark.parametrize("protocol", ["flowertune", "likelihood"])
def test_prompts_longer_than_the_context_are_cut_on_the_left_counted_and_told(
    ask: Callable[..., dict[str, Any]], tmp_path: Path, protocol: str
) -> None:
    rows = medmcqa_rows(3)
    rows[1]["question"] = "fever and cough " * 2000
    write_lines(tmp_path / "medmcqa.jsonl", rows)
    evaluation = ask(
        data=tmp_path, benchmarks=["medmcqa"], protocol=protocol, permutations=0, batch_size=2
    )
    assert evaluation["rows"][0]["truncated"] == 1
    assert (
        "MedMCQA, base: 1 of 3 prompts exceeded the context length and were truncated on the left."
        in notes(evaluation)
    )


# --- Overlap --------------------------------------------------------------------------------------


def test_overlap_counts_and_lists_the_items_found_in_training_data(
    data: Path, tmp_path: Path
) -> None:
    question = medmcqa_rows(MEDMCQA)[4]["question"]
    rows = [
        {"input": "What is rest?", "output": "Something else entirely."},
        {"input": f"Tell me. {question}", "output": "Tea."},
    ]
    training = write_lines(tmp_path / "cards.jsonl", rows)
    report = check_overlap(str(training), ["medmcqa", "pubmedqa"], data=data)
    found = report["benchmarks"]["medmcqa"]
    assert (found["n"], found["items"], found["exact"], found["near"]) == (MEDMCQA, 1, 1, 0)
    (pair,) = found["found"]
    assert (pair["item"], pair["training_row"], pair["column"]) == (5, 2, "input")
    assert report["benchmarks"]["pubmedqa"]["items"] == 0
