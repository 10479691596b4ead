"""An export is the checkpoint: same answers as in the run, whole or not at all, with its card."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config import recipes
from grandrounds.data.chat import rendered
from grandrounds.data.formulary import base_path
from grandrounds.data.tokenization import prompt_token_ids
from grandrounds.errors import ConfigError, GrandRoundsError, ModelError, RunDirectoryError
from grandrounds.model.lora import LoraSpec, adapter_layout, peft_config
from grandrounds.model.tokenizers import run_tokenizer, tokenizer_of
from grandrounds.server.directory import RunDirectory, find_checkpoint
from grandrounds.server.model_card import Accuracy, Findings, model_card
from grandrounds.site.exam import score_formulary
from grandrounds.study import export as exports
from grandrounds.study.ask import Interview
from grandrounds.study.evaluation.tasks import find_target
from tests.data.test_chat_settings import LEAP, TEMPLATE
from tests.end_to_end.test_docs import parse, shell_commands
from tests.runs import copy_of
from tests.study.evaluation.small import evaluate_target


def command(name: str, *arguments: object, **kwargs: Any) -> Result:
    return CliRunner().invoke(app, [name, *map(str, arguments)], **kwargs)


def one_line(result: Result) -> str:
    """Return the one line of an expected failure."""
    (line,) = result.stderr.splitlines()
    assert line.startswith("grandrounds: ")
    return line


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the embedded base on the formulary, with checkpoints after rounds 2 and 4."""
    return copy_of("finished", tmp_path_factory.mktemp("trained"))


