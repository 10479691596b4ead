"""The tokenizer of a run: that of its base, with the run's settings in its chat template."""

from __future__ import annotations

import dataclasses
import datetime
from functools import lru_cache
from typing import Any

from grandrounds.config.keys import Config, DataConfig
from grandrounds.data.chat import says_system_prompt
from grandrounds.data.chat_settings import AS_IT_IS, ChatSettings, prints_today, with_settings
from grandrounds.errors import ConfigError, first_line
from grandrounds.model.base import load_tokenizer


@lru_cache(maxsize=8)
def tokenizer_of(source: str, settings: ChatSettings = AS_IT_IS) -> Any:
    """Return a base's tokenizer with settings in its chat template, read once per process.

    Raises
    ------
    ConfigError
        If the template does not use what is set.
    ModelError
        If the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(source)
    set_in(tokenizer, settings, source)
    return tokenizer


def set_in(tokenizer: Any, settings: ChatSettings, source: str) -> None:
    """Write settings into a tokenizer's chat template.

    Raises
    ------
    ConfigError
        If it has no chat template, or one that does not use what is set.
    """
    if settings == AS_IT_IS:
        return
    if not (template := template_of(tokenizer)):
        named = ", ".join(f"data.{name}" for name in settings.as_dict())
        raise ConfigError(f"{named}: the tokenizer of {source!r} has no chat template.")
    tokenizer.chat_template = with_settings(template, settings, source)
    if settings.system_prompt and not says_system_prompt(tokenizer):
        raise ConfigError(
            f"data.system-prompt is set, but the chat template of {source!r} has no system role. "
            "Leave it empty, or put its text before the questions of the data."
        )


def template_of(tokenizer: Any) -> str:
    """Return a tokenizer's chat template; empty if it has none.

    Raises
    ------
    ConfigError
        If it has several, and none is the default.
    """
    if not tokenizer.chat_template:
        return ""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ConfigError(
            f"The tokenizer has no default chat template: {first_line(error)}. Use "
            'data.prompt-template = "alpaca".'
        ) from error


def run_tokenizer(config: Config) -> Any:
    """Return the tokenizer of a run.

    Raises
    ------
    ConfigError
        If its chat template prints the date of today and the run has none, so that every process
        would train on another text.
    """
    return dated_tokenizer(config.model.source, config.data)


def dated_tokenizer(source: str, data: DataConfig) -> Any:
    """Return the tokenizer of a base for a run with this prompt; see `run_tokenizer`."""
    tokenizer = tokenizer_of(source, ChatSettings(*data.chat))
    if data.prompt_template == "chat" and not data.template_date and _prints_today(source):
        today = datetime.date.today().isoformat()
        raise ConfigError(
            f"The chat template of {source!r} prints the date of the day: set data.template-date, "
            f'for example to "{today}", so that all sites and a resumed run read the same text.'
        )
    return tokenizer


@lru_cache(maxsize=8)
def _prints_today(source: str) -> bool:
    template = template_of(tokenizer_of(source))
    return bool(template) and prints_today(template)


def dated(config: Config, begun: str = "") -> Config:
    """Return a configuration with the day on which it was begun, if its chat template prints one.

    Parameters
    ----------
    begun : str
        As YYYY-MM-DD; empty: today.
    """
    data, source = config.data, config.model.source
    if data.prompt_template != "chat" or data.template_date or not _prints_today(source):
        return config
    day = begun or datetime.date.today().isoformat()
    return dataclasses.replace(config, data=dataclasses.replace(data, template_date=day))
