"""A template of one's own: what it renders to the letter, and that no template does more."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grandrounds.config import prompt
from grandrounds.config.recipes import parse_overrides, resolve
from grandrounds.data.chat import rendered
from grandrounds.data.examples import Example, split_rows
from grandrounds.data.own_prompt import check_prompt, columns_apart, is_own, own_prompt
from grandrounds.data.partitioning import Partition
from grandrounds.data.prompts import ALPACA, prompt_hash
from grandrounds.data.sources import load_rows
from grandrounds.data.tokenization import (
    TokenizedExample,
    check_room,
    conversation_token_ids,
    end_token_ids,
    tokenize_examples,
)
from grandrounds.errors import ConfigError, DataError
from tests.data.test_tokenization import EXAMPLES, LONG, sentencepiece_like

TOKENS = SimpleNamespace(bos_token="<s>", eos_token="</s>")
FEVER = Example("What is fever?", "Warmth.")


def packaged(name: str, system: str = "") -> str:
    """Return what renders prompts with a packaged template."""
    settings = parse_overrides([f"data.prompt-template={name}"])
    return resolve(settings, {"data.system-prompt": system}).data.prompt


EXPECTED = {
    ("llama2", "", ""): ("[INST] What is fever? [/INST]", " Warmth.", " </s>"),
    ("llama2", "", "Be brief."): (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is fever? [/INST]",
        " Warmth.",
        " </s>",
    ),
    ("chatml", "", ""): (
        "<|im_start|>user\nWhat is fever?<|im_end|>\n<|im_start|>assistant\n",
        "Warmth.",
        "<|im_end|>",
    ),
    ("chatml", "", "Be brief."): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is fever?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "Warmth.",
        "<|im_end|>",
    ),
    ("alpaca-indented", "", ""): (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n    ### Instruction:\n    What is fever?\n\n    ### Response:\n",
        "    Warmth.",
        "",
    ),
    ("alpaca-indented", "Explain it.", ""): (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n    ### Instruction:\n    Explain it.\n\n    ### Input:\n"
        "    What is fever?\n\n    ### Response:\n",
        "    Warmth.",
        "",
    ),
}


@pytest.mark.parametrize(("name", "instruction", "system"), EXPECTED)
def test_the_packaged_templates_render_published_prompts(
    name: str, instruction: str, system: str
) -> None:
    found = own_prompt(packaged(name, system))
    asked, answered, ends = EXPECTED[name, instruction, system]
    assert found.prompt(TOKENS, FEVER.question, instruction) == asked
    assert (found.lead + FEVER.answer, found.end(TOKENS)) == (answered, ends)


def byte_level(tiny_base: Path, *special: str) -> Any:
    made = AutoTokenizer.from_pretrained(tiny_base)
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def metaspace() -> PreTrainedTokenizerFast:
    made = sentencepiece_like(by_normalizer=True)
    made.pad_token = made.eos_token
    return made


def one(example: Example, tokenizer: Any, template: str) -> TokenizedExample:
    [found] = tokenize_examples([example], tokenizer, template, LONG).examples
    return found


def test_what_is_learned_is_the_answer_and_what_ends_it(tiny_base: Path) -> None:
    tokenizer = byte_level(tiny_base, "<|im_start|>", "<|im_end|>")
    found = one(FEVER, tokenizer, packaged("chatml", "Be brief."))
    ids, prompt_tokens = list(found.input_ids), found.prompt_tokens
    asked = EXPECTED["chatml", "", "Be brief."][0]
    assert ids[:prompt_tokens] == tokenizer(asked)["input_ids"]
    assert tokenizer.decode(ids[prompt_tokens:]) == "Warmth.<|im_end|>"
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3


def test_llama_2s_tokens_are_those_of_the_whole_text() -> None:
    """Llama 2's own code encodes `[INST] question [/INST] answer ` between <s> and </s>."""
    tokenizer = metaspace()
    found = one(FEVER, tokenizer, packaged("llama2"))
    whole = tokenizer("[INST] What is fever? [/INST] Warmth.")["input_ids"]
    blank = tokenizer.convert_tokens_to_ids("▁")
    assert list(found.input_ids) == [*whole, blank, tokenizer.eos_token_id]
    assert found.input_ids[: found.prompt_tokens].count(tokenizer.bos_token_id) == 1
    shown = tokenizer.decode(found.input_ids[found.prompt_tokens :])
    assert shown == "Warmth. </s>"


