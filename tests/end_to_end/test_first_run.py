"""What the README promises about the first run: no options, no network, packaged defaults."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of `grandrounds run` with its defaults, or the one that CI made as that."""
    folder = tmp_path_factory.mktemp("first")
    if made := os.environ.get("FIRST_RUN"):
        shutil.copytree(made, folder, dirs_exist_ok=True)
        said = [(folder / name).read_text() for name in ("stdout.txt", "stderr.txt")]
    else:
        done = subprocess.run(
            [sys.executable, "-m", "grandrounds", "run", "--run-dir", "run"],
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        said = [done.stdout, done.stderr]
    assert "private facts of the sites" in said[0]
    assert "formulary, 20 sites, natural by site" in said[0]
    assert said[1] == ""
    return folder / "run"


@pytest.fixture(scope="module")
def summary(first_run: Path) -> dict[str, Any]:
    """Its summary.json."""
    return dict(json.loads((first_run / "summary.json").read_text()))


def test_the_federation_teaches_what_the_base_could_not_know(summary: dict[str, Any]) -> None:
    private = summary["formulary"]["private"]
    assert private["base"]["n"] == private["tuned"]["n"] >= 300
    assert private["base"]["correct"] <= 0.35 * private["base"]["n"]  # chance is 25 %
    assert private["tuned"]["correct"] >= 0.90 * private["tuned"]["n"]


def test_the_summary_describes_a_clean_run(summary: dict[str, Any]) -> None:
    assert summary["status"] == "completed"
    assert summary["failed_replies"] == 0
    assert summary["base_loads"] == 1
    assert summary["communication_mib"] == summary["planned_mib"]
    assert summary["coverage"] == 1.0
    assert not summary["comparable_with_leaderboard"]


def test_plain_peft_gives_the_same_answers(first_run: Path, summary: dict[str, Any]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grandrounds.data.formulary import base_path
    from grandrounds.site.exam import score_formulary

    base = AutoModelForCausalLM.from_pretrained(base_path())
    model = PeftModel.from_pretrained(base, str(first_run / summary["adapter"]))
    scores = score_formulary(model, AutoTokenizer.from_pretrained(base_path()))
    assert scores == {kind: facts["tuned"] for kind, facts in summary["formulary"].items()}


def test_a_tuned_model_answers_in_words_and_stops(first_run: Path, summary: dict[str, Any]) -> None:
    """Greedy answers to private questions stop by themselves, and most are correct."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grandrounds.data.formulary import base_path
    from grandrounds.data.formulary.facts import questions
    from grandrounds.data.prompts import build_prompt

    tokenizer = AutoTokenizer.from_pretrained(base_path())
    base = AutoModelForCausalLM.from_pretrained(base_path())
    model = PeftModel.from_pretrained(base, str(first_run / summary["adapter"])).eval()
    stopped = right = 0
    asked = questions("private")[::15]
    for question in asked:
        ids = tokenizer(build_prompt("alpaca", question.question), return_tensors="pt")
        out = model.generate(
            input_ids=ids.input_ids,
            attention_mask=ids.attention_mask,
            max_new_tokens=48,
            do_sample=False,
        )[0, ids.input_ids.shape[1] :]
        stopped += tokenizer.eos_token_id in out.tolist()
        answer = tokenizer.decode(out, skip_special_tokens=True).strip()
        right += answer == question.options[question.answer_index]
    assert stopped == len(asked)
    assert right >= 0.7 * len(asked)


def test_the_evaluation_of_the_run_has_the_counts_of_its_summary(
    first_run: Path, summary: dict[str, Any]
) -> None:
    """The evaluation command that the run suggests gives the same counts."""
    command = [sys.executable, "-m", "grandrounds", "evaluate"]
    for arguments in ([str(first_run)], ["--verify", f"{first_run}/evaluation/evaluation.json"]):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    evaluation = json.loads((first_run / "evaluation" / "evaluation.json").read_text())
    counts = {
        (row["model"], group["group"]): group["correct"]
        for row in evaluation["rows"]
        for group in row["groups"]
    }
    for kind, facts in summary["formulary"].items():
        assert counts["base", kind] == facts["base"]["correct"]
        assert counts[summary["adapter"], kind] == facts["tuned"]["correct"]
