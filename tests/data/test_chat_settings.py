"""What a run sets in a chat template is written into it, and renders as if it were handed over."""

from __future__ import annotations

import copy
import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from grandrounds.config.values import Table
from grandrounds.data.chat_settings import (
    AS_IT_IS,
    ChatSettings,
    options_of,
    prints_today,
    with_settings,
)
from grandrounds.errors import ConfigError
from grandrounds.model.tokenizers import set_in

TEMPLATE = (
    "{% set thinks = enable_thinking if enable_thinking is defined else true %}"
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% macro head(role) %}<{{ role }}|{{ strftime_now('%Y') }}>{% endmacro %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = 'Be kind.' %}{% endif %}"
    "{{ system }} {{ date_string }} {{ tone | default('plain') }}\n"
    "{% for m in messages %}{% set content = m.content %}{{ head(m.role) }}{{ content }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ head('assistant') }}"
    "{{ '' if thinks else 'no thoughts' }}{% endif %}"
)
"""Takes options, prints the date in two formats, and changes what it is given."""

TURNS = [{"role": "user", "content": "Why?"}]
LEAP = "2024-02-29"


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


def render(tokenizer: Any, template: str, turns: Any = TURNS, **options: Any) -> str:
    return str(
        tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=True, **options
        )
    )


def test_the_options_of_a_template_are_what_it_takes_from_outside() -> None:
    assert options_of(TEMPLATE) == ["date_string", "enable_thinking", "tone"]
    assert prints_today(TEMPLATE)
    assert not prints_today("{{ messages[0].content }}")
    assert with_settings(TEMPLATE, AS_IT_IS, "x") is TEMPLATE


@pytest.mark.parametrize(
    "options", [{"enable_thinking": False}, {"tone": 'a "b"\n%} {{ c }} é😀'}, {"tone": 3}]
)
def test_options_render_as_if_they_were_handed_over(
    tokenizer: Any, options: dict[str, Any]
) -> None:
    own = with_settings(TEMPLATE, ChatSettings(options=json.dumps(options)), "x")
    assert render(tokenizer, own) == render(tokenizer, TEMPLATE, **options)


def test_a_system_prompt_is_the_first_message_unless_there_is_one(tokenizer: Any) -> None:
    said = 'You are "a nurse" {{ of }} %}.'
    system = [{"role": "system", "content": said}]
    own = with_settings(TEMPLATE, ChatSettings(system_prompt=said), "x")
    assert render(tokenizer, own) == render(tokenizer, TEMPLATE, [*system, *TURNS])
    other = [{"role": "system", "content": "Other."}, *TURNS]
    assert render(tokenizer, own, other) == render(tokenizer, TEMPLATE, other)


def test_a_fixed_day_is_printed_on_every_day(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = with_settings(TEMPLATE, ChatSettings(LEAP), "x")
    text = render(tokenizer, own)
    assert "29 Feb 2024" in text
    assert "<user|2024>" in text
    assert str(datetime.date.today().year) not in text
    assert text == render(tokenizer, own, date_string="ignored")
    said = ChatSettings(LEAP, '{"date_string": "in spring"}')
    assert "in spring" in render(tokenizer, with_settings(TEMPLATE, said, "x"))


def test_what_a_template_does_not_use_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"enable_thoughts.*does not use it.*enable_thinking, tone"
    ):
        with_settings(TEMPLATE, ChatSettings(options='{"enable_thoughts": false}'), "x")
    plain = "{{ messages[0].content }}"
    for options in ('{"content": "x"}', '{"messages": "x"}', '{"strftime_now": 1}'):
        with pytest.raises(ConfigError, match=r"does not use it\. Its options: none"):
            with_settings(plain, ChatSettings(options=options), "x")
    with pytest.raises(ConfigError, match="prints no date"):
        with_settings(plain, ChatSettings(LEAP), "x")
    with pytest.raises(ConfigError, match="not valid Jinja"):
        prints_today("{% if %}")
    aliased = "{% set clock = strftime_now %}{{ clock('%d') }}{{ strftime_now('%Y') }}"
    for computed in ("{{ strftime_now(form) }}", "{{ strftime_now(3) }}", aliased):
        with pytest.raises(ConfigError, match="computes the format"):
            with_settings(computed, ChatSettings(LEAP), "x")
    asked = "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% endif %}"
    assert "29" in with_settings(asked, ChatSettings(LEAP), "x")


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN", "1e400"])
def test_an_option_that_jinja_cannot_read_is_refused(value: str) -> None:
    """`Infinity` is a name in Jinja, so the option was rendered as if it were not set."""
    assert not Table().admits(f'{{"level": {value}}}')
    assert Table().admits('{"level": 1e9, "on": true, "tone": "inf"}')


def test_a_system_prompt_that_occurs_in_the_template_by_itself_is_not_rendered(
    tokenizer: Any,
) -> None:
    """The prompt `it` was found in `assistant`."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}"
        "{% endfor %}<assistant>it"
    )
    with pytest.raises(ConfigError, match="has no system role"):
        set_in(own, ChatSettings(system_prompt="it"), "x")
    own.chat_template = TEMPLATE
    set_in(own, ChatSettings(system_prompt="it"), "x")