def made_run(
    folder: Path,
    base: Path,
    losses: Mapping[int, float | None],
    target: str = "q_proj,v_proj",
    **more: Any,
) -> Path:
    """Write the run directory of a run that was not played, with checkpoints of random adapters."""
    settings = {"model.name": str(base), "model.lora.target-modules": target}
    settings |= {"num-server-rounds": 8, "model.lora.peft-lora-r": 4, **more}
    config = recipes.resolve(settings)
    run = RunDirectory.create(folder, config)
    spec = LoraSpec(4, config.lora.peft_lora_alpha, target, 0.0)
    shapes, targets = adapter_layout(str(base), spec)
    run.append_metrics({"round": 0, "communication-mib": 0.0})
    for number, loss in losses.items():
        generator = np.random.default_rng(number)
        adapter = {
            name: generator.normal(0, 0.1, shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        card = model_card(config, targets.modules, number, loss, 1.0)
        saved = run.save_checkpoint(number, adapter, peft_config(spec, targets, str(base)), card)
        record = {"round": number, "checkpoint": saved.name, "communication-mib": 1.0}
        run.append_metrics(record | {"held-out-loss": loss})
    return folder


@pytest.fixture
def made(tiny_base: Path, tmp_path: Path) -> Path:
    """A run directory with checkpoints after rounds 2, 4 and 6, the second being the best."""
    return made_run(tmp_path / "run", tiny_base, {2: 1.5, 4: 1.0, 6: 1.2})


# --- The same answers as in the run ---------------------------------------------------------------


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(2, 40).unsqueeze(0)).logits.float()


@pytest.mark.slow
def test_the_exported_adapter_and_the_merged_model_answer_as_in_the_run(
    trained: Path, tmp_path: Path
) -> None:
    for folder, more in (("adapter", ()), ("whole", ("--merge",))):
        result = command("export", trained, "--to", tmp_path / folder, *more)
        assert result.exit_code == 0, result.stderr
        assert f"written: {tmp_path / folder} (checkpoint after round 4)" in result.stdout
    in_run = json.loads((trained / "summary.json").read_text())["formulary"]
    base = AutoModelForCausalLM.from_pretrained(base_path())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    tuned = PeftModel.from_pretrained(base, tmp_path / "adapter")
    scores, merged_scores = (
        score_formulary(model, AutoTokenizer.from_pretrained(folder))
        for model, folder in ((tuned, base_path()), (merged, tmp_path / "whole"))
    )
    assert scores == merged_scores == {kind: in_run[kind]["tuned"] for kind in scores}
    with tuned.disable_adapter():
        assert (logits_of(merged) - logits_of(tuned)).abs().max() > 0.1
    torch.testing.assert_close(logits_of(merged), logits_of(tuned), atol=1e-4, rtol=1e-4)


def test_a_merged_model_keeps_the_settings_of_its_base(trained: Path, tmp_path: Path) -> None:
    folder = exports.export(find_checkpoint(trained), merge=True, to=tmp_path / "whole")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        ours, base = (json.loads((f / name).read_text()) for f in (folder, base_path()))
        wrote = ours.pop("transformers_version", None), base.pop("transformers_version", None)
        assert (wrote[0] is None) == (wrote[1] is None)
        assert ours == base
    assert (folder / "chat_template.jinja").is_file()
    before, after = (load_file(f / "model.safetensors") for f in (base_path(), folder))
    assert before.keys() == after.keys()
    assert (before["model.embed_tokens.weight"] == after["model.embed_tokens.weight"]).all()


def test_a_template_of_ones_own_holds_for_ask_evaluation_export_and_card(
    tiny_base: Path, tmp_path: Path
) -> None:
    text = "{% if system %}<{{ system }}>\n{% endif %}Q: {{ question }}\nA: {{ answer }}"
    own = {"data.prompt-template": text, "data.system-prompt": "Be brief."}
    run = made_run(tmp_path / "run", tiny_base, {1: None}, **own)
    chosen = find_checkpoint(run)
    merged = exports.export(chosen, merge=True, to=tmp_path / "merged")
    plain = AutoTokenizer.from_pretrained(merged)
    turns = [{"role": "user", "content": "Why?"}]
    said = plain.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert said == "<Be brief.>\nQ: Why?\nA:"
    interview = Interview(chosen)
    assert interview._template == find_target(str(run / "peft_1")).prompt_template
    assert prompt_token_ids(interview._tokenizer, interview._template, ["Why?"]) == [
        plain(said, add_special_tokens=False)["input_ids"]
    ]
    card = (exports.export(chosen, to=tmp_path / "adapter") / "README.md").read_text()
    assert f"SHA-256 `{hashlib.sha256(text.encode()).hexdigest()}`" in card
    assert f"```jinja\n{text}\n```" in card
    assert "| system prompt | Be brief. |" in card
    assert "chat template renders the same text" in (merged / "README.md").read_text()


def test_what_a_run_sets_in_the_chat_template_holds_for_ask_export_evaluation_and_card(
    tiny_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    without_effect = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 5}
    (base / "generation_config.json").write_text(json.dumps(without_effect))
    run = made_run(
        tmp_path / "run",
        base,
        {1: None},
        **{
            "data.prompt-template": "chat",
            "data.template-date": LEAP,
            "data.template-options": '{"enable_thinking": false}',
            "data.system-prompt": "Be brief.",
        },
    )
    chosen = find_checkpoint(run)
    trained_on = rendered(run_tokenizer(chosen.config), [("user", "Why?")], answering=True)
    assert trained_on.startswith("Be brief. 29 Feb 2024 plain\n<user|2024>Why?")
    assert trained_on.endswith("no thoughts")
    merged = exports.export(chosen, merge=True, to=tmp_path / "merged")
    generation = json.loads((merged / "generation_config.json").read_text())
    ends = generation.pop("eos_token_id")
    assert 5 in ends
    del without_effect["eos_token_id"]
    assert without_effect.items() <= generation.items()
    plain = AutoTokenizer.from_pretrained(merged)
    turns = [{"role": "user", "content": "Why?"}]
    assert trained_on == plain.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
    ids = plain(trained_on, add_special_tokens=False)["input_ids"]
    interview = Interview(chosen)
    assert prompt_token_ids(interview._tokenizer, "chat", ["Why?"]) == [ids]
    target = find_target(str(run / "peft_1"))
    assert (
        rendered(tokenizer_of(target.base, target.chat), [("user", "Why?")], answering=True)
        == trained_on
    )
    card = (exports.export(chosen, to=tmp_path / "adapter") / "README.md").read_text()
    assert "| system prompt | Be brief. |" in card
    assert "| date in the prompt | 2024-02-29 |" in card
    assert "add_generation_prompt=True, enable_thinking=False)" in card
    assert "answers end with the template's end of turn" in card
    assert "is written into this tokenizer's chat template" in (merged / "README.md").read_text()


def test_merging_is_the_sum_that_peft_makes(made: Path, tmp_path: Path, tiny_base: Path) -> None:
    checkpoint = find_checkpoint(made)
    folder = exports.export(checkpoint, merge=True, to=tmp_path / "whole")
    ours = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    theirs = PeftModel.from_pretrained(base, checkpoint.folder).merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-6)


