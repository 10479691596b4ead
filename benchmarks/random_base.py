"""A base of any known architecture with random weights, and data as long as real ones, in a folder.

    python benchmarks/random_base.py llama-3-8b /dev/shm/base

No weights can be told from random ones by speed or memory. They are drawn on the device that will
train, one tensor of each shape, and written by several threads: neither the device nor main memory
ever holds the whole.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
    """Write configuration, tokenizer and random weights; return the number of parameters.

    One shard a layer. Weights of the same shape are equal in all layers: they are drawn once, and
    16 GB leave at the speed of the file system.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = model_config(architecture)
    folder.mkdir(parents=True)
    config.dtype = dtype
    config.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    drawn: dict[tuple[int, ...], memoryview] = {}
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    parameters = 0
    for name, parameter in model.named_parameters():  # a tied head comes once
        shape = tuple(parameter.shape)
        parameters += parameter.numel()
        shards.setdefault(_shard_of(name), {})[name] = shape
        if shape not in drawn:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            tensor.fill_(1.0) if len(shape) == 1 else tensor.normal_(0.0, 0.02)
            drawn[shape] = memoryview(tensor.cpu().flatten().view(torch.uint8).numpy())
    with ThreadPoolExecutor() as pool:
        list(
            pool.map(
                lambda shard: _write_shard(folder / shard[0], shard[1], drawn, dtype),
                shards.items(),
            )
        )
    where = {name: shard for shard, names in shards.items() for name in names}
    total = parameters * getattr(torch, dtype).itemsize
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return parameters


def _shard_of(name: str) -> str:
    """Return the file of a parameter: that of its layer, or of what is in no layer."""
    numbers = [part for part in name.split(".") if part.isdecimal()]
    return f"model-{f'layer-{int(numbers[0]):03d}' if numbers else 'rest'}.safetensors"


def _write_shard(
    file: Path,
    shapes: dict[str, tuple[int, ...]],
    drawn: dict[tuple[int, ...], memoryview],
    dtype: str,
) -> None:
    """Write one file of safetensors: the length of its header, its header, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + drawn[shape].nbytes
        kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            out.write(drawn[shape])


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
    pairs = zip(rows["input"], rows["output"], strict=True)
    return [(len(question or ""), len(answer or "")) for question, answer in pairs]


def main() -> None:
    """Write a base in the type that this machine computes in; print how long it took."""
    from grandrounds.model.base import device_and_dtype

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("architecture")
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    device, dtype = device_and_dtype("auto")
    started = time.perf_counter()
    stored = str(dtype).removeprefix("torch.")
    count = write_base(given.architecture, given.folder, str(device), stored)
    size = sum(file.stat().st_size for file in given.folder.iterdir())
    seconds = time.perf_counter() - started
    print(f"{count:,} parameters, {size / 1e9:.1f} GB written in {seconds:.1f} s")


if __name__ == "__main__":
    main()
