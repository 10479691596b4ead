"""Replay: what is shown beside a site's own examples, and what a visit makes of it."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest

from grandrounds.config import automatic, recipes
from grandrounds.data.formulary.facts import questions
from grandrounds.data.general import PROMPTS, QUESTIONS, shown_options
from grandrounds.errors import ConfigError
from grandrounds.model import machine
from grandrounds.model.tokenizers import run_tokenizer
from grandrounds.site import replay, training
from tests.runs import Settings, adapter_bytes, metrics_of, play

KEY = "train.replay-examples"


def count(settings: Settings) -> object:
    return recipes.resolve(settings).train.replay_examples


def test_replay_is_on_only_where_the_formulary_is_taught_to_its_base(tmp_path: Path) -> None:
    assert count({}) == 3
    assert count({"data.partitioner": "iid"}) == 3
    assert count({"static.dataset.name": "cards.jsonl"}) == 0
    assert count({"static.dataset.name": "common-and-rare"}) == 0
    assert count({"model.name": "smollm2-135m-instruct"}) == 0
    private = {"privacy.unit-guarantee": "example", "privacy.target-epsilon": 4.0}
    assert count(private) == 0
    entry = tmp_path / "pyproject.toml"
    entry.write_text(
        '[tool.flwr.app.config]\nmodel.name = "formulary"\nstatic.dataset.name = "formulary"\n'
    )
    assert count(recipes.load_recipe(entry)) == 0
    before = tmp_path / "config.toml"  # a run directory of a version without the key
    before.write_text('resume-from = ""\n')
    assert count(recipes.load_recipe(before)) == 0


@pytest.mark.parametrize("changes", [{}, {KEY: 0}, {KEY: 5}, {"data.partitioner": "iid"}])
def test_a_configuration_is_read_back_with_auto_where_it_stands(changes: Settings) -> None:
    flat = recipes.resolve(changes).flat()
    back = automatic.unsettle(flat)
    assert recipes.resolve(back).flat() == flat
    assert (back[KEY] == "auto") == (KEY not in changes)


def test_what_cannot_be_replayed_is_told() -> None:
    with pytest.raises(ConfigError, match=r"replay-examples = 17 exceeds .* = 16"):
        recipes.resolve({KEY: 17})
    private = {"privacy.unit-guarantee": "example", "privacy.target-epsilon": 4.0}
    with pytest.raises(ConfigError, match="replay-examples = 2 does not go with privacy"):
        recipes.resolve({KEY: 2, **private})


def test_public_cards_are_replayed_and_none_is_asked_in_the_exam() -> None:
    config = recipes.resolve({"train.num-threads": 1})
    resident, tokenizer = machine.prepare_model(config), run_tokenizer(config)
    known = replay.public_examples(config, resident)
    assert len(known) == 120 * 3 * 5
    texts = [tokenizer.decode(e.input_ids, skip_special_tokens=True) for e in known]
    for kind in ("public", "private"):
        for item in questions(kind):
            assert not any(item.question in text for text in texts)
    first = replay.replayed(config, resident, 1, 0, 6)
    assert [len(batch) for batch in first] == [3] * 6
    assert len({e.input_ids for batch in first for e in batch}) == 18
    assert replay.replayed(config, resident, 1, 0, 6) == first
    assert replay.replayed(config, resident, 2, 0, 6) != first
    assert replay.replayed(config, resident, 1, 1, 6) != first


def test_another_base_answers_general_prompts_itself(settings: Settings) -> None:
    config = recipes.resolve({**settings, KEY: 2})
    resident = machine.prepare_model(config)
    known = replay.public_examples(config, resident)
    assert len(known) == len(PROMPTS)
    assert all(0 < e.answer_tokens <= replay.ANSWER_TOKENS + 1 for e in known)
    many = replay.replayed(config, resident, 1, 0, 30)  # 60 of 40: none three times
    drawn = [e.input_ids for batch in many for e in batch]
    assert max(map(drawn.count, drawn)) == 2


def test_what_a_base_answered_does_not_keep_it_loaded(settings: Settings) -> None:
    config = recipes.resolve({**settings, KEY: 2})
    resident = machine.prepare_model(config)
    known = replay.public_examples(config, resident)
    assert replay.public_examples(config, resident) is known  # answered once

    class Model:
        """Stands for another base, which nothing else holds."""

    other = Model()
    replay._ANSWERS[other] = {}
    count = len(replay._ANSWERS)
    del other
    gc.collect()
    assert len(replay._ANSWERS) == count - 1


def test_replay_changes_the_adapter_but_not_what_is_counted(
    settings: Settings, tmp_path: Path
) -> None:
    settings = {**settings, "num-server-rounds": 1, "strategy.fraction-evaluate": 0.0}
    plain = play(settings)
    shown = play(settings, **{KEY: 2, "run-directory": str(tmp_path / "shown")})
    none = play(settings, **{KEY: 0, "run-directory": str(tmp_path / "none")})
    assert adapter_bytes(plain) == adapter_bytes(none) != adapter_bytes(shown)
    [own], [beside] = ([m for m in metrics_of(run) if "examples" in m] for run in (plain, shown))
    for key in ("examples", "tokens", "padding-tokens"):
        assert own[key] == beside[key]


def test_a_step_takes_the_mean_over_own_and_replayed_tokens(settings: Settings) -> None:
    """One step of SGD-like size: its gradient is that of the batch with the replayed examples."""
    import torch

    from grandrounds.site.local_data import site_of
    from grandrounds.wire.schedule import VisitSchedule

    config = recipes.resolve(settings)
    resident, site = machine.prepare_model(config), site_of(config, 0)
    parameters = list(resident.parameters.values())
    seen: list[list[torch.Tensor]] = []
    how = training.VisitSettings(
        *(1, VisitSchedule(1e-3, 0, "constant"), "adamw_torch", 0.0, 0.0, 0.0),
        *(machine.forward(config), 0),
    )

    def gradients(own: int, shown: int) -> list[torch.Tensor]:
        before = [p.detach().clone() for p in parameters]
        with pytest.MonkeyPatch.context() as patch:
            optimizer = torch.optim.SGD(parameters, lr=1.0)
            patch.setattr(training, "make_optimizer", lambda *_: optimizer)
            patch.setattr(training, "set_learning_rate", lambda *_: None)
            beside = replace(how, replayed=[site.train[own : own + shown]] * (shown > 0))
            training.train_visit(resident.model, parameters, [site.train[:own]], beside, 0)
        moved = [b - p.detach() for b, p in zip(before, parameters, strict=True)]
        with torch.no_grad():
            for p, b in zip(parameters, before, strict=True):
                p.copy_(b)
        return moved

    seen = [gradients(5, 0), gradients(3, 2)]
    for one, other in zip(*seen, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)
    assert any(float(one.abs().max()) > 0 for one in seen[0])


def test_general_questions_are_forty_with_the_truth_in_every_place() -> None:
    assert len(QUESTIONS) == len({q.question for q in QUESTIONS}) == 40
    assert not {q.question for q in QUESTIONS} & set(PROMPTS)
    places = []
    for number, question in enumerate(QUESTIONS):
        options, place = shown_options(number, question)
        assert len(set(options)) == 4
        assert options[place] == question.options[0]
        places.append(place)
    assert [places.count(place) for place in range(4)] == [10] * 4
