"""Published chat templates: is what a run trains on what plain transformers renders?

    python benchmarks/chat_templates.py --templates FOLDER --out chat_templates.json

FOLDER has one template in each `*.jinja`, such as `models/templates` of llama.cpp, which its Python
package `llama-cpp-python` carries in its source distribution. For each template two small
tokenizers are made, one of bytes and one that writes blanks as SentencePiece does, with the special
tokens that the template renders. Compared are, for several answers:

    trained   the tokens of a tokenised example with those of the conversation that
              `apply_chat_template` renders, up to the special token that ends the answer. Where the
              conversation does not begin with the generation prompt: with those of generation
              prompt, answer and that end
    first     the first learned token with the token after the prompt
    date      the prompts of two days, with `data.template-date`
    options   prompts with each option by `data.template-options` and handed to the template, and
              the same for a system prompt
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from grandrounds.cli.screen import say
from grandrounds.data.chat import chat_format, rendered
from grandrounds.data.chat_settings import ChatSettings, options_of, prints_today
from grandrounds.data.examples import Example
from grandrounds.data.tokenization import tokenize_examples
from grandrounds.errors import ConfigError
from grandrounds.model.tokenizers import set_in

QUESTION = "What helps against fever?"
ANSWERS = ("Rest and tea.", "Rest. ", " Rest.", "1. Rest\n2. Tea", "Tea\n", "\ntea")
SYSTEM = 'You are "a nurse" {{ of }} the ward %}.'
DAYS = ("2031-01-02", "2032-12-30")
FIXED = "2024-02-29"

_TOKEN = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,30}\]")
_NO_SPECIAL = re.compile(r"</?(think|thinking|tool\w*|function\w*|reasoning|answer)>")


def byte_level() -> Tokenizer:
    """Return a tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def blank_first() -> Tokenizer:
    """Return a tokenizer of characters that puts a blank before every text."""
    letters = ["▁", "\n", *(chr(i) for i in range(33, 127))]
    vocabulary = {c: i for i, c in enumerate(["<unk>", *letters, "▁R", "▁t"])}
    merges = [("▁", "R"), ("▁", "t")]
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace()
    return inner


def tokenizer_for(inner: Tokenizer, template: str) -> Any:
    """Return a tokenizer with a chat template and the special tokens that it renders."""
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    rendered(made, [("user", QUESTION)], answering=True)  # tells of one that cannot
    text = plain(made, ANSWERS[0]) + plain(made)
    found = dict.fromkeys(_TOKEN.findall(text))
    made.add_tokens(
        [AddedToken(t, special=not _NO_SPECIAL.fullmatch(t), normalized=False) for t in found]
    )
    return made


def plain(tokenizer: Any, answer: str | None = None, system: str = "", **options: Any) -> str:
    """Return the prompt, or the conversation with its answer, as transformers renders it."""
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": QUESTION})
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    is_prompt = answer is None
    return str(
        tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=is_prompt, **options
        )
    )


def expected(tokenizer: Any, answer: str) -> tuple[list[int], int]:
    """Return the tokens to train on and those of the prompt, by the rendered text alone."""
    prompt, whole = plain(tokenizer), plain(tokenizer, answer)
    parts = (answer.strip(), answer.lstrip(), answer.rstrip(), answer)
    kept = next(part for part in parts if plain(tokenizer, part) == whole)
    after = whole.rindex(kept) + len(kept)
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    ends = re.search(
        "|".join(map(re.escape, sorted(special, key=len, reverse=True))), whole[after:]
    )
    end = whole[after : after + ends.end()] if ends else tokenizer.eos_token
    text = whole[:after] if whole.startswith(prompt) else prompt + kept
    ids = tokenizer(text + end, add_special_tokens=False)["input_ids"]
    return ids, len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def check(template: str) -> dict[str, Any]:
    """Return what was found for one template."""
    found: dict[str, Any] = {"trained": True, "first": True}
    for inner in (byte_level(), blank_first()):
        tokenizer = tokenizer_for(inner, template)
        form = chat_format(tokenizer)
        found["route"] = "as rendered" if form.is_prefix else "prompt, answer, end of turn"
        found["end"] = "".join(tokenizer.convert_ids_to_tokens(list(form.end)))
        found["trims"] = form.trims
        for answer in ANSWERS:
            ids, prompt = expected(tokenizer, answer)
            [ours] = tokenize_examples(
                [Example(QUESTION, answer)], tokenizer, "chat", 10**6
            ).examples
            if list(ours.input_ids) != ids:
                found["trained"] = False
                found.setdefault("differs", []).append(
                    (answer, tokenizer.decode(ours.input_ids[-30:]), tokenizer.decode(ids[-30:]))
                )
            if (ours.prompt_tokens, ours.input_ids[prompt]) != (prompt, ids[prompt]):
                found["first"] = False
    return {**found, **settings(tokenizer_for(byte_level(), template), template)}