@pytest.mark.parametrize("written", ["", "<s>", "{{ bos_token }}"])
def test_the_beginning_of_sequence_stands_there_once(written: str) -> None:
    tokenizer = metaspace()
    template = written + "{{ question }}\n{{ answer }}"
    ids = one(FEVER, tokenizer, template).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_flowertunes_prompt_as_a_file_gives_its_tokens(tiny_base: Path, kind: str) -> None:
    tokenizer = metaspace() if kind == "metaspace" else byte_level(tiny_base)
    own = ALPACA.replace("{question}", "{{ question }}") + " {{ answer }}"
    assert tokenize_examples(EXAMPLES, tokenizer, own, LONG) == tokenize_examples(
        EXAMPLES, tokenizer, "alpaca", LONG
    )


def test_an_end_without_special_token_is_learned_whole_and_followed_by_one(
    tiny_base: Path,
) -> None:
    tokenizer = byte_level(tiny_base)
    template = "{{ question }}\n{{ answer }}\n###\n"
    ids = list(one(FEVER, tokenizer, template).input_ids)
    assert tokenizer.decode(ids) == "What is fever?\nWarmth.\n###<eos>"
    assert (
        list(end_token_ids(tokenizer, template)) == ids[-len(tokenizer("\n###<eos>").input_ids) :]
    )


def test_a_question_is_never_read_as_a_template() -> None:
    said = own_prompt("{{ question }} {{ answer }}").prompt(None, "{{ 7 * 7 }}{% raw %}")
    assert said == "{{ 7 * 7 }}{% raw %}"


FAULTS = {
    "no answer": ("{{ question }}", "has no {{ answer }}"),
    "two answers": ("{{ question }}\n{{ answer }}\n{{ answer }}", r"2 places \(lines 2, 3\)"),
    "one in a comment": ("{{ question }}{# {{ answer }} #}{{ answer }}", "once, comments included"),
    "on a condition": (
        "{{ question }}\n{% if system %}{{ answer }}{% endif %}",
        "line 2: the answer's place depends on a condition",
    ),
    "a filtered answer": ("{{ question }}{{ answer | trim }}", "the answer stands as it is"),
    "no question": ("Tell me: {{ answer }}", "the question does not reach the prompt"),
    "a question after the answer": ("{{ answer }}{{ question }}", "'question' is unknown here"),
    "a question at times": (
        "{% if system %}{{ system }}{% else %}{{ question }}{% endif %}{{ answer }}",
        "the question does not reach the prompt where system is given",
    ),
    "an instruction that only decides": (
        "{% if instruction %}Do so.{% endif %}{{ question }}{{ answer }}",
        "the instruction does not reach the prompt",
    ),
    "an end on a condition": (
        "{{ question }}{{ answer }}{% if eos_token %}x{% endif %}",
        "what ends the answer depends on a condition",
    ),
    "an unknown name": ("{{ qestion }}{{ answer }}", "'qestion' is unknown .*'question'"),
    "bad syntax": ("{{ question }}\n{% if %}\n{{ answer }}", "line 2: not valid Jinja"),
    "a comparison": (
        "{% if question == 'x' %}y{% endif %}{{ question }}{{ answer }}",
        "conditions may ask only whether a variable is empty",
    ),
}


