"""The trained text is what the chat template renders, up to its own end of turn."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grandrounds.data.chat import chat_format, rendered
from grandrounds.data.examples import Example
from grandrounds.data.prompts import prompt_hash
from grandrounds.data.tokenization import (
    IGNORED_LABEL,
    collate,
    end_token_ids,
    flatten,
    tokenize_examples,
)
from grandrounds.errors import ConfigError, DataError

LOOP = "{% for m in messages %}"
END = "{% endfor %}"
ASKED = "{% if add_generation_prompt %}"

FAMILIES: dict[str, tuple[str, str, str]] = {
    "chatml": (
        LOOP
        + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        + END
        + ASKED
        + "<|im_start|>assistant\n{% endif %}",
        "<|im_start|> <|im_end|>",
        "<|im_end|>",
    ),
    "llama 2": (
        "<s>" + LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} "
        "{{ m.content.strip() }} </s>{% endif %}" + END,
        "<s> </s>",
        " </s>",
    ),
    "llama 3": (
        "<s>"
        + LOOP
        + "<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>"
        + END
        + ASKED
        + "<|start|>assistant<|end|>\n\n{% endif %}",
        "<s> <|start|> <|end|> <|eot|>",
        "<|eot|>",
    ),
    "mistral": (
        "<s>" + LOOP + "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}"
        "{{ m.content }}</s>{% endif %}" + END,
        "<s> </s> [INST] [/INST]",
        "</s>",
    ),
    "gemma": (
        "<bos>" + LOOP + "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n" + END + ASKED + "<turn>model\n{% endif %}",
        "<bos> <turn> <end_of_turn>",
        "<end_of_turn>",
    ),
    "phi 3": (
        LOOP
        + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
        + END
        + ASKED
        + "<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|user|> <|assistant|> <|end|>",
        "<|end|>",
    ),
    "zephyr": (
        LOOP
        + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n"
        + END
        + ASKED
        + "<|assistant|>\n{% endif %}",
        "",
        "<eos>",
    ),
    "vicuna": (
        LOOP
        + "{{ m.role | upper }}: {{ m.content }}{{ ' ' if m.role == 'user' else eos_token }}"
        + END
        + ASKED
        + "ASSISTANT:{% endif %}",
        "",
        "<eos>",
    ),
    "no end of its own": (
        LOOP
        + "### {{ m.role }}:\n{{ m.content }}\n\n"
        + END
        + ASKED
        + "### assistant:\n{% endif %}",
        "",
        "<eos>",
    ),
    "command": (
        "<bos>"
        + LOOP
        + "<|T|><|{{ m.role }}|>{{ m.content }}<|/T|>"
        + END
        + ASKED
        + "<|T|><|assistant|>{% endif %}",
        "<bos> <|T|> <|/T|> <|user|> <|assistant|>",
        "<|/T|>",
    ),
    "deepseek": (
        "<s>" + LOOP + "{% if m.role == 'user' %}<U>{{ m.content }}{% else %}<A>{{ m.content }}"
        "{{ eos_token }}{% endif %}" + END + ASKED + "<A>{% endif %}",
        "<s> <U> <A>",
        "<eos>",
    ),
    "trims before alone": (
        LOOP
        + "<|{{ m.role }}|>{{ m.content.lstrip() }}<|end|>\n"
        + END
        + ASKED
        + "<|assistant|>{% endif %}",
        "<|user|> <|assistant|> <|end|>",
        "<|end|>",
    ),
    "thinking, empty in the past": (
        LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m.content }}<|im_end|>\n"
        + END
        + ASKED
        + "<|im_start|>assistant\n{% endif %}",
        "<|im_start|> <|im_end|> <think> </think>",
        "<|im_end|>",
    ),
    "thinking, left out of the past": (
        LOOP
        + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        + END
        + ASKED
        + "<|im_start|>assistant\n<think>\n{% endif %}",
        "<|im_start|> <|im_end|> <think> </think>",
        "<|im_end|>",
    ),
}
"""Family → template after its kind, its special tokens, and the text that ends an answer."""


@pytest.fixture(scope="module")
def blank_first(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A tokenizer that writes blanks as ▁ and puts one before every text, as SentencePiece does."""
    letters = [chr(i) for i in range(33, 127)]
    vocabulary = {
        token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", "▁", "\n", *letters])
    }
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def byte_level(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


def with_template(tokenizer: Any, family: str) -> Any:
    template, special, _ = FAMILIES[family]
    own = copy.deepcopy(tokenizer)
    tokens = [AddedToken(t, special=True, normalized=False) for t in special.split()]
    own.add_special_tokens({"additional_special_tokens": tokens})
    own.chat_template = template
    return own


@pytest.mark.parametrize("kind", ["byte_level", "blank_first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_trained_tokens_are_those_of_the_rendered_conversation(
    request: pytest.FixtureRequest, kind: str, family: str
) -> None:
    tokenizer = with_template(request.getfixturevalue(kind), family)
    question, answer = "What helps against fever?", "Rest and tea."
    [example] = tokenize_examples([Example(question, answer)], tokenizer, "chat", 500).examples
    turns = [("user", question)]
    prompt = rendered(tokenizer, turns, answering=True)
    whole = rendered(tokenizer, [*turns, ("assistant", answer)], answering=False)
    end = FAMILIES[family][2]
    if family == "thinking, left out of the past":
        assert not chat_format(tokenizer).is_prefix
        expected = f"{prompt}{answer}{end}"
    elif family == "no end of its own":
        expected = f"{prompt}{answer}{end}"
    else:
        assert whole.startswith(prompt)
        expected = whole[: whole.rindex(answer) + len(answer)] + end
    ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert list(example.input_ids) == ids
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert list(example.input_ids[: example.prompt_tokens]) == prompt_ids
    special = end.strip()
    assert end_token_ids(tokenizer, "chat")[-1] == tokenizer.convert_tokens_to_ids(special)


def test_a_template_that_trims_answers_trims_the_trained_ones(byte_level: Any) -> None:
    for family, before, after in (
        ("gemma", True, True),
        ("chatml", False, False),
        ("trims before alone", True, False),
    ):
        tokenizer = with_template(byte_level, family)
        bare, *blank = [
            tokenize_examples([Example("Why?", answer)], tokenizer, "chat", 500).examples[0]
            for answer in ("Rest.", "\nRest.", "Rest. ")
        ]
        assert [one == bare for one in blank] == [before, after]


KEEPS_REASONING = (
    LOOP + "<|im_start|>{{ m.role }}\n{% set c = m.content %}{% if m.role == 'assistant' %}"
    "{% set parts = c.split('</think>') %}{% set r = '' %}{% if parts | length > 1 %}"
    "{% set r = parts[0].split('<think>')[-1].strip('\n') %}{% endif %}"
    "<think>\n{{ r }}\n</think>\n\n{% set c = parts[-1].lstrip('\n') %}{% endif %}"
    "{{ c }}<|im_end|>\n" + END + ASKED + "<|im_start|>assistant\n"
    "{% if no_thoughts is defined %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""A template that takes an answer's reasoning out and renders it in a block of its own."""


def test_answers_with_reasoning_are_trained_as_they_are_rendered(byte_level: Any) -> None:
    """A constant put an empty thinking block before the answer's own."""
    answer = "<think>\nFever, so rest.\n</think>\n\nRest."
    tokenizer = with_template(byte_level, "thinking, empty in the past")
    tokenizer.chat_template = KEEPS_REASONING
    examples = [Example("Why?", answer), Example("Why?", "Rest.")]
    for example, one in zip(
        examples, tokenize_examples(examples, tokenizer, "chat", 500).examples, strict=True
    ):
        turns = [("user", "Why?"), ("assistant", example.answer)]
        whole = rendered(tokenizer, turns, answering=False).rstrip()
        assert list(one.input_ids) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% set no_thoughts = true %}" + KEEPS_REASONING
    assert tokenize_examples(examples[1:], tokenizer, "chat", 500).examples
    with pytest.raises(ConfigError, match="not rendered after the generation prompt"):
        tokenize_examples(examples, tokenizer, "chat", 500)


def test_answers_that_a_template_shortens_are_counted(byte_level: Any) -> None:
    tokenizer = with_template(byte_level, "chatml")
    last = "m.content.split('</think>')[-1]"
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", last)
    examples = [Example("Why?", answer) for answer in ("<think>Fever.</think>Rest.", " Rest.\n")]
    found = tokenize_examples(examples, tokenizer, "chat", 500)
    assert found.shortened == 1
    assert tokenizer.decode(found.examples[0].input_ids).endswith("assistant\nRest.<|im_end|>")
    plain = with_template(byte_level, "chatml")
    assert tokenize_examples(examples, plain, "chat", 500).shortened == 0


@pytest.mark.parametrize("begin", ["<think>\n", "<think>", "\n<think>\n"])
def test_reasoning_is_opened_once(byte_level: Any, begin: str) -> None:
    """The prompt opens it, and so did the answer."""
    tokenizer = with_template(byte_level, "thinking, left out of the past")
    answers = [f"{begin}Fever.</think>Rest.", "Fever.</think>Rest."]
    both = [Example("Why?", answer) for answer in answers]
    one, other = tokenize_examples(both, tokenizer, "chat", 500).examples
    assert one == other


@pytest.mark.parametrize("wrong", ["{{ 1 // 0 }}", "{{ [] + '' }}", "{{ '%d' % 'a' }}"])
def test_a_template_that_fails_is_named(byte_level: Any, wrong: str) -> None:
    tokenizer = with_template(byte_level, "chatml")
    tokenizer.chat_template = wrong + FAMILIES["chatml"][0]
    with pytest.raises(ConfigError, match="chat template cannot render a conversation of user"):
        rendered(tokenizer, [("user", "Why?")], answering=True)


def test_the_prompts_hash_knows_the_end_of_turn_only_where_it_is_another(byte_level: Any) -> None:
    """A template that ends with end-of-sequence keeps the hash that it had."""
    hashes = {}
    for family in ("zephyr", "phi 3"):
        hashes[family] = prompt_hash("chat", with_template(byte_level, family))
    changed = with_template(byte_level, "phi 3")
    changed.chat_template = changed.chat_template.replace("<|end|>\n", "<|assistant|>\n")
    assert prompt_hash("chat", changed) != hashes["phi 3"]


PLAIN = Example("Why?", "Rest.")
CONVERSATION = Example(
    "And in a newborn?",
    "About 110 to 160.",
    (("user", "What is a normal heart rate?"), ("assistant", "60 to 100 in adults.")),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_answers_of_a_conversation_are_learned_with_their_ends(
    byte_level: Any, family: str
) -> None:
    tokenizer = with_template(byte_level, family)
    end = FAMILIES[family][2]
    found = tokenize_examples([CONVERSATION], tokenizer, "chat", 500)
    [example] = found.examples
    turns = [*CONVERSATION.before, ("user", CONVERSATION.question)]
    prompt = rendered(tokenizer, turns, answering=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert list(example.input_ids[: example.prompt_tokens]) == ids
    learned = [example.input_ids[start:stop] for start, stop in example.earlier]
    if family in ("thinking, left out of the past", "no end of its own"):
        assert (learned, found.unlearned) == ([], 1)  # rendered differently once it goes on
    else:
        [earlier] = [tokenizer.decode(list(ids)) for ids in learned]
        assert earlier.endswith(f"60 to 100 in adults.{end}")
        assert "heart rate" not in earlier
        assert found.unlearned == 0
    [last] = tokenize_examples([CONVERSATION], tokenizer, "chat", 500, "last").examples
    assert (last.input_ids, last.earlier) == (example.input_ids, ())


def test_learned_tokens_are_the_labels_in_both_kinds_of_batches(byte_level: Any) -> None:
    tokenizer = with_template(byte_level, "chatml")
    asked = [CONVERSATION, PLAIN, CONVERSATION]
    examples = tokenize_examples(asked, tokenizer, "chat", 500).examples
    padded, flat = collate(examples, 0)["labels"], flatten(examples)["labels"].flatten()
    kept = padded[padded != IGNORED_LABEL].tolist()
    assert kept == flat[flat != IGNORED_LABEL].tolist()
    assert len(kept) == sum(example.answer_tokens for example in examples)
    texts = "60 to 100 in adults.<|im_end|>About 110 to 160.<|im_end|>"
    assert tokenizer.decode(kept) == f"{texts}Rest.<|im_end|>{texts}"


def test_of_a_conversation_with_two_answers_only_these_are_told_apart(byte_level: Any) -> None:
    """Both follow all turns before; an earlier answer is in the prompt and not learned."""
    tokenizer = with_template(byte_level, "chatml")
    preferred = dataclasses.replace(CONVERSATION, rejected="No idea.")
    [pair] = tokenize_examples([preferred], tokenizer, "chat", 500).examples
    assert pair.earlier == ()
    for answer, said in zip(pair.answers, (CONVERSATION.answer, "No idea."), strict=True):
        learned = answer.input_ids[answer.prompt_tokens :]
        assert tokenizer.decode(learned) == f"{said}<|im_end|>"
        assert "60 to 100" in tokenizer.decode(answer.input_ids[: answer.prompt_tokens])


def test_a_long_conversation_is_cut_after_an_answer_that_it_still_teaches(byte_level: Any) -> None:
    tokenizer = with_template(byte_level, "chatml")
    [whole] = tokenize_examples([CONVERSATION], tokenizer, "chat", 500).examples
    most = whole.earlier[0][1] + 2
    cut = tokenize_examples([CONVERSATION], tokenizer, "chat", most)
    assert (cut.truncated, cut.unlearnable) == (1, 0)
    assert cut.examples[0].input_ids == whole.input_ids[:most]
    assert cut.examples[0].answer_tokens == whole.earlier[0][1] - whole.earlier[0][0]
    assert tokenize_examples([CONVERSATION], tokenizer, "chat", most, "last").unlearnable == 1


def test_a_prompt_for_one_question_has_no_room_for_a_conversation(byte_level: Any) -> None:
    with pytest.raises(DataError, match="1 of 2 examples are conversations of"):
        tokenize_examples([CONVERSATION, PLAIN], byte_level, "alpaca", 500)