def settings(tokenizer: Any, template: str) -> dict[str, Any]:
    """Return whether date, options and system prompt render as if they were handed over."""
    options = options_of(template)
    found: dict[str, Any] = {"options": options, "options-equal": True, "date": "none printed"}
    for name in options:
        for value in (True, False, "low"):
            if set_and_handed(template, tokenizer, {name: value}) not in (True, None):
                found["options-equal"] = False
    try:
        handed: str | None = plain(tokenizer, system=SYSTEM)
    except Exception:  # whatever a template raises that has no such role
        handed = None
    is_said = handed is not None and SYSTEM in handed
    try:
        own = configured(template, tokenizer, ChatSettings(system_prompt=SYSTEM))
        found["system"] = "equal" if is_said and own == handed else "differs"
    except ConfigError:
        found["system"] = "refused" if not is_said else "differs"
    if prints_today(template):
        with clock(DAYS[0]):
            first = plain(tokenizer)
            first_own = configured(template, tokenizer, ChatSettings(date=FIXED))
        with clock(DAYS[1]):
            second = plain(tokenizer)
            second_own = configured(template, tokenizer, ChatSettings(date=FIXED))
        with clock(FIXED):
            then = plain(tokenizer)
        is_fixed = first_own == second_own == then and first != second
        found["date"] = "equal" if is_fixed else "differs"
    return found


def set_and_handed(template: str, tokenizer: Any, options: dict[str, Any]) -> bool | None:
    """Whether options render the same both ways; None if the template refuses the value."""
    try:
        handed = plain(tokenizer, **options)
    except Exception:  # a string where it wants a list
        return None
    return configured(template, tokenizer, ChatSettings(options=json.dumps(options))) == handed


def configured(template: str, tokenizer: Any, chosen: ChatSettings) -> str:
    """Return the prompt with a run's settings written into the template."""
    tokenizer.chat_template = template
    set_in(tokenizer, chosen, "this template")
    try:
        return plain(tokenizer)
    finally:
        tokenizer.chat_template = template


@contextmanager
def clock(day: str) -> Iterator[None]:
    """Let transformers believe that it is another day."""
    with mock.patch.object(chat_template_utils, "datetime") as now:
        now.now.return_value = datetime.datetime.fromisoformat(day)
        yield


def main() -> None:
    """Check every template of a folder and print a row of a Markdown table for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--templates", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    say("| template | route | end of turn | trained tokens | date | options | system prompt |")
    say("|---|---|---|---|---|---|---|")
    results = {}
    for file in sorted(given.templates.glob("*.jinja")):
        try:
            found = check(file.read_text(encoding="utf-8"))
        except ConfigError as error:
            found = {"refused": str(error)}
        results[file.stem] = found
        say(row(file.stem, found))
    if given.out:
        given.out.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")


def row(name: str, found: dict[str, Any]) -> str:
    """Return the row of one template."""
    if "refused" in found:
        return f"| {name} | refused: {found['refused']} | | | | | |"
    trained = "equal" if found["trained"] and found["first"] else "differ"
    options = ("equal" if found["options-equal"] else "differ") if found["options"] else "none"
    end = found["end"].replace("|", "\\|").replace("\n", "\\n")
    return (
        f"| {name} | {found['route']} | `{end}` | {trained} | {found['date']} | {options} | "
        f"{found['system']} |"
    )


if __name__ == "__main__":
    main()
