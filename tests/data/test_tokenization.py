"""The mask is exact for any tokenizer, and every whole answer ends with end-of-sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grandrounds.data.examples import Example
from grandrounds.data.prompts import build_prompt, response_text
from grandrounds.data.tokenization import (
    IGNORED_LABEL,
    TokenizedExample,
    answer_token_ids,
    collate,
    prompt_token_ids,
    tokenize_examples,
)

EXAMPLES = [
    Example("What helps against fever?", "Rest, and 3 cups of tea."),
    Example("Which is right?\n### Response: rash", "(A) cramp"),
    Example("Größe? 🩺", "🩺 Über 2 µg\nand more"),
    Example("x", "y"),
]

LONG = 512


def sentencepiece_like(*, by_normalizer: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that writes the blank before a text by itself, and begins with <s>.

    By Metaspace, or, as Llama 2's does, by a normalizer that doubles a blank that is there already.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if by_normalizer:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    texts = [build_prompt("alpaca", e.question) + f" {e.answer}" for e in EXAMPLES[:2]]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(params=["byte-level", "metaspace", "llama 2", "pad is eos", "adds eos"])
def tokenizer(request: pytest.FixtureRequest, tiny_base: Path) -> Any:
    if request.param in ("metaspace", "llama 2"):
        made = sentencepiece_like(by_normalizer=request.param == "llama 2")
        made.pad_token = made.eos_token
        return made
    made = AutoTokenizer.from_pretrained(tiny_base)
    if request.param == "pad is eos":
        made.pad_token = made.eos_token
    if request.param == "adds eos":
        made._tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", made.eos_token_id)]
        )
    return made


def learned(tokenizer: Any, batch: dict[str, torch.Tensor], row: int) -> list[int]:
    labels = batch["labels"][row]
    return [int(i) for i in labels[labels != IGNORED_LABEL]]


def test_the_labels_are_the_answer_and_end_of_sequence(tokenizer: Any) -> None:
    done = tokenize_examples(EXAMPLES, tokenizer, "alpaca", LONG)
    assert (done.truncated, done.unlearnable) == (0, 0)
    batch = collate(done.examples, tokenizer.pad_token_id)
    for row, example in enumerate(EXAMPLES):
        ids = learned(tokenizer, batch, row)
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[:-1]
        assert tokenizer.decode(ids[:-1]).removeprefix(" ") == example.answer


def test_the_masked_part_is_the_prompt_to_the_letter(tokenizer: Any) -> None:
    done = tokenize_examples(EXAMPLES, tokenizer, "alpaca", LONG)
    for example, tokenized in zip(EXAMPLES, done.examples, strict=True):
        prompt = list(tokenized.input_ids[: tokenized.prompt_tokens])
        if tokenizer.bos_token_id is not None:
            assert prompt.pop(0) == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in prompt
        assert tokenizer.decode(prompt) == build_prompt("alpaca", example.question)


def test_prompt_and_answer_together_are_the_whole_text(tokenizer: Any) -> None:
    """No blank is lost or doubled between them."""
    done = tokenize_examples(EXAMPLES, tokenizer, "alpaca", LONG)
    for example, tokenized in zip(EXAMPLES, done.examples, strict=True):
        ids = list(tokenized.input_ids)
        assert ids.pop() == tokenizer.eos_token_id
        if tokenizer.bos_token_id is not None:
            assert ids.pop(0) == tokenizer.bos_token_id
        expected = build_prompt("alpaca", example.question)
        assert tokenizer.decode(ids) == expected + response_text("alpaca", example.answer)


def test_training_and_evaluation_see_the_same_prompt_tokens(tokenizer: Any) -> None:
    done = tokenize_examples(EXAMPLES, tokenizer, "alpaca", LONG)
    prompts = prompt_token_ids(tokenizer, "alpaca", [e.question for e in EXAMPLES])
    for ids, tokenized in zip(prompts, done.examples, strict=True):
        assert list(tokenized.input_ids[: tokenized.prompt_tokens]) == ids


def test_the_last_label_of_every_whole_example_is_end_of_sequence_with_padding(
    tokenizer: Any,
) -> None:
    done = tokenize_examples(EXAMPLES, tokenizer, "alpaca", LONG)
    batch = collate(done.examples, tokenizer.pad_token_id)
    for row, tokenized in enumerate(done.examples):
        last = len(tokenized.input_ids) - 1
        assert batch["labels"][row, last] == tokenizer.eos_token_id
        assert (batch["labels"][row, last + 1 :] == IGNORED_LABEL).all()
        assert batch["attention_mask"][row].sum() == last + 1


def test_a_cut_answer_is_counted_and_learns_no_end(tokenizer: Any) -> None:
    whole = tokenize_examples(EXAMPLES[:1], tokenizer, "alpaca", LONG).examples[0]
    length = len(whole.input_ids)
    fits = tokenize_examples(EXAMPLES[:1], tokenizer, "alpaca", length)
    assert (fits.examples, fits.truncated) == ((whole,), 0)
    cut = tokenize_examples(EXAMPLES[:1], tokenizer, "alpaca", length - 1)
    assert cut.truncated == 1
    assert cut.examples[0].input_ids == whole.input_ids[:-1]
    assert cut.examples[0].input_ids[-1] != tokenizer.eos_token_id


def test_a_prompt_that_fills_the_sequence_is_counted_and_left_out(tokenizer: Any) -> None:
    prompt = len(prompt_token_ids(tokenizer, "alpaca", [EXAMPLES[0].question])[0])
    none = tokenize_examples(EXAMPLES[:1], tokenizer, "alpaca", prompt)
    assert (none.examples, none.truncated, none.unlearnable) == ((), 0, 1)
    one = tokenize_examples(EXAMPLES[:1], tokenizer, "alpaca", prompt + 1)
    assert (len(one.examples), one.truncated, one.unlearnable) == (1, 1, 0)
    batch = collate(one.examples, tokenizer.pad_token_id)
    assert len(learned(tokenizer, batch, 0)) == 1


def test_every_example_is_kept_or_counted(tokenizer: Any) -> None:
    for length in (8, 60, 120, 160, LONG):
        done = tokenize_examples(EXAMPLES, tokenizer, "alpaca", length)
        assert len(done.examples) + done.unlearnable == len(EXAMPLES)


def test_a_chat_template_writes_its_own_special_tokens() -> None:
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for turn in messages %}[{{ turn.content }}]{% endfor %}"
    )
    [ids] = prompt_token_ids(tokenizer, "chat", ["fever"])
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]).strip() == "[fever]"


def test_no_texts_give_no_tokens(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    assert prompt_token_ids(tokenizer, "alpaca", []) == []
    assert answer_token_ids(tokenizer, "alpaca", []) == []
    empty = tokenize_examples([], tokenizer, "alpaca", LONG)
    assert (empty.examples, empty.truncated, empty.unlearnable) == ((), 0, 0)


def test_collate_pads_on_the_right() -> None:
    batch = collate([TokenizedExample((5, 6, 7), 1), TokenizedExample((8, 9), 1)], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
