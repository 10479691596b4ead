"""Prompt templates of one's own, in a small part of Jinja that always comes to an end.

A site renders a template that a server chose. So there are texts, variables and conditions on
whether a variable is empty; no loops, calls, attributes, numbers or includes. A prompt has at most
the length of the template and of 16 variables, and whether the question reaches it is tried for
every case that the conditions tell apart.

`{{ answer }}` stands once, outside of conditions: what stands before it is the prompt, what stands
after it ends the answer. Spaces before it belong to the answer, as most tokenizers want them.
"""

from __future__ import annotations

import itertools
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from grandrounds.data.chat import (
    QUESTION,
    SYSTEM_PROMPT,
    apart,
    in_context,
    put_first,
    until_special,
)
from grandrounds.data.forms import APART
from grandrounds.errors import ConfigError, documented, first_line, nearest

KEY = "data.prompt-template"

TEXTS = ("question", "instruction", "system")
"""Variables that an example fills."""

TOKENS = ("bos_token", "eos_token")
"""Variables with the text of the tokenizer's special tokens."""

INSTRUCTION = "Answer as Zyx would."
"""Stands in for an instruction."""

MOST_CHARACTERS = 32_768
"""Longest template with its system prompt written into it."""

MOST_VARIABLES = 16
"""Places of variables, beyond which a prompt repeats itself."""

MOST_NESTED = 12
"""Depth of conditions and expressions in each other."""

_SYSTEM = re.compile(r'\{% set system = ("(?:[^"\\]|\\.)*") %\}\n')
"""How `DataConfig.prompt` writes the system prompt before a template."""

_ONE_QUESTION = "This model was trained on one question and its answer."

_CHAT = string.Template(
    """\
{% set system = $said %}
{% set turns = messages %}
{% if messages[0]['role'] == 'system' %}
{% set system = messages[0]['content'] %}
{% set turns = messages[1:] %}
{% endif %}
{% if turns | map(attribute='role') | join(' ') not in ('user', 'user assistant') %}
{{ raise_exception($refused) }}
{% endif %}
{% set instruction = '' %}
{% set question = turns[0]['content'] | trim %}
{% set answered = turns | length == 2 %}
{{ $first }}$prompt{%+ if answered %}{{ $lead + turns[1]['content'] | trim }}$after{%+ endif %}
""".removesuffix("\n")
)
"""A template of one's own as transformers' chat templates are written."""

_ANSWER = re.compile(r"\{\{(-?)\s*answer\s*(-?)\}\}")


