"""How long `grandrounds evaluate` takes on a base of full size, by both protocols.

    python benchmarks/random_base.py llama-3-8b /dev/shm/base
    python benchmarks/evaluation_full_size.py --base /dev/shm/base --quantization 4 [--data DIR]

The base has random weights: times are those of trained ones, answers are not. DIR holds files of
the benchmarks as `grandrounds evaluate --data` reads them; without it, questions are made up that
are as long as MedMCQA's. A byte-level BPE of 6,144 tokens is trained on the questions themselves,
and cuts them about as coarsely as the tokenizers of real models do.

Arms: `default` is what `evaluate` does on this device; `batches of 16` asks with `--batch-size 16`,
each order of the options by itself; `as on a GPU` reads a question once for all orders, on a CPU
too. The first two that are asked for are compared answer by answer. `forecast` is what `evaluate`
says after the first portions, against what the rest took. `passes` and `tokens read` count what the
base was given, padding included; `--no-cache` reads as for a base that is refused its cache.
`--continuous` answers FlowerTune's prompts of the first benchmark by transformers' continuous
batching too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from bare_loops import synchronize
from full_size_figures import saved

VOCABULARY = 6144
QUESTION_CHARACTERS = (
    7, 26, 32, 37, 41, 44, 49, 52, 56, 61, 65, 70, 74, 80, 88, 98, 114, 135, 168, 220, 567,
)  # fmt: skip
OPTION_CHARACTERS = (
    1, 3, 6, 7, 9, 10, 11, 12, 14, 15, 16, 18, 19, 21, 23, 26, 29, 34, 41, 53, 134,
)  # fmt: skip
"""Quantiles 0, 5, ..., 100 % of 2,000 questions of MedMCQA's validation split, and of their
options."""

FULL_ITEMS = {"pubmedqa": 1000, "medqa": 1273, "medmcqa": 4183, "careqa": 5621}

AS_ON_A_GPU = "as on a GPU"
ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "batches of 16": {"batch_size": 16},
    AS_ON_A_GPU: {},
}


def made_up_questions(file: Path, count: int) -> None:
    """Write questions of invented words in the columns of MedMCQA, as long as real ones."""
    from random_base import _quantile

    draw = random.Random(2)
    letters = "etaoinshrdlcumwfgypbvk"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 10))) for _ in range(4000)]

    def text(quantiles: tuple[int, ...]) -> str:
        length, found = _quantile(quantiles, draw.random()), ""
        while len(found) < length:
            found += f"{draw.choice(words)} "
        return found.strip()

    with file.open("w") as out:
        for _ in range(count):
            options = {key: text(OPTION_CHARACTERS) for key in ("opa", "opb", "opc", "opd")}
            row = {"question": text(QUESTION_CHARACTERS), **options, "cop": draw.randrange(4)}
            out.write(json.dumps(row) + "\n")


def with_tokenizer(base: Path, folder: Path, texts: list[str]) -> Path:
    """Return a folder with the weights of a base and a tokenizer that is trained on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    for file in base.resolve().iterdir():
        if not file.name.startswith(("token", "special")):
            (folder / file.name).symlink_to(file)
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(VOCABULARY, vocabulary),
        special_tokens=["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    return folder


@contextmanager
def counted(model: Any) -> Iterator[dict[str, int]]:
    """Yield passes and tokens read, which grow with every forward pass of a model."""
    counts = {"passes": 0, "tokens_read": 0}

    def count(_: Any, arguments: Any, named: dict[str, Any]) -> None:
        counts["passes"] += 1
        counts["tokens_read"] += named["input_ids"].numel()

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        hook.remove()


@contextmanager
def gpus_passes() -> Iterator[None]:
    """Fill passes on a CPU as on a GPU with ample memory, questions once for all orders."""
    from grandrounds.model import passes, prefill
    from grandrounds.study.evaluation import runner

    fills, limits = runner.fills_passes, prefill.pass_limits
    runner.fills_passes = lambda method: True
    if not on_gpu():
        prefill.pass_limits = lambda model, batch_size, *_: passes.Limits(
            batch_size or sys.maxsize,
            prefill.CUDA_PASS_TOKENS,
            enough=prefill.CUDA_ENOUGH_TOKENS,
        )
    try:
        yield
    finally:
        runner.fills_passes, prefill.pass_limits = fills, limits


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def ask(
    tasks: Any, models: Any, tokenizer: Any, together: bool = False
) -> tuple[dict[str, Any], Any]:
    """Ask everything; return seconds, counts and the forecast, and the answers.

    `together`: fill passes, and read questions once for all orders, whatever the device.
    """
    from grandrounds.study.evaluation import runner
    from grandrounds.study.evaluation.answers import open_folder

    told: dict[str, float] = {}

    def listen(event: str, values: Any) -> None:
        if event == "forecast":
            told.update(expected=values["seconds"], at=time.perf_counter())

    open_folder(tasks.folder, {}, False)
    with models.asked(tasks.target.subjects[0]) as model:
        counting = counted(model)
    with counting as counts, gpus_passes() if together else nullcontext():
        started = time.perf_counter()
        answers = runner.ask_all(tasks, models, tokenizer, listen)
        synchronize()
        ended = time.perf_counter()
    figures = {
        **counts,
        "seconds": ended - started,
        "forecast_seconds": told["expected"],
        "seconds_after_forecast": ended - told["at"],
    }
    return figures, answers


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Return seconds by arm, protocol and benchmark, and how the arms' answers differ."""
    import torch

    from grandrounds.model import prefill
    from grandrounds.model.tokenizers import tokenizer_of
    from grandrounds.study.evaluation import flowertune, runner
    from grandrounds.study.evaluation.benchmarks import load_questions
    from grandrounds.study.evaluation.models import Models
    from grandrounds.study.evaluation.tasks import EvaluationTasks, Method, find_target

    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        work = Path(folder)
        data = given.data
        if data is None:
            data = work / "data"
            data.mkdir()
            made_up_questions(data / "medmcqa.jsonl", given.limit)
        questions = load_questions(given.benchmarks, data, given.limit)
        texts = [
            flowertune.build_prompt(task.benchmark, item)
            for task in questions.tasks
            for item in task.items
        ]
        base = given.base
        if not given.own_tokenizer:
            base = with_tokenizer(base, work / "base", texts)
        target = find_target("none", str(base), given.quantization)
        models = Models(runner.spec_of(target), target.subjects)
        started = time.perf_counter()
        with models.asked(target.subjects[0]) as model:
            synchronize()
            if given.no_cache:
                prefill._proven[model] = prefill.WHOLE
        loading = time.perf_counter() - started
        tokenizer = tokenizer_of(target.base, target.chat)
        lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        result: dict[str, Any] = {
            "items": {task.benchmark.name: len(task.items) for task in questions.tasks},
            "questions": str(given.data.name) if given.data else "made up",
            "quantization": given.quantization,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "loading_seconds": loading,
            "mean_prompt_tokens": sum(lengths) / len(lengths),
            "rows": [],
            "differences": [],
        }
        given_answers: dict[tuple[str, str], Any] = {}
        for task in questions.tasks:
            alone = type(questions)((task,), given.limit)
            for protocol in ("likelihood", "flowertune"):
                for arm in given.arms:
                    method = Method(protocol=protocol, **ARMS[arm])
                    out = work / f"{arm}-{task.benchmark.name}-{protocol}"
                    tasks = EvaluationTasks(target, alone, method, out)
                    figures, answers = ask(tasks, models, tokenizer, arm == AS_ON_A_GPU)
                    row = {"arm": arm, "benchmark": task.benchmark.name, "protocol": protocol}
                    row["answers"] = sum(len(file.records) for file in answers.values())
                    result["rows"].append({**row, **figures})
                    saved(result, given.out)
                    (file,) = answers.values()
                    given_answers[arm, protocol] = file.records
                if len(given.arms) > 1:
                    pair = [given_answers[arm, protocol] for arm in given.arms[:2]]
                    named = {"benchmark": task.benchmark.name, "protocol": protocol}
                    result["differences"].append({**named, **difference(*pair)})
        if given.continuous:
            with models.asked(target.subjects[0]) as model:
                result["continuous"] = continuous(model, tokenizer, questions.tasks[0])
    seconds = {}
    for arm in given.arms:
        rows = [row for row in result["rows"] if row["arm"] == arm]
        seconds[arm] = sum(row["seconds"] for row in rows)
    result["seconds"] = seconds
    return result


def continuous(model: Any, tokenizer: Any, task: Any, new_tokens: int = 2) -> dict[str, Any]:
    """Return the seconds of two greedy tokens for each prompt, by us and by continuous batching."""
    from transformers import GenerationConfig

    from grandrounds.model.scoring import generate_greedily
    from grandrounds.study.evaluation import flowertune

    prompts = tokenizer(
        [
            flowertune.model_input(flowertune.build_prompt(task.benchmark, item))
            for item in task.items
        ]
    )["input_ids"]
    stop = tokenizer.eos_token_id
    limits = [new_tokens] * len(prompts)
    generate_greedily(model, prompts[:2], limits[:2], [stop], batch_size=None)
    started = time.perf_counter()
    ours = generate_greedily(model, prompts, limits, [stop], batch_size=None)
    seconds = {"ours": time.perf_counter() - started}
    how = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=0
    )
    started = time.perf_counter()
    found = model.generate_batch(inputs=[list(ids) for ids in prompts], generation_config=how)
    seconds["continuous"] = time.perf_counter() - started
    said = [list(found[key].generated_tokens) for key in found]
    different = sum([i for i in a if i != stop] != b for a, b in zip(said, ours, strict=True))
    return {"prompts": len(prompts), "seconds": seconds, "different_answers": different}


