"""Asks models the questions of benchmarks, and writes down what they answered and what it is worth.

    from grandrounds.study.evaluation.runner import evaluate
    evaluate("runs/first", protocol="likelihood")

Answers are written as batches finish, a few at a time; a stopped evaluation goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grandrounds.errors import ConfigError
from grandrounds.model.base import BaseSpec, base_fingerprint, device_and_dtype, load_tokenizer
from grandrounds.model.scoring import generate_greedily
from grandrounds.study.evaluation import flowertune, likelihood
from grandrounds.study.evaluation.answers import (
    RESULT,
    AnswerFile,
    Record,
    answers_name,
    open_folder,
    write_json,
)
from grandrounds.study.evaluation.benchmarks import Benchmark, Item
from grandrounds.study.evaluation.models import Models
from grandrounds.study.evaluation.results import Answers, evaluation_of, write_flowertune_files
from grandrounds.study.evaluation.tasks import Plan, Subject, Task, make_plan

FLOWERTUNE_BATCH = 16
"""Items whose answer length FlowerTune decides together, whatever is computed together here."""

BATCHES_AT_ONCE = 4
"""Batches between two times that answers are written. What prompts share is computed once for all
of them; with one batch it would cost up to a third of the time again."""

Listener = Callable[[str, Mapping[str, Any]], None]
"""Told `asking` (model, benchmark, protocol, total, done), `answered` (count) whenever answers are
written, and `asked` (asked, truncated) at the end of a benchmark."""


def evaluate(
    target: str,
    *,
    base: str | None = None,
    benchmarks: Sequence[str] | None = None,
    protocol: str = "likelihood",
    data: Path | None = None,
    quantization: int | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    permutations: int = 3,
    out: Path | None = None,
    resume: bool = False,
    listener: Listener = lambda event, facts: None,
) -> dict[str, Any]:
    """Evaluate the untouched base, and the adapters of a target against it.

    Parameters
    ----------
    target : str
        A run directory (its last and best checkpoints are asked), the folder of one adapter, or
        `none` for the base alone.
    base : str, optional
        Hub name, local folder or `formulary`; needed for `none`. Otherwise what the run or the
        adapter names.
    benchmarks : sequence of str, optional
        Names of `grandrounds.study.evaluation.benchmarks`; left out, `formulary` for a run on it,
        and FlowerTune's four otherwise.
    protocol : str
        `flowertune`, `likelihood` or `all`.
    data : Path, optional
        Folder with the benchmarks' files; those that are not there come from the hub.
    quantization : int, optional
        0, 4 or 8 bits; left out, what the run trained with, or 0.
    batch_size : int
        Prompts computed together, from 1; it changes no answer but by rounding.
    limit : int, optional
        Ask only the first so many items of each benchmark.
    permutations : int
        Further orders of the options that protocol `likelihood` asks, from 0.
    out : Path, optional
        Folder to write to; left out, `evaluation` in the run or adapter.
    resume : bool
        Go on with the evaluation in `out`; no item is asked twice.
    listener : callable, optional
        Is told of the progress.

    Returns
    -------
    dict
        What `evaluation.json` holds: the layout of `grandrounds.study.evaluation.verification`; for
        protocol `all` an object with one such evaluation per protocol under `evaluations`.

    Raises
    ------
    GrandRoundsError
        If an argument, a source, the base or an adapter cannot be used, or `out` holds another
        evaluation.
    KeyboardInterrupt
        After Ctrl-C, with a text that says what is kept; the answers so far are.
    """
    if batch_size < 1:
        raise ConfigError(f"batch-size must be at least 1, got {batch_size}")
    plan = make_plan(
        target,
        base=base,
        benchmarks=benchmarks,
        protocol=protocol,
        data=data,
        quantization=quantization,
        limit=limit,
        permutations=permutations,
        out=out,
    )
    spec = BaseSpec(plan.base, plan.quantization, plan.dtype)
    tokenizer = load_tokenizer(plan.base)
    settings = settings_of(plan, tokenizer)
    models = Models(spec, plan.subjects)
    open_folder(plan.out, settings, resume)
    answers = ask_all(plan, models, tokenizer, batch_size, listener)
    evaluation = evaluation_of(plan, settings, answers)
    write_flowertune_files(plan, answers)
    write_json(plan.out / RESULT, evaluation)
    return evaluation


def settings_of(plan: Plan, tokenizer: Any) -> dict[str, Any]:
    """Return everything that decides the answers; a resume must find it unchanged."""
    return {
        "base": plan.base,
        "base fingerprint": base_fingerprint(plan.base),
        "adapters": {s.name: s.sha256 for s in plan.subjects if s.adapter is not None},
        "protocols": list(plan.protocols),
        "precision": precision_of(plan),
        "quantization": plan.quantization,
        "limit": plan.limit,
        "permutations": plan.permutations,
        "source": {task.benchmark.name: task.source for task in plan.tasks},
        "prompt hash": {
            task.benchmark.name: {
                protocol: prompt_hash(protocol, task.benchmark, plan.prompt_template, tokenizer)
                for protocol in plan.protocols
            }
            for task in plan.tasks
        },
    }


def prompt_hash(protocol: str, benchmark: Benchmark, prompt_template: str, tokenizer: Any) -> str:
    """Return the hash of what a protocol asks in a benchmark."""
    if protocol == "flowertune":
        return flowertune.prompt_hash(benchmark)
    return likelihood.prompt_hash(benchmark, prompt_template, tokenizer)


def precision_of(plan: Plan) -> str:
    """Return in what the base's weights are held: a number type, `nf4` or `int8`."""
    _, dtype = device_and_dtype(plan.dtype)
    return {4: "nf4", 8: "int8"}.get(plan.quantization, str(dtype).removeprefix("torch."))