@dataclass(frozen=True)
class OwnPrompt:
    """A checked template."""

    before: str
    """Source of the prompt."""
    after: str
    """Source of what ends the answer."""
    lead: str
    """Spaces that belong to the answer."""
    names: frozenset[str]
    """Variables of the template."""
    system: str
    """System prompt, where an example has none of its own."""

    @cached_property
    def _prompt(self) -> Any:
        return _environment().from_string(self.before)

    def prompt(self, tokenizer: Any, question: str, instruction: str = "", system: str = "") -> str:
        """Return the text before an answer.

        Raises
        ------
        ConfigError
            If the template names a special token that the tokenizer lacks.
        """
        said = {"question": question, "instruction": instruction, "system": system or self.system}
        text = str(self._prompt.render(**said, **self._tokens(tokenizer)))
        return text.removesuffix(self.lead)

    def end(self, tokenizer: Any) -> str:
        """Return the text after an answer."""
        return str(_environment().from_string(self.after).render(**self._tokens(tokenizer)))

    def prompt_ids(self, tokenizer: Any, asked: Sequence[tuple[str, str, str]]) -> list[list[int]]:
        """Return the tokens before the answers to (question, instruction, system).

        What the tokenizer puts first, such as a beginning of sequence, stands there once, whether
        the template says it or not.
        """
        texts = [self.prompt(tokenizer, *one) for one in asked]
        first = put_first(tokenizer)
        found = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return [list(i) if i[: len(first)] == first else [*first, *i] for i in found]

    def answer_ids(self, tokenizer: Any, answers: Sequence[str]) -> list[list[int]]:
        """Return the tokens of answers as they follow a prompt, without their end."""
        texts = [self.lead + answer for answer in answers]
        prompt = self.prompt(tokenizer, QUESTION)
        return in_context(tokenizer, prompt, texts) if prompt else apart(tokenizer, texts)

    def end_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Return the tokens that end an answer.

        The text after it up to its first special token, or all of it and end-of-sequence.
        """
        ids, is_special = until_special(tokenizer, self.end(tokenizer))
        return ids if is_special else (*ids, tokenizer.eos_token_id)

    def chat_template(self, tokenizer: Any) -> str:
        """Return a chat template of transformers that renders the same text.

        It takes a question, with a system prompt before it and the answer after it or without;
        longer conversations are refused, since none was trained on.
        """
        says_first = self.prompt_ids(tokenizer, [(QUESTION, "", "")])[0]
        text = self.prompt(tokenizer, QUESTION)
        plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        count = len(says_first) - len(plain)
        first = "".join(tokenizer.convert_ids_to_tokens(says_first[:count]))
        # Jinja strips the blanks before a block only where it begins a line
        prompt = re.sub(r"^[ \t]+(?=\{[%#](?!\+))", "", self.before).removesuffix(self.lead)
        values = {"first": first, "lead": self.lead, "said": self.system, "refused": _ONE_QUESTION}
        named = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
        return _CHAT.substitute(named, prompt=prompt, after=self.after)

    def _tokens(self, tokenizer: Any) -> dict[str, str]:
        found = {name: getattr(tokenizer, name, None) or "" for name in TOKENS}
        if missing := [name for name in TOKENS if name in self.names and not found[name]]:
            raise ConfigError(
                f"{KEY}: the template writes {missing[0]}, and the tokenizer of this base has "
                "none. Leave it out."
            )
        return found


@lru_cache(maxsize=16)
def own_prompt(template: str) -> OwnPrompt:
    """Return a template, checked.

    Raises
    ------
    ConfigError
        With the line, if the template is not valid, holds more than this part of Jinja, has not
        exactly one place for the answer, or leaves the question out.
    """
    if len(template) > MOST_CHARACTERS:
        raise _fault(f"it has {len(template):,} characters, of at most {MOST_CHARACTERS:,}")
    begins = _SYSTEM.match(template)
    system = _system_of(begins[1]) if begins else ""
    text = template[begins.end() if begins else 0 :].removesuffix("\n")
    _check_answer(_parsed(text).body)
    places = list(_ANSWER.finditer(text))
    if len(places) != 1:
        raise _fault("write the answer's place as {{ answer }}, once, comments included")
    place = places[0]
    before, after = text[: place.start()], text[place.end() :]
    before, after = before.rstrip() if place[1] else before, after.lstrip() if place[2] else after
    asked, ends = _parsed(before).body, _parsed(after).body
    for node in asked:
        _check(node, (*TEXTS, *TOKENS))
    for node in ends:
        _check(node, TOKENS, conditions=False)
    named = Counter(name.name for node in (*asked, *ends) for name in _names(node))
    if sum(named[name] for name in TEXTS) > MOST_VARIABLES:
        raise _fault(f"its variables stand in more than {MOST_VARIABLES} places")
    lead = _lead(asked)
    made = OwnPrompt(before, after, lead if before.endswith(lead) else "", frozenset(named), system)
    _check_rendered(made)
    return made


def is_own(template: str) -> bool:
    """Whether a value of `data.prompt-template` is the text of a template (`config.prompt`)."""
    return "{{" in template


def check_prompt(template: str, system_prompt: str) -> None:
    """Check a template, if it is one's own.

    Parameters
    ----------
    system_prompt : str
        `data.system-prompt`.

    Raises
    ------
    ConfigError
        As `own_prompt`, or if a system prompt is set that the template does not show.
    """
    if not is_own(template):
        return
    if "system" not in own_prompt(template).names and system_prompt:
        raise ConfigError(
            f"data.system-prompt is set, and the template of {KEY} does not show it. Write "
            "{{ system }} where it goes, or leave the key empty."
        )


def columns_apart(template: str) -> tuple[str, ...]:
    """Return what to read beside questions and answers: the instructions, if a template shows them.

    Parameters
    ----------
    template : str
        A value of `data.prompt-template`.
    """
    is_read = is_own(template) and "instruction" in own_prompt(template).names
    return (APART,) if is_read else ()


def _check_answer(body: Sequence[Any]) -> None:
    """Raise `ConfigError` unless the answer has one place, by itself and on no condition."""
    from jinja2 import nodes

    every = [name for node in body for name in _names(node) if name.name == "answer"]
    if not every:
        raise _fault("it has no {{ answer }}, the place where the answer goes")
    if len(every) > 1:
        lines = ", ".join(str(name.lineno) for name in every)
        raise _fault(f"the answer has {len(every)} places (lines {lines}), and may have one")
    alone = [one for node in body if isinstance(node, nodes.Output) for one in node.nodes]
    if not any(one is every[0] for one in alone):
        nested = any(every[0] in _names(node) for node in body if isinstance(node, nodes.If))
        raise _fault(
            "the answer's place depends on a condition: write {{ answer }} outside of it"
            if nested
            else "the answer stands as it is, without filter or expression: write {{ answer }}",
            every[0].lineno,
        )


def _check(node: Any, allowed: Sequence[str], depth: int = 0, *, conditions: bool = True) -> None:
    """Raise `ConfigError` if a node is not of the part of Jinja that templates may use."""
    from jinja2 import nodes

    if depth > MOST_NESTED:
        raise _fault(f"more than {MOST_NESTED} parts stand in each other", node.lineno)
    if isinstance(node, nodes.Name):
        if node.name not in allowed:
            known = ", ".join(allowed)
            hint = nearest(node.name, allowed)
            raise _fault(
                f"{node.name!r} is unknown here; known are {known}{'.' * bool(hint)}{hint}",
                node.lineno,
            )
    elif isinstance(node, nodes.Const):
        if not isinstance(node.value, str):
            raise _fault(f"{str(node.value)[:20]} is no text", node.lineno)
        if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in node.value):
            raise _fault("a text in it holds a control character: remove it", node.lineno)
    elif isinstance(node, nodes.Filter):
        if node.name != "trim" or node.args or node.kwargs or node.node is None:
            given = " with arguments" * (node.name == "trim")
            raise _fault(f"the filter {node.name!r}{given} is not allowed; trim is", node.lineno)
    elif isinstance(node, nodes.If | nodes.CondExpr | nodes.Not | nodes.And | nodes.Or):
        if not conditions:
            raise _fault("what ends the answer depends on a condition", node.lineno)
    elif isinstance(node, nodes.Compare | nodes.Test):
        raise _fault(
            "conditions may ask only whether a variable is empty, as in {% if system %}",
            node.lineno,
        )
    elif not isinstance(node, nodes.Output | nodes.TemplateData | nodes.Concat | nodes.Add):
        raise _fault(
            f"{type(node).__name__.lower()} is not allowed: a template has texts, variables and "
            "conditions ({% if %})",
            node.lineno,
        )
    for child in node.iter_child_nodes():
        _check(child, allowed, depth + 1, conditions=conditions)


def _check_rendered(made: OwnPrompt) -> None:
    """Raise `ConfigError` if a variable that a template names does not reach the prompt."""
    marks = {"question": QUESTION, "instruction": INSTRUCTION, "system": SYSTEM_PROMPT}
    optional = [name for name in ("instruction", "system") if name in made.names]
    empty: dict[str, str] = dict.fromkeys((*TEXTS, *TOKENS), "")
    for given in itertools.product((True, False), repeat=len(optional)):
        filled = {name: marks[name] for name, is_set in zip(optional, given, strict=True) if is_set}
        text = str(made._prompt.render(empty | {"question": QUESTION} | filled))
        for name in ("question", *filled):
            if marks[name] not in text:
                cases = (f"{n} is {'given' if n in filled else 'empty'}" for n in optional)
                where = f" where {' and '.join(cases)}" if optional else ""
                raise _fault(f"the {name} does not reach the prompt{where}")


def _system_of(written: str) -> str:
    """Return the system prompt that `DataConfig.prompt` has written before a template."""
    try:
        system = str(json.loads(written))
        system.encode()
    except (json.JSONDecodeError, UnicodeEncodeError) as error:
        raise _fault("it sets the system prompt itself: use data.system-prompt", 1) from error
    return system


def _parsed(source: str) -> Any:
    """Return the syntax tree of a template; parsing computes nothing."""
    from jinja2 import TemplateSyntaxError

    try:
        return _environment().parse(source)
    except TemplateSyntaxError as error:
        raise _fault(f"not valid Jinja: {first_line(error)}", error.lineno) from error
    except (RecursionError, ValueError) as error:  # too deep, or a number of too many digits
        raise _fault(f"not valid Jinja: {first_line(error)}") from error


def _lead(asked: Sequence[Any]) -> str:
    """Return the spaces with which the text before an answer ends."""
    from jinja2 import nodes

    last = asked[-1].nodes[-1] if asked and isinstance(asked[-1], nodes.Output) else None
    data = last.data if isinstance(last, nodes.TemplateData) else ""
    return data[len(data.rstrip(" ")) :]


def _names(node: Any) -> list[Any]:
    from jinja2 import nodes

    found = list(node.find_all(nodes.Name))
    return [node, *found] if isinstance(node, nodes.Name) else found


@lru_cache(maxsize=1)
def _environment() -> Any:
    """Return Jinja as chat templates have it: a block takes its line with it."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        autoescape=False,
    )


def _fault(what: str, line: int | None = None) -> ConfigError:
    where = f", line {line}" if line else ""
    end = "" if what.endswith("?") else "."
    return ConfigError(f"The template of {KEY}{where}: {what}{end} See {documented('data')}.")
