"""Runs benchmarks on a base and its adapters, and records answers and results.

    from grandrounds.study.evaluation.benchmarks import load_questions
    from grandrounds.study.evaluation.runner import evaluate
    from grandrounds.study.evaluation.tasks import EvaluationTasks, find_target

    target = find_target("runs/first")
    evaluate(EvaluationTasks(target, load_questions(target.benchmarks)))

Answers are written every few batches; a stopped evaluation can be resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from grandrounds.data.tokenization import TokenizedExample, end_token_ids
from grandrounds.errors import DataError
from grandrounds.model.base import (
    BaseSpec,
    base_fingerprint,
    bits_of,
    device_and_dtype,
)
from grandrounds.model.prefill import CPU_BATCH, proven_layout
from grandrounds.model.scoring import generate_greedily, stop_tokens
from grandrounds.model.tokenizers import tokenizer_of
from grandrounds.study.evaluation import flowertune, greedy, likelihood
from grandrounds.study.evaluation.answers import (
    RESULT,
    AnswerFile,
    Record,
    answers_name,
    open_folder,
    write_json,
)
from grandrounds.study.evaluation.benchmarks import Benchmark, Item, Task
from grandrounds.study.evaluation.greedy import GREEDY
from grandrounds.study.evaluation.models import Models
from grandrounds.study.evaluation.results import Answers, evaluation_of, write_flowertune_files
from grandrounds.study.evaluation.sample import METHOD
from grandrounds.study.evaluation.tasks import EvaluationTasks, Method, Subject, Target

FLOWERTUNE_BATCH = 16
"""Items per batch in FlowerTune's rule for the answer length, whatever our own batch size."""

BATCHES_AT_ONCE = 4
"""Batches per write of answers. Prefixes shared by prompts are computed once for all of them; with
one batch per write, an evaluation takes up to a third longer."""

GPU_PORTION = 256
"""Items per write of answers where passes are filled by tokens, each in all orders of its options:
a few passes."""

Listener = Callable[[str, Mapping[str, Any]], None]
"""Receives `asking` (model, benchmark, protocol, total, done), `answered` (count) after every write
of answers, `asked` (asked, done, truncated) at the end of a benchmark, and once, after a first
portion of each benchmark, `forecast` (seconds that the rest will take)."""


def evaluate(
    tasks: EvaluationTasks,
    *,
    resume: bool = False,
    listener: Listener = lambda event, values: None,
) -> dict[str, Any]:
    """Evaluate the base, and the adapters of a target against it.

    Parameters
    ----------
    resume : bool
        Continue the evaluation in `tasks.folder`; no item is asked twice.
    listener : callable, optional
        Receives progress events.

    Returns
    -------
    dict
        The content of `evaluation.json`: the layout of `grandrounds.study.evaluation.verification`;
        for protocol `all` an object with one such evaluation per protocol under `evaluations`.

    Raises
    ------
    GrandRoundsError
        If the base or an adapter cannot be used, or the folder contains another evaluation.
    KeyboardInterrupt
        On Ctrl-C; answers recorded so far are kept.
    """
    target = tasks.target
    spec = spec_of(target)
    tokenizer = tokenizer_of(target.base, target.chat)
    settings = settings_of(tasks, tokenizer)
    models = Models(spec, target.subjects)
    open_folder(tasks.folder, settings, resume)
    answers = ask_all(tasks, models, tokenizer, listener)
    evaluation = evaluation_of(tasks, settings, answers)
    write_flowertune_files(tasks, answers)
    write_json(tasks.folder / RESULT, evaluation)
    return evaluation


def spec_of(target: Target) -> BaseSpec:
    """Return the specification of a target's base."""
    return BaseSpec(target.base, target.quantization, target.dtype)


def settings_of(tasks: EvaluationTasks, tokenizer: Any) -> dict[str, Any]:
    """Return everything that determines the answers; it must be unchanged on resume."""
    target, questions, method = tasks.target, tasks.questions, tasks.method
    return {
        "base": target.base,
        "base fingerprint": base_fingerprint(target.base),
        "adapters": {adapter.name: adapter.sha256 for adapter in target.adapters},
        "protocols": list(tasks.protocols),
        "precision": _precision(bits_of(spec_of(target)), target.dtype),
        "quantization": target.quantization,
        "limit": questions.limit,
        **({"sample": METHOD} if questions.limit else {}),
        "permutations": method.permutations,
        **({"answer tokens": method.answer_tokens} if GREEDY in tasks.protocols else {}),
        "source": {task.benchmark.name: task.source for task in questions.tasks},
        "prompt hash": {
            task.benchmark.name: {
                protocol: _prompt_hash(protocol, task.benchmark, target.prompt_template, tokenizer)
                for protocol in tasks.protocols
                if task in tasks.asked_by(protocol)
            }
            for task in questions.tasks
        },
    }


def _prompt_hash(protocol: str, benchmark: Benchmark, prompt_template: str, tokenizer: Any) -> str:
    if protocol == "flowertune":
        return flowertune.prompt_hash(benchmark)
    return likelihood.prompt_hash(benchmark, prompt_template, tokenizer)


