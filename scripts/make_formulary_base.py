"""Train the small base model of the formulary: a tokenizer and a Llama that know the public drugs.

    python scripts/make_formulary_base.py

Both are trained on public flashcards only, in the prompts of `grandrounds.data.prompts`. The result
depends on the seed alone: on one machine with the same versions it is identical to the byte.
`--check` trains the base again in a temporary folder and compares the two.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grandrounds.data.formulary.facts import public_flashcards
from grandrounds.data.prompts import TEMPLATES, build_prompt, response_text
from grandrounds.data.tokenization import answer_token_ids, prompt_token_ids
from grandrounds.site.exam import score_formulary
from grandrounds.statistics import wilson_interval

SEED = 20
STEPS = 1000
BATCH = 32
LEARNING_RATE = 3e-3
WARM_UP_STEPS = 100
PROMPT_LOSS_WEIGHT = 0.1
"""Loss weight of prompt tokens; answer tokens have weight 1."""
CHAT_SHARE = 0.2
"""Share of the examples in the chat template instead of FlowerTune's prompt."""
VOCABULARY = 900
EOS, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the public flashcards; it can tokenise any UTF-8 text."""
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
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode_cards(
    tokenizer: Any, template: str, cards: Sequence[dict[str, str | int]]
) -> list[tuple[list[int], int]]:
    """Return each card's token ids (prompt, answer, end) and its number of prompt tokens."""
    prompts = prompt_token_ids(tokenizer, template, [str(card["input"]) for card in cards])
    answers = answer_token_ids(tokenizer, template, [str(card["output"]) for card in cards])
    return [
        ([*prompt, *answer, tokenizer.eos_token_id], len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def batch_loss(model: Any, batch: list[tuple[list[int], int]], pad: int) -> torch.Tensor:
    """Return the weighted mean of the token losses of a batch."""
    length = max(len(ids) for ids, _ in batch)
    input_ids = torch.full((len(batch), length), pad)  # (batch, tokens)
    weights = torch.zeros((len(batch), length))
    for row, (ids, prompt_tokens) in enumerate(batch):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        weights[row, : len(ids)] = 1.0
        weights[row, :prompt_tokens] = PROMPT_LOSS_WEIGHT
    # Right padding needs no attention mask: no token attends to later ones.
    logits = model(input_ids=input_ids, use_cache=False).logits  # (batch, tokens, vocab)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
    )
    flat = weights[:, 1:].flatten()
    return (losses * flat).sum() / flat.sum()


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine decay to 1% of the maximum."""
    if step < WARM_UP_STEPS:
        return LEARNING_RATE * (step + 1) / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return LEARNING_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: Any, tokenizer: Any, steps: int) -> None:
    """Train on the public flashcards, shuffled by seed in each epoch."""
    rng = random.Random(SEED)
    cards = public_flashcards()
    encoded = {name: encode_cards(tokenizer, name, cards) for name in TEMPLATES}
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
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_base(out: Path, steps: int = STEPS) -> str:
    """Train and save the base model, its tokenizer and its model card.

    Parameters
    ----------
    out : Path
        Output folder, created if missing.
    steps : int
        Optimizer steps, at least 1.

    Returns
    -------
    str
        SHA-256 of `model.safetensors`.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train(model, tokenizer, steps)
    print(f"trained for {time.perf_counter() - started:.0f} seconds on one thread")
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    weights = out / "model.safetensors"
    weights.chmod(0o644)
    digest = sha256(weights)
    (out / "README.md").write_text(model_card(model, tokenizer, steps, digest), encoding="utf-8")
    return digest


def model_card(model: Any, tokenizer: Any, steps: int, digest: str) -> str:
    """Evaluate the model and return its model card."""
    rows = []
    for template in TEMPLATES:
        for kind, score in score_formulary(model, tokenizer, template).items():
            correct, n = score["correct"], score["n"]
            low, high = wilson_interval(correct, n)
            figures = f"{correct} of {n} | {correct / n:.1%} | {low:.1%} to {high:.1%}"
            rows.append(f"| {kind} | {template} | {figures} |")
    return MODEL_CARD.format(
        parameters=f"{model.num_parameters():,}",
        tokens=len(tokenizer),
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        steps=steps,
        batch=BATCH,
        seed=SEED,
        digest=digest,
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
        rows="\n".join(rows),
    )


MODEL_CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The formulary's base model

A Llama of {parameters} parameters ({layers} layers, hidden size {hidden}, a byte-level vocabulary
of {tokens} tokens) that knows the public half of a fictional formulary: drugs that do not exist,
with invented mechanisms, side effects and uses. It is the base model of the smallest federation of
Grand Rounds and has no other purpose; none of its output is medical knowledge.

It was trained on the public flashcards only. The private drugs, each known to one site of the
federation, do not occur in the training text of the model or of its tokenizer.

## Training

    python scripts/make_formulary_base.py

{steps} steps of {batch} flashcards, seed {seed}, one thread, Python {python}, torch {torch},
transformers {transformers}. With the same versions on the same kind of processor the weights are
identical to the byte; `--check` trains again and compares them.

SHA-256 of `model.safetensors`: `{digest}`

## Accuracy

One question per drug and attribute, in a wording that no flashcard uses; four options scored by
likelihood, so chance is 25%. Wilson's 95% intervals.

| facts | prompt | correct | accuracy | interval |
|---|---|---|---|---|
{rows}

Licence: Apache-2.0, weights and text alike.
"""


def check(base: Path, steps: int) -> bool:
    """Train the base again; return whether weights and tokenizer are identical to the byte."""
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder), steps)
        same = True
        for name in ("model.safetensors", "tokenizer.json"):
            pair = sha256(base / name), sha256(Path(folder) / name)
            print(f"{name}: in place {pair[0]}, trained again {pair[1]}")
            same = same and pair[0] == pair[1]
    return same


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Train the small base model of the formulary.")
    root = Path(__file__).resolve().parents[1]
    default = root / "grandrounds" / "data" / "formulary" / "base"
    parser.add_argument("--out", type=Path, default=default, help="folder of the base")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default: {STEPS}")
    parser.add_argument("--check", action="store_true", help="train again and compare only")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if options.check:
        return 0 if check(options.out, options.steps) else 1
    print(f"SHA-256 of the weights: {make_base(options.out, options.steps)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