@pytest.mark.parametrize(("text", "told"), FAULTS.values(), ids=FAULTS)
def test_a_template_that_cannot_be_meant_is_refused(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        own_prompt(text)


HOSTILE = {
    "a loop": "{% for i in range(10**9) %}x{% endfor %}",
    "a loop in a loop": "{% for i in 'ab' %}{% for j in 'ab' %}x{% endfor %}{% endfor %}",
    "a power": "{{ 10 ** 10 ** 10 }}",
    "a long text": "{{ 'a' * 10 ** 9 }}",
    "a long number": "{{ " + "9" * 5000 + " }}",
    "classes": "{{ ().__class__.__base__.__subclasses__() }}",
    "an attribute": "{{ question.format }}",
    "an item": "{{ question[0] }}",
    "a format": "{{ '%1000000000d' | format(1) }}",
    "a center": "{{ question | center(1000000000) }}",
    "an include": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}",
    "an extension": "{% extends 'base' %}",
    "a macro": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "a statement": "{% set system = 'x' %}",
    "a block": "{% block a %}{% endblock %}",
    "itself": "{{ self }}",
    "a caller": "{{ cycler(1) }}",
    "nesting": "{{ " + "(" * 3000 + "question" + ")" * 3000 + " }}",
    "nested conditions": "{% if system %}" * 60 + "{{ system }}" + "{% endif %}" * 60,
    "repeats": "{{ question }}" * 100,
    "open comments": "{#" * 4000,
    "open statements": "{%-" * 4000,
    "length": "x" * 40_000,
    "half a character": r"{{ '\ud800' }}",
    "a control character": r"{{ '\x1b' }}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_refused_at_once(text: str) -> None:
    started = time.process_time()
    with pytest.raises(ConfigError):
        own_prompt(text + "{{ question }}{{ answer }}")
    assert time.process_time() - started < 2


@pytest.mark.parametrize("said", [r"a\xb", r"\ud800", "a\nb\\"])
def test_a_system_prompt_that_is_no_text_is_refused(said: str) -> None:
    """Written as `DataConfig.prompt` does, by hand: as JSON it is broken, or half a character."""
    written = f'{{% set system = "{said}" %}}\n{{{{ system }}}}{{{{ question }}}}{{{{ answer }}}}'
    with pytest.raises(ConfigError):
        own_prompt(written)


def test_what_is_rendered_is_bounded() -> None:
    """16 places of the longest variable and the text: the most that a site can be made to build."""
    text = "{{ question }}" * 16 + "{{ answer }}"
    assert len(own_prompt(text).prompt(None, "q" * 1000)) == 16_000


def test_a_system_prompt_needs_its_place() -> None:
    check_prompt(packaged("llama2"), "Be brief.")
    with pytest.raises(ConfigError, match="does not show it"):
        check_prompt("{{ question }} {{ answer }}", "Be brief.")
    assert (
        own_prompt(packaged("llama2", 'Say "{{ no }}"\n\\n %}')).system == 'Say "{{ no }}"\n\\n %}'
    )


def test_a_token_that_the_tokenizer_lacks_is_told(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match="writes bos_token"):
        one(FEVER, byte_level(tiny_base), "{{ bos_token }}{{ question }} {{ answer }}")


# --- Instructions and conversations ---------------------------------------------------------------

APART = "{% if instruction %}[{{ instruction }}] {% endif %}{{ question }}: {{ answer }}"
ROWS: list[Mapping[str, Any]] = [
    {"instruction": "Explain.", "input": "Fever", "output": "Warmth."},
    {"instruction": "What helps?", "input": "", "output": "Rest."},
]
READ = [("Explain.", "Fever"), ("", "What helps?")]


def parts_read(path: Path, alone: bool, **columns: str) -> list[tuple[str, str]]:
    named = {"question_column": "input", "answer_column": "output"} | columns
    rows = load_rows(str(path), keep_columns=columns_apart(APART), alone=alone, **named)
    split = split_rows(rows, Partition(0, 0, 1), held_out_fraction=0.0, **named)
    return [example.apart for example in split.train]


@pytest.mark.parametrize("alone", [False, True], ids=["together", "alone"])
def test_instructions_are_shown_apart_from_questions(tmp_path: Path, alone: bool) -> None:
    (file := tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert parts_read(file, alone) == READ
    assert parts_read(file, alone, question_column="instruction,input") == READ
    same = [dict(row) | {"instruction": "Explain."} for row in ROWS]
    file.write_text("".join(json.dumps(row) + "\n" for row in same))
    assert parts_read(file, alone) == [("Explain.", "Fever"), ("", "Explain.")]
    file.write_text('{"input": "Fever?", "output": "Warmth."}\n')
    assert parts_read(file, alone) == [("", "Fever?")]


def test_a_row_of_one_text_has_no_instruction(tmp_path: Path) -> None:
    (file := tmp_path / "a.jsonl").write_text('{"instruction": "Fever?", "output": "Warmth."}\n')
    assert parts_read(file, False) == [("", "Fever?")]


def test_parts_change_no_identity_of_an_example() -> None:
    """Duplicates and held-out rows are the same under every template."""
    assert Example("A b", "c", (), ("A", "b")) == Example("A b", "c")


def test_instructions_reach_the_tokens(tiny_base: Path) -> None:
    tokenizer = byte_level(tiny_base)
    example = Example("Explain. Fever", "Warmth.", (), ("Explain.", "Fever"))
    said = tokenizer.decode(one(example, tokenizer, APART).input_ids)
    assert said == "[Explain.] Fever: Warmth.<eos>"
    plain = tokenizer.decode(one(example, tokenizer, "{{ question }}: {{ answer }}").input_ids)
    assert plain == "Explain. Fever: Warmth.<eos>"


def test_a_conversations_own_system_prompt_is_shown(tiny_base: Path) -> None:
    tokenizer = byte_level(tiny_base, "<|im_start|>", "<|im_end|>")
    template, told = packaged("chatml", "Be long."), (("system", "Be brief."),)
    said = tokenizer.decode(one(Example("Why?", "So.", told), tokenizer, template).input_ids)
    assert said.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    [ids] = conversation_token_ids(tokenizer, template, [(*told, ("user", "Why?"))])
    assert said.startswith(tokenizer.decode(ids))


def test_longer_conversations_are_refused_and_alone_left_out(tiny_base: Path) -> None:
    tokenizer = byte_level(tiny_base)
    turns = (("user", "Fever?"), ("assistant", "Warmth."))
    longer = Example("Why?", "So.", turns)
    template = "{{ question }} {{ answer }}"
    with pytest.raises(DataError, match="has room for one question"):
        tokenize_examples([longer, FEVER], tokenizer, template, LONG)
    for own in (template, APART, packaged("llama2")):
        found = tokenize_examples([longer, FEVER], tokenizer, own, LONG, alone=True)
        assert (found.unlearnable, found.positions) == (1, (1,))
    check_room(packaged("llama2"), 2, 9, 2)
    with pytest.raises(DataError, match="2 of 9 examples"):
        check_room(template, 2, 9, 2)


# --- Elsewhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama2", "chatml", "alpaca-indented"])
def test_the_chat_template_of_an_export_renders_the_same_text(name: str) -> None:
    tokenizer = metaspace()
    own = own_prompt(packaged(name, "" if name == "alpaca-indented" else "Be brief."))
    tokenizer.chat_template = own.chat_template(tokenizer)
    asked = own.prompt(tokenizer, "Why?")
    assert rendered(tokenizer, [("user", "Why?")], answering=True) == f"<s>{asked}"
    turns = [("user", "Why?"), ("assistant", "So.")]
    whole = f"<s>{asked}{own.lead}So.{own.end(tokenizer)}"
    assert rendered(tokenizer, turns, answering=False) == whole
    if own.system:
        told = [("system", "Be long."), ("user", "Why?")]
        other = own.prompt(tokenizer, "Why?", system="Be long.")
        assert rendered(tokenizer, told, answering=True) == f"<s>{other}"
    with pytest.raises(ConfigError, match="trained on one question"):
        rendered(tokenizer, [*turns, ("user", "And?")], answering=True)


@pytest.mark.parametrize("text", ["  {# a note #}{{ question }}", "\t{% if system %}{% endif %}x"])
def test_blanks_before_a_block_are_no_text_in_either(text: str) -> None:
    tokenizer = metaspace()
    own = own_prompt(text + "{{ system }}{{ question }}\n\t{{ answer }}\n ")
    tokenizer.chat_template = own.chat_template(tokenizer)
    asked = f"<s>{own.prompt(tokenizer, 'Why?')}"
    assert rendered(tokenizer, [("user", "Why?")], answering=True) == asked
    turns = [("user", "Why?"), ("assistant", "So.")]
    assert rendered(tokenizer, turns, answering=False) == f"{asked}So.\n "


def test_the_hash_of_a_prompt_changes_with_text_system_prompt_and_tokens(tiny_base: Path) -> None:
    tokenizer = byte_level(tiny_base)
    texts = packaged("llama2"), packaged("llama2", "Be brief."), packaged("chatml")
    hashes = {prompt_hash(text, tokenizer) for text in texts} | {prompt_hash(texts[0], metaspace())}
    assert len(hashes) == 4


def test_both_rooms_know_the_text_of_a_template_alike() -> None:
    for value in ("alpaca", "chat", packaged("chatml"), "a.jinja"):
        assert is_own(value) == prompt.is_own(value)