def _precision(quantization: int, dtype: str) -> str:
    """Return the format of the base's weights: a dtype, `nf4` or `int8`."""
    own = str(device_and_dtype(dtype)[1]).removeprefix("torch.")
    return {4: "nf4", 8: "int8"}.get(quantization, own)


# --- Asking ---------------------------------------------------------------------------------------


def ask_all(tasks: EvaluationTasks, models: Models, tokenizer: Any, listener: Listener) -> Answers:
    """Ask each model, one after the other, everything it has not answered yet.

    A first portion of each benchmark is asked before all else, and tells how long the rest takes.
    """
    examiner = _Examiner(tasks, models, tokenizer)
    works = [
        _Work(tasks, subject, task, protocol, AnswerFile(tasks.folder / answers_name(*names)))
        for subject in tasks.target.subjects
        for protocol in tasks.protocols
        for task in tasks.asked_by(protocol)
        for names in [(subject.name, task.benchmark.name, protocol)]
    ]
    before = [len(work.file.records) for work in works]
    try:
        listener("forecast", examiner.forecast(works, listener))
        for work, done in zip(works, before, strict=True):
            examiner.ask(work, done, listener)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"answers so far are kept in {tasks.folder}; continue with the same command and "
            "--resume"
        ) from None
    return {(w.subject.name, w.task.benchmark.name, w.protocol): w.file for w in works}


Asked = tuple[int, Item]
"""An order of the options (0: as published) and the item as published."""


def fills_passes(method: Method) -> bool:
    """Whether passes are filled by tokens, with all orders of an item's options in the same one.

    On a GPU, unless `--batch-size` asks for batches of so many prompts, an order at a time.
    """
    return method.batch_size is None and torch.cuda.is_available()


@dataclass(frozen=True)
class _Work:
    """One model, one benchmark, one protocol."""

    tasks: EvaluationTasks
    subject: Subject
    task: Task
    protocol: str
    file: AnswerFile

    @property
    def orders(self) -> int:
        """Number of orders of the options in which each item is asked."""
        shuffles = self.protocol == "likelihood" and likelihood.shows_letters(self.task.benchmark)
        return 1 + self.tasks.method.permutations * shuffles

    @property
    def total(self) -> int:
        """Number of answers."""
        return self.orders * len(self.task.items)

    def portions(self) -> Iterator[list[Asked]]:
        """Yield unanswered items with an order, in portions of similar length, longest first."""
        method, orders = self.tasks.method, range(self.orders)
        together, most = [orders], GPU_PORTION
        if not fills_passes(method):
            together = [range(order, order + 1) for order in orders]
            most = (method.batch_size or CPU_BATCH) * BATCHES_AT_ONCE
        by_length = sorted(self.task.items, key=_characters, reverse=True)
        done = self.file.records
        for chosen in together:
            for first in range(0, len(by_length), most):
                portion = [(o, i) for i in by_length[first : first + most] for o in chosen]
                if left := [
                    (order, item) for order, item in portion if (order, item.row) not in done
                ]:
                    yield left

    def left(self) -> float:
        """Return how much there is left to answer, in a measure of time within one protocol."""
        generated = 0 if self.protocol == "likelihood" else self.tasks.method.answer_tokens
        items = (item for portion in self.portions() for _, item in portion)
        return float(sum(_characters(item) + generated for item in items))


