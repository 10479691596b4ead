"""A stopped evaluation is resumed; nothing is asked twice, and only under equal settings."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from grandrounds.errors import GrandRoundsError
from grandrounds.study.evaluation import runner
from tests.study.evaluation.small import MEDMCQA, PUBMEDQA


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


@pytest.mark.parametrize(
    "after", [6, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 11))]
)
@pytest.mark.slow
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
    with pytest.raises(KeyboardInterrupt, match="continue with the same command and --resume"):
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
    with pytest.raises(GrandRoundsError, match="has no evaluation to resume"):
        ask(resume=True)
    ask(limit=1)
    with pytest.raises(GrandRoundsError, match="already contains an evaluation: continue it with"):
        ask(limit=1)
