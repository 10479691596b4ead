"""A site's data: the name that a column gives it, its tag, and the text of the run's prompt."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers.utils import chat_template_utils

from grandrounds.config import recipes
from grandrounds.data.tokenization import TokenizedExample
from grandrounds.model.tokenizers import dated, run_tokenizer, tokenizer_of
from grandrounds.site import local_data
from grandrounds.site.local_data import Site, natural_name, site_of
from grandrounds.site.visit import introduction
from grandrounds.wire import messages
from tests.data.test_chat_settings import TEMPLATE


def test_a_site_of_the_natural_partition_introduces_itself_by_the_value_of_its_column(
    federation: dict[str, Any],
) -> None:
    natural = {"data.partitioner": "natural", "data.partition-by": "ward"}
    config = recipes.resolve({**federation, **natural})
    told = [introduction(site_of(config, p), config) for p in range(4)]
    assert all(facts.keys() <= messages.FACTS for facts in told)  # the server drops others
    assert [facts["name"] for facts in told] == ["ward 0", "ward 1", "ward 2", "ward 3"]
    iid = recipes.resolve(federation)
    assert "name" not in introduction(site_of(iid, 0), iid)


@pytest.mark.parametrize(
    ("value", "name"),
    [(7, "ward 7"), (3.0, "ward 3.0"), ("-1", "ward -1"), ("North", "North"), ("9b", "9b")],
)
def test_a_number_is_named_with_its_column(value: object, name: str) -> None:
    assert natural_name("ward", value) == name


def test_the_tag_covers_training_and_held_out_examples_and_their_order() -> None:
    one, two, three = (TokenizedExample((1, 2, last), 1) for last in (3, 4, 5))
    sites = [
        Site(0, (one, two), (three,), {}),
        Site(0, (two, one), (three,), {}),
        Site(0, (one, two), (two,), {}),
        Site(0, (one, three), (two,), {}),
        Site(0, (one,), (two, three), {}),
        Site(0, (one, TokenizedExample((1, 2, 4), 2)), (three,), {}),
    ]
    assert len({site.tag for site in sites}) == len(sites)
    assert Site(3, (one, two), (three,), {"rows": 3}).tag == sites[0].tag


# --- The prompt -----------------------------------------------------------------------------------


def fresh_process() -> None:
    """Forget what a process has read, as after a restart."""
    tokenizer_of.cache_clear()
    local_data._open.cache_clear()
    local_data._note_format.cache_clear()


def test_a_run_resumed_on_another_day_trains_on_the_same_text_and_its_format_is_said_once(
    federation: dict[str, Any],
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    thinking = TEMPLATE.replace("{{ head('assistant') }}", "{{ head('assistant') }}<think>")
    (base / "chat_template.jinja").write_text(thinking)
    chat = {"model.name": str(base), "data.prompt-template": "chat", "train.seq-length": 400}
    config = dated(recipes.resolve({**federation, **chat}))
    tags, prompts = [], []
    for day in ("2031-01-02", "2032-12-30"):
        fresh_process()
        with mock.patch.object(chat_template_utils, "datetime") as clock:
            clock.now.return_value = datetime.datetime.fromisoformat(day)
            tags.append([site_of(config, p).tag for p in range(2)])
            prompts.append(introduction(site_of(config, 0), config)["prompt"])
        assert capsys.readouterr().err.count("finished conversations do not begin with") == 1
    assert tags[0] == tags[1]
    assert prompts[0] == prompts[1]
    [text] = run_tokenizer(config).batch_decode([site_of(config, 0).train[0].input_ids])
    assert datetime.date.today().strftime("%d %b %Y") in text
    assert "2031" not in text