class _Examiner:
    """Asks the models."""

    def __init__(self, tasks: EvaluationTasks, models: Models, tokenizer: Any) -> None:
        self._tasks, self._models, self._tokenizer = tasks, models, tokenizer
        self._limits: dict[str, dict[int, int]] = {}
        self._examples: dict[int, TokenizedExample] = {}
        for task in tasks.asked_by("flowertune"):
            if "flowertune" in tasks.protocols:
                self._limits[task.benchmark.name] = answer_limits(task, tokenizer)
        for task in tasks.asked_by(GREEDY):
            self._examples = dict(held_out_examples(tasks, task, tokenizer))

    def forecast(self, works: Sequence[_Work], listener: Listener) -> dict[str, Any]:
        """Answer a first portion of each benchmark and protocol; return the seconds for the rest.

        The base is loaded, and its layout probed, before the clock starts.
        """
        seconds = 0.0
        groups: dict[tuple[str, str], list[_Work]] = {}
        for work in works:
            groups.setdefault((work.task.benchmark.name, work.protocol), []).append(work)
        for group in groups.values():
            first = next((work for work in group if len(work.file.records) < work.total), None)
            if first is None:
                continue
            listener("asking", {**self._about(first), "done": len(first.file.records)})
            with self._models.asked(first.subject) as model:
                proven_layout(model, 0)
                before, started = sum(work.left() for work in group), time.perf_counter()
                asked = next(iter(first.portions()))
                self._answer(first, model, asked)
                spent, after = time.perf_counter() - started, sum(work.left() for work in group)
            listener("answered", {"count": len(asked)})
            seconds += spent * after / (before - after)
        return {"seconds": seconds}

    def ask(self, work: _Work, before: int, listener: Listener) -> None:
        """Ask everything that is not answered yet, and report progress.

        Parameters
        ----------
        before : int
            Number of answers that an earlier evaluation left.
        """
        about = self._about(work)
        listener("asking", {**about, "done": len(work.file.records)})
        if len(work.file.records) < work.total:
            with self._models.asked(work.subject) as model:
                for portion in work.portions():
                    self._answer(work, model, portion)
                    listener("answered", {"count": len(portion)})
        truncated = sum(record["truncated"] for record in work.file.ordered())
        asked = work.total - before
        listener("asked", {**about, "done": before, "asked": asked, "truncated": truncated})

    def _about(self, work: _Work) -> dict[str, Any]:
        title = work.task.benchmark.title
        about = {"model": work.subject.name, "benchmark": title, "protocol": work.protocol}
        return {**about, "total": work.total}

    def _answer(self, work: _Work, model: Any, asked: Sequence[Asked]) -> None:
        """Ask one portion, and write the answers down."""
        items = [item for _, item in asked]
        if work.protocol == GREEDY:
            answered = self.write(model, work.task, items)
        elif work.protocol == "flowertune":
            answered = self.generate(model, work.task.benchmark, items)
        else:
            answered = self.compare(model, work.task.benchmark, asked)
        pairs = zip(asked, answered, strict=True)
        work.file.append({"order": order, **record} for (order, _), record in pairs)

    def write(self, model: Any, task: Task, items: list[Item]) -> list[Record]:
        """Return a model's own words for some items, and the loss of their reference answers."""
        method, template = self._tasks.method, self._tasks.target.prompt_template
        found = greedy.answer_items(
            model,
            self._tokenizer,
            [(item, self._examples[item.row]) for item in items],
            end_token_ids(self._tokenizer, template),
            greedy.answer_limit(task, self._tokenizer, template, method.answer_tokens),
            method.batch_size,
        )
        return [
            {"row": item.row, **asdict(answer)} for item, answer in zip(items, found, strict=True)
        ]

    def compare(self, model: Any, benchmark: Benchmark, asked: Sequence[Asked]) -> list[Record]:
        """Return the likelihoods of the options of some items, each in one of their orders."""
        items = [
            likelihood.shuffled(benchmark, [item], order)[0] if order else item
            for order, item in asked
        ]
        found = likelihood.answer_items(
            model,
            self._tokenizer,
            benchmark,
            items,
            batch_size=self._tasks.method.batch_size,
            prompt_template=self._tasks.target.prompt_template,
        )
        return [
            {"row": item.row, **asdict(answer)} for item, answer in zip(items, found, strict=True)
        ]

    def generate(self, model: Any, benchmark: Benchmark, items: list[Item]) -> list[Record]:
        """Return a model's outputs by FlowerTune's protocol.

        A prompt that leaves no room for its answer in the context is left-truncated.
        """
        tokenizer, limits = self._tokenizer, self._limits[benchmark.name]
        texts = [flowertune.model_input(flowertune.build_prompt(benchmark, item)) for item in items]
        prompts = tokenizer(texts)["input_ids"]
        context = likelihood.context_length(model.config)
        rooms = [max(context - limits[item.row], 1) for item in items]
        outputs = generate_greedily(
            model,
            [ids[-room:] for ids, room in zip(prompts, rooms, strict=True)],
            [limits[item.row] for item in items],
            stop_tokens(model, tokenizer),
            batch_size=self._tasks.method.batch_size,
        )
        return [
            {
                "row": item.row,
                "output": tokenizer.decode(output, skip_special_tokens=True),
                "truncated": len(ids) > room,
            }
            for item, output, ids, room in zip(items, outputs, prompts, rooms, strict=True)
        ]


def _characters(item: Item) -> int:
    texts = (item.question, *item.context, *item.options)
    return sum(map(len, texts))


def held_out_examples(
    tasks: EvaluationTasks, task: Task, tokenizer: Any
) -> Iterator[tuple[int, TokenizedExample]]:
    """Yield row and tokens of each held-out row, as the run tokenised it."""
    target = tasks.target
    seq_length = target.run.config.train.seq_length if target.run else 0
    found = greedy.tokenized(task.items, tokenizer, target.prompt_template, seq_length)
    for item, example in zip(task.items, found, strict=True):
        if example is None:
            raise DataError(
                f"held-out row {item.row} does not fit the run's train.seq-length of {seq_length} "
                "with the tokenizer of this base. Use the run's own base."
            )
        yield item.row, example


def answer_limits(task: Task, tokenizer: Any) -> dict[int, int]:
    """Return row → token limit: FlowerTune's rule over its own batches, in the source's order."""
    limits: dict[int, int] = {}
    for first in range(0, len(task.items), FLOWERTUNE_BATCH):
        batch = task.items[first : first + FLOWERTUNE_BATCH]
        golds = [flowertune.gold_text(item) for item in batch]
        most = flowertune.max_new_tokens(golds, tokenizer)
        limits |= {item.row: most for item in batch}
    return limits
