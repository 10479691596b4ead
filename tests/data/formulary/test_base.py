"""The embedded base model: what it weighs, what it knows and where it is found."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest
import torch

from grandrounds.data import formulary
from grandrounds.data.formulary import base_path
from grandrounds.data.formulary.facts import drugs, flashcards
from grandrounds.data.prompts import build_prompt
from grandrounds.errors import ModelError
from grandrounds.site.exam import score_formulary
from scripts.make_formulary_base import make_base, sha256


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Import path without the base, as in Flower's bundle; returns the bundle's folder."""
    package = tmp_path / "bundle" / "grandrounds" / "data" / "formulary"
    package.mkdir(parents=True)
    monkeypatch.setattr(formulary, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "bundle")])
    monkeypatch.setattr(formulary.importlib.metadata, "distributions", lambda **_: [])
    return package


def make_installed_base(root: Path) -> Path:
    folder = root / "grandrounds" / "data" / "formulary" / "base"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    return folder


def test_base_is_small(base: tuple[Any, Any]) -> None:
    assert base[0].num_parameters() < 2_000_000
    assert sum(file.stat().st_size for file in base_path().rglob("*")) < 5_000_000


def test_base_is_float32_and_takes_long_contexts(base: tuple[Any, Any]) -> None:
    assert {parameter.dtype for parameter in base[0].parameters()} == {torch.float32}
    assert base[0].config.max_position_embeddings >= 1024


def test_pad_token_differs_from_end_of_sequence(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.vocab_size == len(tokenizer)


def test_any_text_survives_the_tokenizer_and_gets_a_finite_loss(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    text = "Ärztinnen prüfen: β-Blocker 2,5 mg\t→ 処方 💊\n" * 30
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    assert ids.shape[1] >= 512
    with torch.no_grad():
        loss = model(input_ids=ids[:, :512], labels=ids[:, :512]).loss
    assert torch.isfinite(loss)


def test_no_private_name_is_in_the_vocabulary(base: tuple[Any, Any]) -> None:
    vocabulary = [token.lower() for token in base[1].get_vocab()]
    private = [drug.name.lower() for drug in drugs() if not drug.public]
    assert not [name for name in private for token in vocabulary if name in token]


def test_base_knows_public_facts_and_guesses_private_ones(
    base_scores: dict[str, dict[str, int]],
) -> None:
    """With 300 questions and chance 25% three standard errors reach from 17.5% to 32.5%."""
    results = base_scores
    assert results["public"]["correct"] > 0.9 * results["public"]["n"]
    assert 0.175 < results["private"]["correct"] / results["private"]["n"] < 0.325


def test_base_knows_public_facts_in_the_chat_template_too(base: tuple[Any, Any]) -> None:
    score = score_formulary(*base, prompt_template="chat", kinds=("public",))
    assert list(score) == ["public"]
    assert score["public"]["correct"] > 0.9 * score["public"]["n"]


def test_base_answers_a_public_flashcard_and_stops(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    drug = drugs()[0]
    prompt = build_prompt("alpaca", f"What does {drug.name} treat?")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == f" {drug.use}"
    assert answer[-1] == tokenizer.eos_token_id


def test_flashcards_are_short(base: tuple[Any, Any]) -> None:
    texts = [build_prompt("alpaca", str(c["input"])) + f" {c['output']}" for c in flashcards()]
    assert max(map(len, base[1](texts)["input_ids"])) < 64


def test_finding_the_base_loads_no_torch() -> None:
    code = (
        "import sys; from grandrounds.data.formulary import base_path; base_path(); "
        "from grandrounds.data.formulary import facts; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_base_is_found_on_the_import_path_when_the_bundle_has_none(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = make_installed_base(tmp_path / "site-packages")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site-packages")])
    assert base_path() == installed


def test_base_is_found_through_the_record_of_an_editable_installation(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "a project"
    installed = make_installed_base(project)

    class Editable(Distribution):
        def read_text(self, filename: str) -> str | None:
            record = {"url": project.as_uri(), "dir_info": {"editable": True}}
            return json.dumps(record) if filename == "direct_url.json" else None

        def locate_file(self, path: Any) -> Any:
            return Path(path)

    monkeypatch.setattr(formulary.importlib.metadata, "distributions", lambda **_: [Editable()])
    assert base_path() == installed


def test_missing_base_is_a_model_error_that_says_what_to_do(bundle: Path) -> None:
    with pytest.raises(ModelError, match=r"found in none of 2 places.*make_formulary_base"):
        base_path()


@pytest.mark.slow
def test_maker_is_deterministic(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert make_base(first, steps=4) == make_base(second, steps=4)
    assert sha256(first / "tokenizer.json") == sha256(second / "tokenizer.json")
    assert (first / "README.md").read_text() == (second / "README.md").read_text()