# --- Asking ---------------------------------------------------------------------------------------


def ask_all(
    plan: Plan, models: Models, tokenizer: Any, batch_size: int, listener: Listener
) -> Answers:
    """Ask every model what it has not answered yet; one model after the other."""
    answers: dict[tuple[str, str, str], AnswerFile] = {}
    try:
        for subject in plan.subjects:
            for protocol in plan.protocols:
                for task in plan.tasks:
                    key = (subject.name, task.benchmark.name, protocol)
                    answers[key] = AnswerFile(plan.out / answers_name(*key))
                    work = _Work(plan, subject, task, protocol, answers[key])
                    work.ask(models, tokenizer, batch_size, listener)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"answers so far are kept in {plan.out}; the same command with --resume goes on"
        ) from None
    return answers


@dataclass(frozen=True)
class _Work:
    """One model, one benchmark, one protocol."""

    plan: Plan
    subject: Subject
    task: Task
    protocol: str
    file: AnswerFile

    def orders(self) -> int:
        """Return in how many orders of the options each item is asked."""
        shuffles = self.protocol == "likelihood" and likelihood.shows_letters(self.task.benchmark)
        return 1 + self.plan.permutations * shuffles

    def ask(self, models: Models, tokenizer: Any, batch_size: int, listener: Listener) -> None:
        """Ask what is not answered yet, and tell of it."""
        total = self.orders() * len(self.task.items)
        done = len(self.file.records)
        facts: dict[str, Any] = {"model": self.subject.name, "benchmark": self.task.benchmark.title}
        facts |= {"protocol": self.protocol, "total": total, "done": done}
        listener("asking", facts)
        if done < total:
            limits = answer_limits(self.task, tokenizer) if self.protocol == "flowertune" else {}
            with models.asked(self.subject) as model:
                for order, items in self.portions(batch_size * BATCHES_AT_ONCE):
                    if self.protocol == "flowertune":
                        benchmark = self.task.benchmark
                        answered = generate(model, tokenizer, benchmark, items, limits, batch_size)
                    else:
                        answered = self.compare(model, tokenizer, order, items, batch_size)
                    self.file.append({"order": order, **record} for record in answered)
                    listener("answered", {"count": len(items)})
        truncated = sum(record["truncated"] for record in self.file.ordered())
        listener("asked", {**facts, "asked": total - done, "truncated": truncated})

    def portions(self, most: int) -> Iterator[tuple[int, list[Item]]]:
        """Yield what is not answered yet in portions of similar length, the longest items first."""
        by_length = sorted(self.task.items, key=_characters, reverse=True)
        for order in range(self.orders()):
            for first in range(0, len(by_length), most):
                portion = by_length[first : first + most]
                if left := [i for i in portion if (order, i.row) not in self.file.records]:
                    yield order, left

    def compare(
        self, model: Any, tokenizer: Any, order: int, items: list[Item], batch_size: int
    ) -> list[Record]:
        """Return how likely a model finds the options of some items, in one of their orders."""
        benchmark = self.task.benchmark
        shown: Sequence[Item] = items
        if order:
            shown = likelihood.shuffled(benchmark, items, order)
        found = likelihood.answer_items(
            model,
            tokenizer,
            benchmark,
            shown,
            batch_size=batch_size,
            prompt_template=self.plan.prompt_template,
        )
        return [
            {
                "row": item.row,
                "log_likelihoods": list(answer.log_likelihoods),
                "choice": answer.choice,
                "correct": answer.correct,
                "correct_normalised": answer.correct_normalised,
                "truncated": answer.truncated,
            }
            for item, answer in zip(items, found, strict=True)
        ]


def _characters(item: Item) -> int:
    texts = (item.question, *item.context, *item.options)
    return sum(map(len, texts))


def answer_limits(task: Task, tokenizer: Any) -> dict[int, int]:
    """Return row → tokens of the answer: FlowerTune's rule over its own batches, in source order.

    What is computed together here is another matter and changes no limit.
    """
    limits: dict[int, int] = {}
    for first in range(0, len(task.items), FLOWERTUNE_BATCH):
        batch = task.items[first : first + FLOWERTUNE_BATCH]
        golds = [flowertune.gold_text(item) for item in batch]
        most = flowertune.max_new_tokens(golds, tokenizer)
        limits |= {item.row: most for item in batch}
    return limits


def generate(
    model: Any,
    tokenizer: Any,
    benchmark: Benchmark,
    items: Sequence[Item],
    limits: Mapping[int, int],
    batch_size: int,
) -> list[Record]:
    """Return what a model says to items asked FlowerTune's way.

    A prompt that leaves no room for its answer in the context is cut on the left.
    """
    texts = [flowertune.model_input(flowertune.build_prompt(benchmark, item)) for item in items]
    prompts = tokenizer(texts)["input_ids"]
    context = likelihood.context_length(model.config)
    rooms = [max(context - limits[item.row], 1) for item in items]
    outputs = generate_greedily(
        model,
        [ids[-room:] for ids, room in zip(prompts, rooms, strict=True)],
        [limits[item.row] for item in items],
        stop_tokens(model, tokenizer),
        batch_size=batch_size,
    )
    return [
        {
            "row": item.row,
            "output": tokenizer.decode(output, skip_special_tokens=True),
            "truncated": len(ids) > room,
        }
        for item, output, ids, room in zip(items, outputs, prompts, rooms, strict=True)
    ]


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer, as `generate` of transformers takes them."""
    given = getattr(model.generation_config, "eos_token_id", None)
    if given is None:
        given = tokenizer.eos_token_id
    return list(given) if isinstance(given, list | tuple) else [given]
