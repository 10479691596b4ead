r"""Protocol `flowertune`: Flower's medical evaluation to the letter, for comparison with its table.

The facts are those of
https://github.com/adap/flower/tree/62eb72ab773c255052e0c672fc1ac9bfa0c8a06a/benchmarks/flowertune-llm/evaluation/medical
(`benchmarks.py`: instructions, prompts, token limit, accuracy; there `utils.py`: answer extraction
and result files, commit c98e1e437e6cede6b418988c73b66f4289d0a351 of the same folder).

Each item is asked by itself, decoded greedily with the tokenizer's special tokens, and the output
is decoded without them. Its habits are kept, and have consequences that a reader must know:

- `max_new_tokens` looks at the first gold answer of a batch only: what a model may say depends on
  the batch size and on its neighbours, and an answer of more tokens than that is cut off.
- An output counts by its first letter: `Because` is B, `According` is A.
- E is taken as an answer, also where there are four options, and `maybe` is right only if the
  output is exactly that word, without a blank or a full stop (case aside).
- The prompt is wrapped in `<|im_start|>` marks whatever the model's own chat template says.
- An output belongs to every row with the same prompt (the published data hold no two such rows).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grandrounds.data.files import json_records
from grandrounds.errors import DataError
from grandrounds.study.evaluation.benchmarks import Benchmark, Item

AnswerType = Literal["boolean", "mcq"]
"""`boolean`: yes, no or maybe. `mcq`: a letter."""

WORDS = ("yes", "no", "maybe")
"""The answers of type `boolean`."""

ACCEPTED = frozenset(("a", "b", "c", "d", "e", "yes", "no"))
"""What the rule takes as an answer once an output is cleaned; anything else stays as it was."""

OTHER = "other"
"""The key of `Score.spread` for whatever is no allowed answer."""


# --- Prompts --------------------------------------------------------------------------------------


def answer_type(labels: Sequence[str]) -> AnswerType:
    """Return how outputs are read where these are the allowed answers."""
    return "boolean" if set(labels) <= set(WORDS) else "mcq"


def build_prompt(benchmark: Benchmark, item: Item) -> str:
    """Return the prompt as result files show it."""
    if answer_type(item.labels) == "boolean":
        body = "\n".join(item.context) + f"\n{item.question}"
    else:
        question = item.question if item.question.endswith(("?", ".")) else f"{item.question}?"
        options = "\n".join(
            f"{label}. {option}" for label, option in zip(item.labels, item.options, strict=True)
        )
        body = f"Question: {question}\n\nOptions:\n{options}"
    return f"{benchmark.instruction}\n{body}\nThe answer is:\n"


def model_input(prompt: str) -> str:
    """Return the text that the model is given for a prompt, before tokenisation."""
    return f"<|im_start|>question\n{prompt}<|im_end|>\n<|im_start|>answer\n"


def gold_text(item: Item) -> str:
    """Return the right answer as result files show it: its label."""
    return item.labels[item.gold_index]


def prompt_hash(benchmark: Benchmark) -> str:
    """Return 16 hex digits that change whenever a prompt of the benchmark changes."""
    labels = benchmark.labels
    options = tuple(f"\x00option {label}\x00" for label in labels)
    context = ("\x00one\x00", "\x00two\x00")
    probes = [
        Item(1, f"\x00question\x00{end}", context, options, labels, gold_index=0, group="")
        for end in ("", "?", ".")
    ]
    text = "\x00".join(model_input(build_prompt(benchmark, probe)) for probe in probes)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def max_new_tokens(batch_golds: Sequence[str], tokenizer: Any) -> int:
    """Return how many tokens the rule lets a batch answer: those of its first gold answer.

    The limit holds for the whole batch, so the order of the items and the batch size (16 unless
    told otherwise) decide what can be said: after `yes` of one token no `maybe` of two is possible.
    """
    return len(tokenizer(batch_golds[0], add_special_tokens=False)["input_ids"])


# --- Answers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generation:
    """One line of a result file."""

    prompt: str
    """What was asked, from `build_prompt`."""
    gold: str
    """The right answer, from `gold_text`."""
    output: str
    """What the model said."""


@dataclass(frozen=True)
class Score:
    """What recorded outputs amount to."""

    correct: int
    """Outputs that count as right."""
    n: int
    """Outputs."""
    format_failures: int
    """Outputs that are no allowed answer: nothing the rule takes, or a longer text of which it
    takes the first letter."""
    first_letter_answers: int
    """Those among `format_failures` that count as an allowed answer by their first letter."""
    spread: dict[str, int]
    """How often each allowed answer was given, as the rule reads it, and `other`; sums to `n`."""
    commonest_failures: dict[str, int]
    """The five commonest outputs among `format_failures`."""

    @property
    def accuracy(self) -> float:
        """`correct / n`."""
        return self.correct / self.n


def read_answer(output: str, gold: str, kind: AnswerType) -> tuple[str, str]:
    r"""Return what the rule compares: the answer it reads from an output, and the gold answer.

    Parameters
    ----------
    output, gold : str
        In lower case, as `rescore` gives them.
    kind : str
        An `AnswerType`.

    Returns
    -------
    tuple of str
        One of `ACCEPTED` and the gold answer; or both as they came, if the output holds none. Of a
        text with `\n##` only the line after the first such mark is read; of a gold answer with
        `###` only what stands between `answer is:` and it.
    """
    answer = gold
    if "###" in gold:
        _, mark, rest = gold.partition("answer is:")
        if not mark:
            return output, gold
        answer = rest.split("answer is:")[0].split("###")[0].strip()
    cleaned = _cleaned(output)
    if kind == "mcq":
        cleaned = cleaned[:1]
    else:
        for double, single in (
            ("yesyes", "yes"),
            ("nono", "no"),
            ("yesno", "yes"),
            ("noyes", "no"),
        ):
            if double in cleaned:
                cleaned = cleaned.replace(double, single)
                break
    return (cleaned, answer) if cleaned in ACCEPTED else (output, gold)


def _cleaned(output: str) -> str:
    """Return letters and digits of the part that counts, with single blanks between."""
    if "\n##" in output:
        output = output.split("\n##")[1].split("\n")[0].strip().lower()
    return re.sub(" +", " ", re.sub(r"[^a-zA-Z0-9]", " ", output).strip())


def rescore(records: Sequence[Generation], labels: Sequence[str] | None = None) -> Score:
    """Score recorded outputs by the rule.

    Parameters
    ----------
    records : sequence of Generation
        At least one.
    labels : sequence of str, optional
        The allowed answers. Left out, they are told by the gold answers: yes, no and maybe, or the
        letters from A to the last one that is right anywhere, D at least.

    Raises
    ------
    DataError
        If there is nothing to score, or a gold answer is no allowed answer.
    """
    if not records:
        raise DataError("there are no recorded answers to score")
    labels = labels or _labels_of(records)
    kind = answer_type(labels)
    allowed = {label.lower(): label for label in labels}
    spread = Counter(dict.fromkeys((*labels, OTHER), 0))
    failures: Counter[str] = Counter()
    correct = first_letter_answers = 0
    for row, record in enumerate(records, 1):
        output, gold = record.output.lower(), record.gold.lower()
        predicted, compared = read_answer(output, gold, kind)
        if "###" not in gold and gold not in allowed:
            raise DataError(
                f"row {row}: the gold answer is {record.gold!r}; allowed is one of "
                f"{', '.join(labels)}. These are recorded answers of another benchmark."
            )
        correct += predicted == compared
        spread[allowed.get(predicted, OTHER)] += 1
        cut = kind == "mcq" and len(_cleaned(output)) > 1
        if predicted not in allowed or cut:
            failures[record.output] += 1
            first_letter_answers += predicted in allowed
    return Score(
        correct=correct,
        n=len(records),
        format_failures=failures.total(),
        first_letter_answers=first_letter_answers,
        spread=dict(spread),
        commonest_failures=dict(failures.most_common(5)),
    )


def _labels_of(records: Iterable[Generation]) -> tuple[str, ...]:
    """Return the allowed answers, as far as gold answers tell them."""
    golds = {record.gold.lower() for record in records}
    if golds <= set(WORDS):
        return WORDS
    last = max({gold for gold in golds if gold in "abcde" and len(gold) == 1} | {"d"})
    return tuple("ABCDE"[: "abcde".index(last) + 1])


# --- Result files ---------------------------------------------------------------------------------


def result_names(benchmark: str, run: str) -> tuple[str, str]:
    """Return the file names of the recorded answers and of the accuracy."""
    return f"generation_{benchmark}_{run}.jsonl", f"acc_{benchmark}_{run}.txt"


def accuracy_line(score: Score) -> str:
    """Return the text of an accuracy file: a fraction, a full stop and a blank, no line break."""
    return f"Accuracy: {score.accuracy}. "


def write_accuracy(path: Path, score: Score) -> None:
    """Write an accuracy file."""
    path.write_text(accuracy_line(score), encoding="utf-8")


def write_generations(path: Path, records: Iterable[Generation]) -> None:
    r"""Write recorded answers as pandas does: one JSON array on one line, ASCII only, `/` as `\/`.

    A name that ends in `.gz` is compressed; the same records give the same bytes.
    """
    rows = [{"prompt": r.prompt, "gold": r.gold, "output": r.output} for r in records]
    # Neither JSON's syntax nor its other escapes hold a slash, so all of them stand in texts.
    text = json.dumps(rows, separators=(",", ":")).replace("/", "\\/")
    content = text.encode("ascii")
    path.write_bytes(gzip.compress(content, mtime=0) if path.name.endswith(".gz") else content)


def read_generations(path: Path) -> tuple[Generation, ...]:
    """Read recorded answers: one JSON array, or one object per line; compressed if named `.gz`.

    Raises
    ------
    DataError
        If the file cannot be read, or a row lacks a text; the row is named.
    """
    try:
        content = path.read_bytes()
        if path.name.endswith(".gz"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: the recorded answers cannot be read ({error}). Give a file such as "
            f"{result_names('pubmedqa', 'run')[0]}."
        ) from error
    records, unit = json_records(content, str(path))
    return tuple(
        Generation(*(_text(values, key, f"{path}, {unit} {place}") for key in _KEYS))
        for place, values in records
    )


_KEYS = ("prompt", "gold", "output")


def _text(values: dict[str, Any], key: str, place: str) -> str:
    value = values.get(key)
    if not isinstance(value, str):
        raise DataError(
            f"{place}: {key!r} is {value!r}; recorded answers have the texts {', '.join(_KEYS)}."
        )
    return value