def difference(one: dict[Any, Any], other: dict[Any, Any]) -> dict[str, Any]:
    """Return how the answers of two arms differ."""
    if set(one) != set(other):
        raise SystemExit("evaluation_full_size: the arms answered different items")
    pairs = [(record, other[key]) for key, record in one.items()]
    key = "choice" if "choice" in pairs[0][0] else "output"
    apart = [
        abs(x - y)
        for a, b in pairs
        for x, y in zip(a.get("log_likelihoods", ()), b.get("log_likelihoods", ()), strict=True)
    ]
    return {
        "answers": len(pairs),
        "different_answers": sum(a[key] != b[key] for a, b in pairs),
        "largest_log_likelihood_difference": max(apart, default=0.0),
    }


def lines(result: dict[str, Any]) -> list[str]:
    """Return the result in lines."""
    found = [
        f"{sum(result['items'].values()):,} items ({result['questions']}), "
        f"{result['mean_prompt_tokens']:.0f} tokens a prompt of FlowerTune's, "
        f"{result['quantization'] or 'no'} bits, {result['device']}; base loaded in "
        f"{result['loading_seconds']:.1f} s",
        f"{'':<16}{'benchmark':<12}{'protocol':<14}{'answers':>9}{'seconds':>9}{'a second':>10}"
        f"{'forecast':>10}{'took':>8}{'passes':>9}{'tokens read':>13}",
    ]
    for row in result["rows"]:
        found.append(
            f"{row['arm']:<16}{row['benchmark']:<12}{row['protocol']:<14}{row['answers']:>9,}"
            f"{row['seconds']:>9.2f}{row['answers'] / row['seconds']:>10.0f}"
            f"{row['forecast_seconds']:>10.2f}{row['seconds_after_forecast']:>8.2f}"
            f"{row['passes']:>9,}{row['tokens_read']:>13,}"
        )
    for row in result["differences"]:
        found.append(
            f"{row['benchmark']}, {row['protocol']}: {row['different_answers']} of "
            f"{row['answers']:,} answers differ between the arms, log-likelihoods by at most "
            f"{row['largest_log_likelihood_difference']:.2g}"
        )
    if "continuous" in result:
        row = result["continuous"]
        found.append(
            f"two tokens after {row['prompts']:,} prompts: {row['seconds']['ours']:.2f} s, by "
            f"continuous batching {row['seconds']['continuous']:.2f} s, "
            f"{row['different_answers']} answers differ"
        )
    return found


def main() -> None:
    """Measure; print a table, write JSON."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--quantization", type=int, choices=(0, 4, 8), default=0)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--benchmarks", nargs="+", default=["medmcqa"], choices=list(FULL_ITEMS))
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--arms", nargs="+", default=list(ARMS)[:2], choices=list(ARMS))
    parser.add_argument("--own-tokenizer", action="store_true", help="the base's, which is trained")
    parser.add_argument("--no-cache", action="store_true", help="as if its cache were refused")
    parser.add_argument("--continuous", action="store_true", help="transformers' way too")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    from grandrounds.errors import GrandRoundsError
    from grandrounds.quiet import quiet_libraries

    quiet_libraries()
    try:
        result = measure(given)
    except GrandRoundsError as error:
        sys.exit(f"evaluation_full_size: {error}")
    print("\n".join(lines(result)))
    saved(result, given.out)


if __name__ == "__main__":
    main()
