"""The text before the answer: one for training and for evaluation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from grandrounds.data.prompts import TEMPLATES, build_prompt, prompt_hash, response_text
from grandrounds.errors import ConfigError


@pytest.fixture
def chatty() -> Any:
    """A tokenizer as far as a prompt needs one."""

    def apply_chat_template(turns: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"<{turn['role']}>{turn['content']}</>" for turn in turns) + "<assistant>"

    return SimpleNamespace(chat_template="...", apply_chat_template=apply_chat_template)


def test_alpaca_is_flowertunes_text_to_the_letter() -> None:
    assert build_prompt("alpaca", "What helps?") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n### Instruction:\nWhat helps?\n### Response:"
    )


def test_braces_in_a_question_stay_as_they_are() -> None:
    assert "{0} and {question}" in build_prompt("alpaca", "{0} and {question}")


def test_the_blank_before_an_answer_belongs_to_the_answer() -> None:
    assert not build_prompt("alpaca", "x").endswith(" ")
    assert response_text("alpaca", "Rest.") == " Rest."
    assert response_text("chat", "Rest.") == "Rest."


def test_chat_is_the_tokenizers_own_template(chatty: Any) -> None:
    assert build_prompt("chat", "What helps?", chatty) == "<user>What helps?</><assistant>"


def test_chat_without_a_chat_template_is_refused() -> None:
    with pytest.raises(ConfigError, match="this base lacks"):
        build_prompt("chat", "x", SimpleNamespace(chat_template=None))
    with pytest.raises(ConfigError, match="this base lacks"):
        build_prompt("chat", "x")


def test_an_unknown_template_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="'vicuna' is unknown; allowed: alpaca, chat, text"):
        build_prompt("vicuna", "x")


def test_the_hash_tells_templates_apart(tiny_base: Path) -> None:
    assert TEMPLATES == ("alpaca", "chat", "text")
    assert prompt_hash("alpaca") == prompt_hash("alpaca")
    assert len(prompt_hash("alpaca")) == 16
    hashes = {prompt_hash("alpaca")}
    for between in ("\n", "\n\n"):
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        tokenizer.chat_template = (
            f"{{% for m in messages %}}{{{{ m.content }}}}{between}{{% endfor %}}"
        )
        hashes.add(prompt_hash("chat", tokenizer))
    assert len(hashes) == 3


def test_a_template_that_leaves_answers_out_is_refused(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ConfigError, match="does not render the assistant's answer"):
        prompt_hash("chat", tokenizer)
