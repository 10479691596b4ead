"""A base of any known architecture with random weights, and data as long as real ones, in a folder.

No weights can be told from random ones by speed or memory. They are drawn tensor by tensor on the
device that will train, and leave it shard by shard: neither the device nor main memory ever holds
the whole.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SHARD_BYTES = 1_000_000_000

SHORT_NAMES = {"llama-3-8b": "meta-llama/Meta-Llama-3-8B"}

LLAMA = {"model_type": "llama", "vocab_size": 32_000, "tie_word_embeddings": True}
SMALL: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 2_000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "90m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 10,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
}
"""Architectures for a CPU; `90m` has 90 million parameters, the vocabulary's included."""

QUESTION_CHARACTERS = (
    11, 24, 29, 33, 35, 37, 39, 41, 44, 46, 49, 52, 55, 58, 59, 62, 64, 67, 69, 76, 127,
)  # fmt: skip
ANSWER_CHARACTERS = (
    7, 67, 91, 113, 136, 159, 184, 208, 235, 265, 302, 339, 383, 436, 500, 580, 670, 802, 1002,
    1324, 15848,
)  # fmt: skip
"""Quantiles 0, 5, ..., 100 % of the 4,952 questions and answers of WikiDoc patient information, as
collected by medAlpaca in the schema of the medical flashcards."""

CHARACTERS_PER_TOKEN = 4.3
"""Of English medical text in a vocabulary of the size of Llama's, about."""


def model_config(architecture: str) -> Any:
    """Return transformers' configuration of an architecture.

    Parameters
    ----------
    architecture
        `tiny`, `90m`, `llama-3-8b`, a name in architectures.json, or a config.json.
    """
    from transformers import AutoConfig

    from grandrounds.model import architectures

    if architecture in SMALL:
        entry: dict[str, Any] = {**LLAMA, **SMALL[architecture]}
    elif Path(architecture).is_file():
        entry = json.loads(Path(architecture).read_text())
    else:
        found = architectures.find_architecture(SHORT_NAMES.get(architecture, architecture))
        entry = dict(architectures._library()[found.known_as])
    entry.pop("also", None)
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return AutoConfig.for_model(**{"max_position_embeddings": 8192, **entry, **special})


def write_base(architecture: str, folder: Path, device: str, dtype: str) -> int:
    """Write configuration, tokenizer and random weights; return the number of parameters."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = model_config(architecture)
    folder.mkdir(parents=True)
    config.dtype = dtype
    config.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    shards: list[dict[str, Any]] = [{}]
    held = parameters = total = 0
    where: dict[str, str] = {}

    def flush() -> None:
        name = f"model-{len(shards):05d}.safetensors"
        save_file(shards[-1], folder / name, {"format": "pt"})
        where.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}

    for name, parameter in model.named_parameters():  # a tied head comes once
        tensor = torch.empty(parameter.shape, dtype=getattr(torch, dtype), device=device)
        tensor.fill_(1.0) if parameter.dim() == 1 else tensor.normal_(0.0, 0.02)
        parameters += tensor.numel()
        total += tensor.nbytes
        held += tensor.nbytes
        shards[-1][name] = tensor.cpu()
        if held > SHARD_BYTES:
            flush()
            shards.append({})
            held = 0
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return parameters


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer with one token for each of `w0`, `w1`, ..., spread over the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    step = max(1, vocabulary // 30_000)
    words = {f"w{i}": 3 + i * step for i in range((vocabulary - 3) // step)}
    ids = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **words}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_cards(file: Path, count: int, vocabulary: int, lengths_of: Path | None = None) -> None:
    """Write `count` question-answer pairs of random words, as long as real ones in tokens.

    Parameters
    ----------
    lengths_of
        A file of real pairs (`input`, `output`) whose lengths serve; None: WikiDoc's quantiles.
    """
    draw = random.Random(0)
    words = (vocabulary - 3) // max(1, vocabulary // 30_000)
    pairs = _real_lengths(lengths_of) if lengths_of else None

    def text(characters: float) -> str:
        tokens = max(1, round(characters / CHARACTERS_PER_TOKEN))
        return " ".join(f"w{draw.randrange(words)}" for _ in range(tokens))

    with file.open("w") as out:
        for _ in range(count):
            if pairs:
                question, answer = draw.choice(pairs)
            else:
                question, answer = (
                    _quantile(q, draw.random()) for q in (QUESTION_CHARACTERS, ANSWER_CHARACTERS)
                )
            row = {"input": text(question), "output": text(answer)}
            out.write(json.dumps(row) + "\n")


def _quantile(values: tuple[int, ...], share: float) -> float:
    """Return the value at a share of 0 to 1, straight between the known quantiles."""
    place = share * (len(values) - 1)
    low = min(int(place), len(values) - 2)
    return values[low] + (place - low) * (values[low + 1] - values[low])


def _real_lengths(file: Path) -> list[tuple[float, float]]:
    from grandrounds.data.sources import load_rows

    rows = load_rows(str(file), question_column="input", answer_column="output")
    return [(len(r["input"] or ""), len(r["output"] or "")) for r in rows]
