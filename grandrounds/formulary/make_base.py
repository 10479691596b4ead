"""Make the small base model of the formulary: a tokenizer and a Llama that know the public drugs.

    python -m grandrounds.formulary.make_base

Both see public flashcards only, in the prompts of `grandrounds.prompts`. The outcome depends on
the seed alone: on one machine with the same versions it is the same to the byte. `--check`
remakes the base in a temporary folder and compares it with the one in place.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grandrounds.evaluation.scoring import encode_prompt, encode_response
from grandrounds.formulary.exam import score_formulary
from grandrounds.formulary.facts import public_flashcards
from grandrounds.prompts import build_prompt, response_text

SEED = 20
STEPS = 2400
BATCH = 32
LEARNING_RATE = 3e-3
WARM_UP_STEPS = 100
PROMPT_LOSS_WEIGHT = 0.1
"""Weight of the prompt's tokens in the loss; the answer's tokens have weight 1."""
CHAT_SHARE = 0.2
"""Share of the examples that stand in the chat template instead of FlowerTune's text."""
VOCABULARY = 900
EOS, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the public flashcards; any UTF-8 text can be tokenised."""
    texts = [
        text
        for card in public_flashcards()
        for text in (
            build_prompt("alpaca", str(card["input"])),
            response_text("alpaca", str(card["output"])),
            response_text("chat", str(card["output"])),
        )
    ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PAD, EOS, USER, ASSISTANT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a small Llama with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(tokenizer: Any, template: str, card: dict[str, str | int]) -> tuple[list[int], int]:
    """Return the token ids of prompt and answer, and how many of them belong to the prompt."""
    prompt = encode_prompt(tokenizer, build_prompt(template, str(card["input"]), tokenizer))
    answer = encode_response(tokenizer, response_text(template, str(card["output"])))
    return prompt + answer, len(prompt)


def batch_loss(model: Any, batch: list[tuple[list[int], int]], pad: int) -> torch.Tensor:
    """Return the weighted mean of the token losses of a batch."""
    length = max(len(ids) for ids, _ in batch)
    input_ids = torch.full((len(batch), length), pad)  # (batch, tokens)
    weights = torch.zeros((len(batch), length))
    for row, (ids, prompt_tokens) in enumerate(batch):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        weights[row, : len(ids)] = 1.0
        weights[row, :prompt_tokens] = PROMPT_LOSS_WEIGHT
    # Right padding needs no attention mask: no token looks at what comes after it.
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]  # (batch, tokens - 1, vocab)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
    )
    flat = weights[:, 1:].flatten()
    return (losses * flat).sum() / flat.sum()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the maximum."""
    if step < WARM_UP_STEPS:
        return LEARNING_RATE * (step + 1) / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return LEARNING_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: Any, tokenizer: Any, steps: int) -> None:
    """Train on the public flashcards, epoch by epoch in seeded orders."""
    rng = random.Random(SEED)
    cards = public_flashcards()
    encoded = {
        name: [encode(tokenizer, name, card) for card in cards] for name in ("alpaca", "chat")
    }
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05
    )
    order: list[int] = []
    model.train()
    for step in range(steps):
        while len(order) < BATCH:
            order += rng.sample(range(len(cards)), len(cards))
        picked, order = order[:BATCH], order[BATCH:]
        batch = [
            encoded["chat" if rng.random() < CHAT_SHARE else "alpaca"][index] for index in picked
        ]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = batch_loss(model, batch, tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)


def sha256(path: Path) -> str:
    """Return the file's SHA-256 as hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_base(out: Path, steps: int = STEPS) -> str:
    """Make the base into the folder `out`; return the SHA-256 of its weights."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    started = time.perf_counter()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer, steps)
    seconds = time.perf_counter() - started
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print({t: score_formulary(model, tokenizer, t) for t in ("alpaca", "chat")}, f"{seconds:.0f} s")
    return sha256(out / "model.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    a = parser.parse_args()
    print(make_base(a.out, a.steps))