def test_the_merged_weight_is_the_base_plus_scaled_product_by_hand() -> None:
    """W = 1, alpha / r = 2 / 1, B A = (1, 0)^T (3, 4): the first row becomes 7, 9."""
    layer = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.ones_(layer.weight)
    name = "base_model.model.proj.lora_{}.weight"
    adapter = {
        name.format("A"): np.array([[3, 4]], np.float32),
        name.format("B"): np.array([[1], [0]], np.float32),
    }
    model = torch.nn.ModuleDict({"proj": layer})
    rounding = exports.merge(model, adapter, dict.fromkeys(adapter, 2.0), torch.float32)
    assert layer.weight.tolist() == [[7, 9], [1, 1]]
    assert rounding.relative_error == 0


def test_bfloat16_rounds_once_and_the_loss_is_told() -> None:
    """256 + 1 is no bfloat16 (8 bits of mantissa, steps of 2): the whole change is rounded away."""
    layer = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    torch.nn.init.constant_(layer.weight, 256)
    name = "base_model.model.proj.lora_{}.weight"
    adapter = {name.format(x): np.ones((1, 1), np.float32) for x in "AB"}
    model = torch.nn.ModuleDict({"proj": layer})
    rounding = exports.merge(model, adapter, dict.fromkeys(adapter, 1.0), torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.item() == 256
    assert rounding == exports.Rounding("bfloat16", 1.0)
    assert "bfloat16. The rounding error is 1e+02 %" in exports.merged_text(0, rounding)


def test_a_bfloat16_base_stays_bfloat16(tiny_base: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(half)
    run = made_run(tmp_path / "run", half, {1: None})
    folder = exports.export(find_checkpoint(run), merge=True, to=tmp_path / "whole")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("bits", "share", "stored"), [(4, 0.02, False), (8, 0.8, False), (4, 0.02, True)]
)
def test_a_quantised_base_is_dequantised_as_the_run_saw_it(
    tiny_base: Path, tmp_path: Path, bits: int, share: float, stored: bool
) -> None:
    """The merged model is nearer to the run's than the published base with the same adapter is.

    LLM.int8 rounds activations too, which no merged weight can hold.
    """
    pytest.importorskip("bitsandbytes")
    from grandrounds.model.base import BaseSpec, load_base

    base, more = tiny_base, {"model.quantization": bits}
    if stored:
        base, more = tmp_path / "stored", {}
        load_base(BaseSpec(str(tiny_base), bits, "float32")).save_pretrained(base)
        AutoTokenizer.from_pretrained(tiny_base).save_pretrained(base)
    checkpoint = find_checkpoint(made_run(tmp_path / "run", base, {1: None}, **more))
    folder = exports.export(checkpoint, merge=True, to=tmp_path / "whole")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.dtype == torch.float32
    quantised = load_base(BaseSpec(str(tiny_base), bits, "float32"))
    tuned = PeftModel.from_pretrained(quantised, checkpoint.folder).eval()
    published = AutoModelForCausalLM.from_pretrained(tiny_base)
    away = PeftModel.from_pretrained(published, checkpoint.folder)
    difference = (logits_of(merged) - logits_of(tuned)).abs().max()
    assert difference < share * (logits_of(away) - logits_of(tuned)).abs().max()
    card = (folder / "README.md").read_text()
    assert f"{bits}-bit weights, dequantised" in card
    assert ("rounded activations to 8 bits too" in card) == (bits == 8)


# --- Which checkpoint -----------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "number"), [("last", 6), ("best", 4), ("2", 2)])
def test_the_chosen_checkpoint_is_exported(
    made: Path, tmp_path: Path, which: str, number: int
) -> None:
    result = command("export", made, "--checkpoint", which, "--to", tmp_path / "out")
    assert f"(checkpoint after round {number})" in result.stdout
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        saved = made / f"peft_{number}" / name
        assert (tmp_path / "out" / name).read_bytes() == saved.read_bytes()


def test_without_a_folder_it_lies_in_the_run_and_no_partial_one_remains(made: Path) -> None:
    assert command("export", made).exit_code == 0
    assert [f.name for f in (made / "export").iterdir()] == ["peft_6"]
    assert RunDirectory.open(made).read_metrics()


@pytest.mark.parametrize(
    ("which", "error", "said"),
    [
        ("3", RunDirectoryError, "no checkpoint of round 3; it has checkpoints of rounds 2, 4, 6"),
        ("bets", ConfigError, "Did you mean 'best'?"),
        ("-1", ConfigError, "give last, best or the number of a round"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_refused(
    made: Path, which: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=re.escape(said)):
        find_checkpoint(made, which)


def test_best_needs_a_held_out_loss(tiny_base: Path, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", tiny_base, {2: None})
    with pytest.raises(RunDirectoryError, match=r"measured no held-out loss.*or a round: 2"):
        find_checkpoint(run, "best")


@pytest.mark.parametrize("name", ["export", "ask"])
def test_no_run_and_no_checkpoint_yet_are_one_line_each(
    name: str, tiny_base: Path, tmp_path: Path
) -> None:
    result = command(name, tmp_path)
    assert result.exit_code == 1
    assert "is not a run directory: it has no config.toml" in one_line(result)
    made_run(tmp_path / "run", tiny_base, {})
    result = command(name, tmp_path / "run")
    assert "has no checkpoint yet: 0 rounds finished, and the first is saved after round 8" in (
        one_line(result)
    )


# --- Whole or not at all --------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(made: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    result = command("export", made, "--to", tmp_path)
    assert result.exit_code == 1
    assert "is not an empty folder. Remove it, or choose another one with --to" in one_line(result)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert command("export", made, "--to", empty).exit_code == 0


def test_a_folder_that_cannot_be_written_is_one_line(made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = command("export", made, "--to", tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert "file/out cannot be written" in one_line(result)


def test_an_export_that_fails_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exports.shutil, "copyfile", full)
    with pytest.raises(RunDirectoryError, match=r"No space left on device\. Free some disk space"):
        exports.export(find_checkpoint(made), to=tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_is_filled_during_the_export_is_left_alone(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, card = tmp_path / "out", exports._card

    def meanwhile(*args: Any) -> str:
        folder.mkdir()
        (folder / "mine").write_text("mine")
        return card(*args)

    monkeypatch.setattr(exports, "_card", meanwhile)
    with pytest.raises(RunDirectoryError, match="is not an empty folder"):
        exports.export(find_checkpoint(made), to=folder)
    assert (folder / "mine").read_text() == "mine"


def test_a_damaged_checkpoint_and_another_base_are_told(
    made: Path, tmp_path: Path, tiny_base: Path
) -> None:
    checkpoint = find_checkpoint(made)
    weights = checkpoint.folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(ModelError, match="is damaged"):
        exports.export(checkpoint, to=tmp_path / "out")
    weights.write_bytes(whole)
    config = (made / "config.toml").read_text().replace(str(tiny_base), "formulary")
    (made / "config.toml").write_text(config)
    with pytest.raises(ModelError, match="does not fit the base 'formulary'"):
        exports.export(find_checkpoint(made), merge=True, to=tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["run"]


# --- Publishing, without a network ----------------------------------------------------------------


class Hub:
    """The two calls of huggingface_hub's HfApi that are made."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.calls: list[Any] = []
        self.error = error

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        self.calls.append((repo_id, private, exist_ok))
        return types.SimpleNamespace(repo_id=f"ward/{repo_id.rpartition('/')[2]}")

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        self.calls.append((repo_id, sorted(f.name for f in Path(folder_path).iterdir())))
        if self.error:
            raise self.error


def test_a_new_repository_is_private_and_gets_the_whole_folder(made: Path, tmp_path: Path) -> None:
    folder = exports.export(find_checkpoint(made), to=tmp_path / "out", repository="ward/first")
    hub = Hub()
    assert exports.push(folder, "ward/first", hub) == "https://huggingface.co/ward/first"
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert hub.calls == [("ward/first", True, True), ("ward/first", files)]
    card = (folder / "README.md").read_text()
    assert "| Checkpoint | https://huggingface.co/ward/first |" in card


@pytest.mark.parametrize("error", [ConnectionError("away"), RuntimeError(), KeyboardInterrupt()])
def test_a_failed_upload_loses_nothing_and_names_the_command(
    made: Path, tmp_path: Path, error: BaseException
) -> None:
    folder = exports.export(find_checkpoint(made), to=tmp_path / "my export")
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else GrandRoundsError
    with pytest.raises(kind) as told:
        exports.push(folder, "ward/first", Hub(error))
    assert f"hf upload ward/first '{folder}' . --private" in str(told.value)
    assert (folder / "adapter_model.safetensors").is_file()


def test_the_named_command_is_one_that_the_hub_s_tool_takes() -> None:
    """huggingface_hub's own parser knows every word of it."""
    import inspect

    from huggingface_hub.cli.upload import upload

    given = set(inspect.signature(upload).parameters)
    assert {"repo_id", "local_path", "path_in_repo", "private"} <= given


def test_offline_a_push_is_told_in_one_line_after_the_export(made: Path, tmp_path: Path) -> None:
    result = command("export", made, "--to", tmp_path / "out", "--push", "ward/first")
    assert result.exit_code == 1
    assert "The upload to ward/first failed: " in one_line(result)
    assert "Retry" not in result.stdout
    assert (tmp_path / "out" / "README.md").is_file()


def test_a_name_that_the_hub_refuses_is_told_before_anything_is_written(made: Path) -> None:
    result = command("export", made, "--push", "no/such/name")
    assert result.exit_code == 2
    assert "--push 'no/such/name' is not a valid repository name" in one_line(result)
    assert not (made / "export").exists()


# --- The card -------------------------------------------------------------------------------------


def test_the_card_says_what_a_reader_must_know(trained: Path, tmp_path: Path) -> None:
    folder = exports.export(find_checkpoint(trained), to=tmp_path / "out")
    card = (folder / "README.md").read_text()
    summary = json.loads((trained / "summary.json").read_text())
    score = summary["formulary"]["private"]["tuned"]
    assert f"private | tuned | {score['correct']}/300 |" in card
    assert "private | base | 69/300 | 23.0 | 18.6 to 28.1 |" in card
    assert "| data | formulary, 4 sites, iid |" in card
    assert f"(base {summary['held_out_loss']['first']:.4f})" in card
    assert "No differential privacy. Updates were not masked: the server saw every" in card
    assert "**not a medical device**" in card
    assert '"data.num-partitions" = 4\n' in card
    assert re.search(r"\| Comm. Costs \| \d+\.\d\d MB", card)


def test_the_recipe_of_a_card_is_the_run_s_configuration(trained: Path, tmp_path: Path) -> None:
    card = (exports.export(find_checkpoint(trained), to=tmp_path / "o") / "README.md").read_text()
    (text,) = re.findall(r"```toml\n(.*?)```", card, re.DOTALL)
    (tmp_path / "recipe.toml").write_text(text)
    again = recipes.resolve(recipes.load_recipe(tmp_path / "recipe.toml"))
    config = recipes.resolve(recipes.load_recipe(trained / "config.toml"))
    assert recipes.differences(config, again) == []


def test_hugging_face_reads_the_metadata(trained: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(exports.export(find_checkpoint(trained), to=tmp_path / "o") / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.tags == ["lora", "federated-learning", "flower", "medical"]
    names = [result.dataset_name for result in card.data.eval_results]
    assert names == ["Formulary (fictional), private", "Formulary (fictional), public"]
    parts = {result.dataset_config: result.metric_value for result in card.data.eval_results}
    asked = json.loads((trained / "summary.json").read_text())["formulary"]
    shares = {kind: asked[kind]["tuned"]["correct"] / asked[kind]["tuned"]["n"] for kind in asked}
    assert parts == pytest.approx(shares, abs=1e-4)
    assert len(card.data.to_dict()["model-index"][0]["results"]) == 2  # not taken for one
    assert card.data.license == "apache-2.0"  # of the embedded base
    assert card.data.base_model is None
    whole = recipes.resolve({"model.name": "Qwen/Qwen2.5-0.5B", "static.dataset.name": "a/b: c"})
    metadata = ModelCard(model_card(whole, ["q_proj"], 1, None, 1.0)).data
    assert metadata.base_model == "Qwen/Qwen2.5-0.5B"
    assert metadata.to_dict()["base_model_relation"] == "adapter"
    assert metadata.datasets is None  # no name of the hub
    assert metadata.license == "unknown"


@pytest.mark.parametrize(("facts", "base"), [({"base-commit": "a" * 40}, "gpt2"), ({}, None)])
def test_a_base_of_one_word_is_the_hub_s_where_a_site_read_it_from_there(
    facts: dict[str, str], base: str | None
) -> None:
    """Else it may be the short name of a base of one's own."""
    from huggingface_hub import ModelCard

    config = recipes.resolve({"model.name": "gpt2"})
    found = Findings(sites=[{"partition-id": 0, **facts}])
    assert ModelCard(model_card(config, ["c_attn"], 1, None, 1.0, found)).data.base_model == base


@pytest.mark.parametrize(
    ("name", "mu", "told"),
    [("fedexp", 0.01, " (mu 0.01)"), ("krum", 0.5, " (mu 0.5)"), ("fedavg", 0.0, "")],
)
def test_mu_is_named_with_every_rule_that_has_a_proximal_term(
    name: str, mu: float, told: str
) -> None:
    config = recipes.resolve({"strategy.name": name, "strategy.proximal-mu": mu})
    assert f"| aggregation | {name}{told}, " in model_card(config, ["q_proj"], 1, None, 1.0)


def test_a_stacked_adapter_s_card_has_rank_and_alpha_of_its_files(tmp_path: Path) -> None:
    run = copy_of("flora", tmp_path)
    card = (exports.export(find_checkpoint(run), to=tmp_path / "o") / "README.md").read_text()
    saved = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (4, 128)
    assert "| adapter | r = 4, alpha = 128 (stacked; trained at r = 1, alpha = 32), on " in card


def test_the_card_of_an_early_checkpoint_states_its_own_cost(tmp_path: Path) -> None:
    """The run of 4 rounds had 3 unused replies, one of them in the second round."""
    run = copy_of("finished", tmp_path)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for number in (2, 3, 4):
        records[number]["failed"] = {"1": "late"}
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"failed_replies": 3}))

    def card() -> str:
        checkpoint = find_checkpoint(run, "2")
        return exports._card(checkpoint, exports.findings(checkpoint), None)

    mib = records[2]["communication-mib"]
    assert mib < summary["communication_mib"]
    assert f"| communication so far | {mib:,.2f} MiB" in card()
    assert f"| Comm. Costs | {mib:,.2f} MB" in card()
    assert "| Rounds | 2, 2 sites each |" in card()
    assert "# LoRA adapter for formulary, after round 2 of 4\n" in card()
    assert "| failed replies so far | 1 |" in card()
    state = shutil.copytree(run / "state" / "round-000004", run / "state" / "round-000002")
    content = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps(content | {"failed-replies": 2}))
    assert "| failed replies so far | 2 |" in card()  # with those of a round that failed first


def test_a_card_shows_no_local_path(made: Path, tmp_path: Path, tiny_base: Path) -> None:
    card = (exports.export(find_checkpoint(made), to=tmp_path / "o") / "README.md").read_text()
    assert str(tiny_base) not in card
    assert f"| base | {tiny_base.name} (local), not quantised |" in card


def test_evaluated_accuracies_come_with_the_base_and_only_for_these_weights(
    trained: Path, tmp_path: Path
) -> None:
    """The last and best checkpoint of the run are asked; the first is not among them."""
    run = tmp_path / "run"
    exports.shutil.copytree(trained, run)
    evaluate_target(run, limit=8, permutations=0, protocol="all")
    found = exports.evaluated(find_checkpoint(run))
    assert {a.protocol for a in found} == {"flowertune", "likelihood"}
    assert [a.is_base for a in found].count(True) == len(found) // 2
    assert not any(a.complete for a in found)
    assert exports.evaluated(find_checkpoint(run, "2")) == []
    card = (exports.export(find_checkpoint(run), to=tmp_path / "o") / "README.md").read_text()
    assert "(not all items) | base |" in card
    other = (exports.export(find_checkpoint(run, "2"), to=tmp_path / "1") / "README.md").read_text()
    assert "Not evaluated." in other


def test_the_card_names_the_commits_that_were_read() -> None:
    config = recipes.resolve(
        {
            **{"model.name": "someone/model", "model.revision": "v1"},
            **{"static.dataset.name": "someone/cards", "data.partitioner": "iid"},
        }
    )
    asked = Accuracy("likelihood", "medmcqa", "MedMCQA", True, 1, 4, (0.1, 0.6), revision="c" * 40)
    found = Findings(
        sites=[{"partition-id": 0, "base-commit": "a" * 40, "data-commit": "b" * 40}],
        accuracies=[asked],
    )
    card = model_card(config, ["q_proj"], 1, None, 1.0, found)
    assert f"| base | someone/model, revision v1 = commit {'a' * 40}, not quantised |" in card
    assert f", commit {'b' * 40} |" in card
    assert f"Questions from the hub: medmcqa at {'c' * 40}." in card
    assert 'AutoModelForCausalLM.from_pretrained(base, revision="v1")' in card


def test_figures_that_cannot_be_right_are_not_published(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    exports.shutil.copytree(trained, run)
    evaluate_target(run, limit=4, permutations=0)
    file = run / "evaluation" / "evaluation.json"
    evaluation = json.loads(file.read_text())
    evaluation["rows"][0]["correct"] += 1
    file.write_text(json.dumps(evaluation))
    result = command("export", run, "--to", tmp_path / "out")
    assert result.exit_code == 1
    assert "evaluation.json has impossible figures: row 1" in one_line(result)
    assert not (tmp_path / "out").exists()


# --- Documentation --------------------------------------------------------------------------------


def test_the_commands_of_the_documentation_parse() -> None:
    import typer.main

    commands = shell_commands("export.md", "grandrounds")
    assert {words[1] for words in commands} == {"export", "ask", "run"}
    for words in commands:
        parse(typer.main.get_command(app), words)
