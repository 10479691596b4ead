"""How fast prompts are answered: against `model.generate` on one prompt after the other.

    python benchmarks/evaluation_speed.py --data DIR [--texts FILE] [--times 3] [--out FILE]

DIR holds the files `medmcqa` and `medqa` as `grandrounds evaluate --data` reads them. Both arms ask
the same random Llama of 6 M parameters, in float32 on the CPU, FlowerTune's prompts on the first
300 MedMCQA and the first 100 MedQA questions, one token each as its rule says. They take turns, and
must give the same answers. Tokenising is no part of either time.

A random model says the same to everything unless its weights are large: `INITIALIZER_RANGE` is so
chosen that answers vary, and how many different ones there were is reported.

`work` is how many times fewer tokens are read where the shared beginning is read once. Where a CPU
computes at its full rate already on the tokens of one prompt, there is little else to save.

The tokenizer decides how long the prompts are. With `--texts FILE` (JSON lines of medical texts) a
byte-level BPE of 6,144 tokens is trained on them, and cuts the prompts about as coarsely as those
of real models. Without it, it is trained on the prompts that are not asked, of the same files.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6}
"""The `6m` of benchmarks/overhead.py."""

VOCABULARY, CONTEXT_TOKENS = 6144, 2048
INITIALIZER_RANGE = 0.1
ITEMS = {"medmcqa": 300, "medqa": 100}
"""How many of the first questions are asked."""

GOALS = {"medmcqa": 4.0, "medqa": 3.0}
"""How many times faster it must be."""


def make_model() -> Any:
    """Return a random Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT_TOKENS,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=INITIALIZER_RANGE,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **SHAPE,
    )
    return LlamaForCausalLM(config).eval()


def train_tokenizer(texts: Sequence[str]) -> Any:
    """Return a byte-level BPE, trained on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def load_prompts(data: Path) -> dict[str, list[str]]:
    """Return the texts that FlowerTune gives a model, of every question in the files."""
    from grandrounds.study.evaluation.benchmarks import get_benchmark, load_items
    from grandrounds.study.evaluation.flowertune import build_prompt, model_input

    prompts = {}
    for name in ITEMS:
        benchmark = get_benchmark(name)
        items = load_items(benchmark, data)
        prompts[name] = [model_input(build_prompt(benchmark, item)) for item in items]
    return prompts


def read_texts(file: Path) -> list[str]:
    """Return every text in a file of JSON lines."""
    content = file.read_bytes()
    if file.name.endswith(".gz"):
        content = gzip.decompress(content)
    values = [value for line in content.splitlines() for value in json.loads(line).values()]
    return [value for value in values if isinstance(value, str)]


def one_by_one(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Ask one prompt after the other, one token each, as FlowerTune's evaluation does."""
    import torch

    texts = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=1,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=1,
            )
            said = output[0, len(prompt) :].tolist()
            texts.append([token for token in said if token != 1])
    return texts


def timed(ask: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """Return wall-clock seconds and answers."""
    started = time.perf_counter()
    answers = ask()
    return time.perf_counter() - started, answers


def compare(
    model: Any, prompts: Sequence[Sequence[int]], times: int, batch_size: int
) -> dict[str, Any]:
    """Let both arms take turns on the same prompts; return medians and every single figure.

    Raises
    ------
    SystemExit
        If the arms answer differently.
    """
    from grandrounds.model.passes import shared_prefix
    from grandrounds.model.scoring import generate_greedily

    one_by_one(model, prompts[:2])  # the first calls of a process are slow
    generate_greedily(model, prompts[:2], [1, 1], [1])
    rows = []
    answers: list[list[int]] = []
    for _ in range(times):
        slow, answers = timed(lambda: one_by_one(model, prompts))
        fast, same = timed(
            lambda: generate_greedily(
                model, prompts, [1] * len(prompts), [1], batch_size=batch_size
            )
        )
        if answers != same:
            different = sum(a != b for a, b in zip(answers, same, strict=True))
            raise SystemExit(f"{different} of {len(prompts)} answers differ")
        rows.append({"one_by_one_seconds": slow, "batched_seconds": fast, "ratio": slow / fast})
    tokens = [len(prompt) for prompt in prompts]
    shared = len(shared_prefix(prompts))
    return {
        "prompts": len(prompts),
        "distinct_answers": len(set(map(tuple, answers))),
        "mean_prompt_tokens": statistics.mean(tokens),
        "longest_prompt_tokens": max(tokens),
        "shared_prefix_tokens": shared,
        "work_ratio": sum(tokens) / (shared + sum(tokens) - shared * len(tokens)),
        **{name: statistics.median(row[name] for row in rows) for name in rows[0]},
        "ratio_range": [min(row["ratio"] for row in rows), max(row["ratio"] for row in rows)],
        "single": rows,
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every benchmark on one model with one tokenizer."""
    import torch

    torch.set_num_threads(arguments.threads)
    prompts = load_prompts(arguments.data)
    if arguments.texts:
        texts, trained_on = read_texts(arguments.texts), arguments.texts.name
    else:
        texts = [prompt for name, count in ITEMS.items() for prompt in prompts[name][count:]]
        trained_on = "prompts that are not asked"
    tokenizer = train_tokenizer(texts)
    model = make_model()
    result: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "threads": arguments.threads,
        "load_before": os.getloadavg()[0],
        "batch_size": arguments.batch_size,
        "times": arguments.times,
        "tokenizer": f"byte-level BPE of {len(tokenizer):,} tokens, trained on {trained_on}",
        "torch": torch.__version__,
    }
    for name, count in ITEMS.items():
        asked = prompts[name][: min(count, arguments.limit or count)]
        ids = tokenizer(asked)["input_ids"]
        result[name] = compare(model, ids, arguments.times, arguments.batch_size)
        characters = sum(map(len, asked))
        result[name]["characters_per_token"] = characters / sum(map(len, ids))
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print what was measured, for a person."""
    print(
        f"{result['parameters'] / 1e6:.1f} M parameters, float32, {result['threads']} threads, "
        f"batches of {result['batch_size']}, median of {result['times']} alternated pairs\n"
        f"{result['tokenizer']}"
    )
    heads = ("prompts", "tokens", "shared", "answers", "one by one", "batched", "work", "ratio")
    print(f"{'':<10}" + "".join(f"{head:>11}" for head in heads))
    for name, goal in GOALS.items():
        row = result[name]
        low, high = row["ratio_range"]
        print(
            f"{name:<10}{row['prompts']:>11}{row['mean_prompt_tokens']:>11.0f}"
            f"{row['shared_prefix_tokens']:>11}{row['distinct_answers']:>11}"
            f"{row['one_by_one_seconds']:>9.2f} s{row['batched_seconds']:>9.2f} s"
            f"{row['work_ratio']:>10.2f}x{row['ratio']:>10.2f}x"
            f"   ({low:.2f} to {high:.2f}, goal {goal:.0f})"
        )
    print(
        "tokens: mean of a prompt; shared: those that all begin with; answers: different ones;\n"
        "work: tokens of all prompts to tokens read in batches"
    )


def main() -> None:
    """Measure; print a table, write JSON."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", type=Path, default=None)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=int, default=None, help="prompts of each, at most")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    result = measure(arguments)
    print_table(result)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
