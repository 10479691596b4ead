"""Runs benchmarks on a base and its adapters, and records answers and results.

    from grandrounds.study.evaluation.benchmarks import load_questions
    from grandrounds.study.evaluation.runner import evaluate
    from grandrounds.study.evaluation.tasks import EvaluationTasks, find_target

    target = find_target("runs/first")
    evaluate(EvaluationTasks(target, load_questions(target.benchmarks)))

Answers are written every few batches; a stopped evaluation can be resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

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
from grandrounds.study.evaluation.benchmarks import Benchmark, Item, Task
from grandrounds.study.evaluation.models import Models
from grandrounds.study.evaluation.results import Answers, evaluation_of, write_flowertune_files
from grandrounds.study.evaluation.tasks import EvaluationTasks, Subject

FLOWERTUNE_BATCH = 16
"""Items per batch in FlowerTune's rule for the answer length, whatever our own batch size."""

BATCHES_AT_ONCE = 4
"""Batches per write of answers. Prefixes shared by prompts are computed once for all of them; with
one batch per write, an evaluation takes up to a third longer."""

Listener = Callable[[str, Mapping[str, Any]], None]
"""Receives `asking` (model, benchmark, protocol, total, done), `answered` (count) after every write
of answers, and `asked` (asked, truncated) at the end of a benchmark."""


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
    spec = BaseSpec(target.base, target.quantization, target.dtype)
    tokenizer = load_tokenizer(target.base)
    settings = settings_of(tasks, tokenizer)
    models = Models(spec, target.subjects)
    open_folder(tasks.folder, settings, resume)
    answers = ask_all(tasks, models, tokenizer, listener)
    evaluation = evaluation_of(tasks, settings, answers)
    write_flowertune_files(tasks, answers)
    write_json(tasks.folder / RESULT, evaluation)
    return evaluation


def settings_of(tasks: EvaluationTasks, tokenizer: Any) -> dict[str, Any]:
    """Return everything that determines the answers; it must be unchanged on resume."""
    target, questions, method = tasks.target, tasks.questions, tasks.method
    return {
        "base": target.base,
        "base fingerprint": base_fingerprint(target.base),
        "adapters": {adapter.name: adapter.sha256 for adapter in target.adapters},
        "protocols": list(method.protocols),
        "precision": _precision(target.quantization, target.dtype),
        "quantization": target.quantization,
        "limit": questions.limit,
        "permutations": method.permutations,
        "source": {task.benchmark.name: task.source for task in questions.tasks},
        "prompt hash": {
            task.benchmark.name: {
                protocol: _prompt_hash(protocol, task.benchmark, target.prompt_template, tokenizer)
                for protocol in method.protocols
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
    """Ask each model, one after the other, everything it has not answered yet."""
    answers: dict[tuple[str, str, str], AnswerFile] = {}
    try:
        for subject in tasks.target.subjects:
            for protocol in tasks.method.protocols:
                for task in tasks.questions.tasks:
                    key = (subject.name, task.benchmark.name, protocol)
                    answers[key] = AnswerFile(tasks.folder / answers_name(*key))
                    work = _Work(tasks, subject, task, protocol, answers[key])
                    work.ask(models, tokenizer, listener)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"answers so far are kept in {tasks.folder}; continue with the same command and "
            "--resume"
        ) from None
    return answers


@dataclass(frozen=True)
class _Work:
    """One model, one benchmark, one protocol."""

    tasks: EvaluationTasks
    subject: Subject
    task: Task
    protocol: str
    file: AnswerFile

    def orders(self) -> int:
        """Return the number of orders of the options in which each item is asked."""
        shuffles = self.protocol == "likelihood" and likelihood.shows_letters(self.task.benchmark)
        return 1 + self.tasks.method.permutations * shuffles

    def ask(self, models: Models, tokenizer: Any, listener: Listener) -> None:
        """Ask everything that is not answered yet, and report progress."""
        total = self.orders() * len(self.task.items)
        done = len(self.file.records)
        about: dict[str, Any] = {"model": self.subject.name, "benchmark": self.task.benchmark.title}
        about |= {"protocol": self.protocol, "total": total, "done": done}
        listener("asking", about)
        if done < total:
            limits = answer_limits(self.task, tokenizer) if self.protocol == "flowertune" else {}
            with models.asked(self.subject) as model:
                for order, items in self.portions():
                    if self.protocol == "flowertune":
                        answered = self.generate(model, tokenizer, items, limits)
                    else:
                        answered = self.compare(model, tokenizer, order, items)
                    self.file.append({"order": order, **record} for record in answered)
                    listener("answered", {"count": len(items)})
        truncated = sum(record["truncated"] for record in self.file.ordered())
        listener("asked", {**about, "asked": total - done, "truncated": truncated})

    def portions(self) -> Iterator[tuple[int, list[Item]]]:
        """Yield unanswered items with their order, in portions of similar length, longest first."""
        most = self.tasks.method.batch_size * BATCHES_AT_ONCE
        by_length = sorted(self.task.items, key=_characters, reverse=True)
        for order in range(self.orders()):
            for first in range(0, len(by_length), most):
                portion = by_length[first : first + most]
                if left := [i for i in portion if (order, i.row) not in self.file.records]:
                    yield order, left

    def compare(self, model: Any, tokenizer: Any, order: int, items: list[Item]) -> list[Record]:
        """Return the likelihoods of the options of some items, in one of their orders."""
        benchmark = self.task.benchmark
        found = likelihood.answer_items(
            model,
            tokenizer,
            benchmark,
            likelihood.shuffled(benchmark, items, order) if order else items,
            batch_size=self.tasks.method.batch_size,
            prompt_template=self.tasks.target.prompt_template,
        )
        return [
            {"row": item.row, **asdict(answer)} for item, answer in zip(items, found, strict=True)
        ]

    def generate(
        self, model: Any, tokenizer: Any, items: list[Item], limits: Mapping[int, int]
    ) -> list[Record]:
        """Return a model's outputs by FlowerTune's protocol, given each row's token limit.

        A prompt that leaves no room for its answer in the context is left-truncated.
        """
        texts = [
            flowertune.model_input(flowertune.build_prompt(self.task.benchmark, item))
            for item in items
        ]
        prompts = tokenizer(texts)["input_ids"]
        context = likelihood.context_length(model.config)
        rooms = [max(context - limits[item.row], 1) for item in items]
        outputs = generate_greedily(
            model,
            [ids[-room:] for ids, room in zip(prompts, rooms, strict=True)],
            [limits[item.row] for item in items],
            stop_tokens(model, tokenizer),
            batch_size=self.tasks.method.batch_size,
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


def answer_limits(task: Task, tokenizer: Any) -> dict[int, int]:
    """Return row → token limit: FlowerTune's rule over its own batches, in the source's order."""
    limits: dict[int, int] = {}
    for first in range(0, len(task.items), FLOWERTUNE_BATCH):
        batch = task.items[first : first + FLOWERTUNE_BATCH]
        golds = [flowertune.gold_text(item) for item in batch]
        most = flowertune.max_new_tokens(golds, tokenizer)
        limits |= {item.row: most for item in batch}
    return limits


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the IDs of the tokens that end an answer, as in transformers' `generate`."""
    given = getattr(model.generation_config, "eos_token_id", None)
    if given is None:
        given = tokenizer.eos_token_id
    return list(given) if isinstance(given, list | tuple) else [given]
