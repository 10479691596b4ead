"""What a run sets in its tokenizer's chat template: the day, options, and a system prompt.

They are written into the template itself, so that whatever renders it later, in training, in
evaluation or from a published folder, renders the same text.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grandrounds.errors import ConfigError, first_line

CLOCK = "strftime_now"
"""Function by which a template prints the current date."""

DAY = "date_string"
"""Variable from which other templates take the date, printed as `DAY_FORMAT`."""

DAY_FORMAT = "%d %b %Y"

_NO_OPTIONS = frozenset(
    (CLOCK, "raise_exception", "messages", "add_generation_prompt", "continue_final_message")
) | frozenset(("tools", "documents", "bos_token", "eos_token", "unk_token", "pad_token"))
"""Names in a template that belong to whoever renders it, or to the tokenizer."""


@dataclass(frozen=True)
class ChatSettings:
    """What a run sets in a chat template; the empty settings leave it as it is."""

    date: str = ""
    """Day that the template prints, as YYYY-MM-DD; empty: the day on which it is rendered."""
    options: str = ""
    """JSON object of the template's options; empty: none."""
    system_prompt: str = ""
    """First message of every conversation; empty: none."""

    @property
    def values(self) -> dict[str, Any]:
        """The options by name."""
        return dict(json.loads(self.options)) if self.options else {}

    def as_dict(self) -> dict[str, Any]:
        """Return what is set, under the names of the keys."""
        every = {
            "template-date": self.date,
            "template-options": self.values,
            "system-prompt": self.system_prompt,
        }
        return {name: value for name, value in every.items() if value}


AS_IT_IS = ChatSettings()
"""The template as the tokenizer has it."""


def options_of(template: str) -> list[str]:
    """Return the names of a template's options.

    They are the variables that it reads and never sets, or asks whether they are defined.
    """
    from jinja2 import meta, nodes

    tree = _parsed(template)
    stored = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    asked = {
        node.node.name
        for node in (*tree.find_all(nodes.Test), *tree.find_all(nodes.Filter))
        if node.name in ("defined", "undefined", "default") and isinstance(node.node, nodes.Name)
    }
    outside = meta.find_undeclared_variables(tree) - _NO_OPTIONS
    return sorted(name for name in outside if name in asked or name not in stored)


def prints_today(template: str) -> bool:
    """Whether a template prints the day on which it is rendered."""
    from jinja2 import nodes

    return any(name.name == CLOCK for name in _parsed(template).find_all(nodes.Name))


def with_settings(template: str, settings: ChatSettings, base: str) -> str:
    """Return a chat template with a run's settings written into it.

    Parameters
    ----------
    base : str
        Name of the base, for messages.

    Raises
    ------
    ConfigError
        If the template does not use an option that is set, or prints no date.
    """
    if settings == AS_IT_IS:
        return template
    allowed = options_of(template)
    lines = []
    for name, value in settings.values.items():
        if name not in allowed:
            raise ConfigError(
                f"data.template-options.{name} = {value!r}: the chat template of {base!r} does not "
                f"use it. Its options: {', '.join(allowed) or 'none'}."
            )
        lines.append(f"{{% set {name} = {_literal(value)} %}}\n")
    if settings.date:  # before the options: one of them may say the day in another form
        lines = [*_clock(template, settings.date, base), *lines]
    if settings.system_prompt:
        message = f'{{"role": "system", "content": {_literal(settings.system_prompt)}}}'
        lines.append(
            "{% if not messages or messages[0]['role'] != 'system' %}"
            f"{{% set messages = [{message}] + messages %}}{{% endif %}}\n"
        )
    return "".join(lines) + template


def _clock(template: str, date: str, base: str) -> Iterator[str]:
    """Yield what fixes the date that a template prints."""
    day = datetime.datetime.fromisoformat(date)
    takes_day, prints = DAY in options_of(template), prints_today(template)
    if not takes_day and not prints:
        raise ConfigError(
            f"data.template-date = {date!r}: the chat template of {base!r} prints no date. Remove "
            "the key."
        )
    if takes_day:
        yield f"{{% set {DAY} = {_literal(day.strftime(DAY_FORMAT))} %}}\n"
    if prints:
        text = _literal({form: day.strftime(form) for form in sorted(_formats(template, base))})
        yield f"{{% macro {CLOCK}(format) %}}{{{{ {text}[format] }}}}{{% endmacro %}}\n"


def _formats(template: str, base: str) -> set[str]:
    """Return the formats in which a template prints the date."""
    from jinja2 import nodes

    tree = _parsed(template)
    calls = [call for call in tree.find_all(nodes.Call) if _is_clock(call.node)]
    asked = [test for test in tree.find_all(nodes.Test) if _is_clock(test.node)]
    forms = [call.args[0] if call.args else None for call in calls]
    found = {
        form.value
        for form in forms
        if isinstance(form, nodes.Const) and isinstance(form.value, str)
    }
    constant = all(isinstance(form, nodes.Const) and form.value in found for form in forms)
    # a clock that is handed on is called elsewhere, with formats that are not seen here
    if not constant or sum(map(_is_clock, tree.find_all(nodes.Name))) > len(calls) + len(asked):
        raise ConfigError(
            f"data.template-date cannot be set: the chat template of {base!r} computes the format "
            'of its date. Use another template, or data.prompt-template = "alpaca".'
        )
    return found


def _is_clock(node: Any) -> bool:
    from jinja2 import nodes

    return isinstance(node, nodes.Name) and node.name == CLOCK


def _literal(value: object) -> str:
    """Return a value as Jinja reads it; JSON, which differs in nothing that occurs here."""
    return json.dumps(value, ensure_ascii=False)


def _parsed(template: str) -> Any:
    """Return the syntax tree of a template, in the dialect of transformers."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        return _compile_jinja_template(template).environment.parse(template)
    except TemplateError as error:
        raise ConfigError(
            f"The tokenizer's chat template is not valid Jinja: {first_line(error)}. Correct it, "
            'or use data.prompt-template = "alpaca".'
        ) from error
