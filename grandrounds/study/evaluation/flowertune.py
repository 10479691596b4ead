r"""Protocol `flowertune`: an exact port of Flower's medical evaluation, comparable with its table.

Ported from
https://github.com/adap/flower/tree/62eb72ab773c255052e0c672fc1ac9bfa0c8a06a/benchmarks/flowertune-llm/evaluation/medical
(`benchmarks.py`: instructions, prompts, token limit, accuracy; its `utils.py`: answer extraction
and result files, commit c98e1e437e6cede6b418988c73b66f4289d0a351 of the same folder).

Items are prompted one by one and decoded greedily, with the tokenizer's special tokens in the
prompt and without them in the output. The original's quirks are kept, with these consequences:

- `max_new_tokens` depends on the first gold answer of a batch only: the maximum length of an answer
  depends on the batch size and on its neighbours, and a longer answer is cut off.
- An output is scored by its first letter: `Because` is B, `According` is A.
- E is accepted as an answer even where there are four options, and `maybe` is correct only if the
  output is exactly that word, without spaces or punctuation (case-insensitive).
- The prompt is wrapped in `<|im_start|>` tokens whatever the model's own chat template is.
- An output belongs to every row with the same prompt (the published data have no duplicates).
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

from grandrounds import storage
from grandrounds.data.files import json_records
from grandrounds.errors import DataError, first_line
from grandrounds.study.evaluation.benchmarks import Benchmark, Item, placeholder_item

AnswerType = Literal["boolean", "mcq"]
"""`boolean`: yes, no or maybe. `mcq`: a letter."""

WORDS = ("yes", "no", "maybe")
"""Answers of type `boolean`."""

ACCEPTED = frozenset(("a", "b", "c", "d", "e", "yes", "no"))
"""Cleaned outputs that the scoring rule accepts; any other output is compared unchanged."""

OTHER = "other"
"""Key of `Score.spread` for outputs that are none of the allowed answers."""


# --- Prompts --------------------------------------------------------------------------------------


def answer_type(labels: Sequence[str]) -> AnswerType:
    """Return how outputs are parsed, given the allowed answers."""
    return "boolean" if set(labels) <= set(WORDS) else "mcq"


def build_prompt(benchmark: Benchmark, item: Item) -> str:
    """Return the prompt of an item, as in result files."""
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
    """Return the model's input text for a prompt, before tokenisation."""
    return f"<|im_start|>question\n{prompt}<|im_end|>\n<|im_start|>answer\n"


def gold_text(item: Item) -> str:
    """Return the label of the correct option, as in result files."""
    return item.labels[item.gold_index]


def prompt_hash(benchmark: Benchmark) -> str:
    """Return 16 hex digits that change with any change to the benchmark's prompts."""
    probes = [placeholder_item(benchmark, f"\x00question\x00{end}") for end in ("", "?", ".")]
    text = "\x00".join(model_input(build_prompt(benchmark, probe)) for probe in probes)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def max_new_tokens(batch_golds: Sequence[str], tokenizer: Any) -> int:
    """Return the token limit of a batch: the length of its first gold answer.

    The limit applies to the whole batch, so the order of items and the batch size (16 by default)
    determine which answers are possible: after a `yes` of one token, a `maybe` of two is not.
    """
    return len(tokenizer(batch_golds[0], add_special_tokens=False)["input_ids"])


# --- Answers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generation:
    """One line of a result file."""

    prompt: str
    """From `build_prompt`."""
    gold: str
    """Label of the correct option, from `gold_text`."""
    output: str
    """The model's output."""


@dataclass(frozen=True)
class Score:
    """Result of scoring recorded outputs."""

    right: tuple[bool, ...]
    """Whether each output is scored as correct."""
    format_failures: int
    """Outputs that are no allowed answer: rejected by the rule, or longer texts of which it reads
    the first letter."""
    first_letter_answers: int
    """Those of `format_failures` that are scored as an allowed answer by their first letter."""
    spread: dict[str, int]
    """Number of outputs read as each allowed answer, and as `other`; sums to `n`."""
    commonest_failures: dict[str, int]
    """The five most frequent outputs of `format_failures`."""

    @property
    def n(self) -> int:
        """Number of outputs."""
        return len(self.right)

    @property
    def correct(self) -> int:
        """Number of correct outputs."""
        return sum(self.right)

    @property
    def accuracy(self) -> float:
        """`correct / n`."""
        return self.correct / self.n


def read_answer(output: str, gold: str, kind: AnswerType) -> tuple[str, str]:
    r"""Return the two strings that the scoring rule compares: extracted answer and gold answer.

    Parameters
    ----------
    output, gold : str
        In lower case.

    Returns
    -------
    tuple of str
        One of `ACCEPTED` and the gold answer; or both unchanged if the output has no accepted
        answer. Of an output with `\n##`, only the line after the first such mark is read; of a gold
        answer with `###`, only the part between `answer is:` and that mark.
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
    """Return the words of the part that is scored, without punctuation."""
    if "\n##" in output:
        output = output.split("\n##")[1].split("\n")[0].strip().lower()
    return re.sub(" +", " ", re.sub(r"[^a-zA-Z0-9]", " ", output).strip())


def rescore(records: Sequence[Generation], labels: Sequence[str] | None = None) -> Score:
    """Score recorded outputs.

    Parameters
    ----------
    labels : sequence of str, optional
        The allowed answers. By default inferred from the gold answers: yes, no and maybe, or the
        letters from A to the last gold answer, at least to D.

    Raises
    ------
    DataError
        If there are no records, or a gold answer is not allowed.
    """
    if not records:
        raise DataError("there are no recorded answers to score")
    labels = labels or _labels_of(records)
    kind = answer_type(labels)
    allowed = {label.lower(): label for label in labels}
    spread = Counter(dict.fromkeys((*labels, OTHER), 0))
    failures: Counter[str] = Counter()
    right: list[bool] = []
    first_letter_answers = 0
    for row, record in enumerate(records, 1):
        output, gold = record.output.lower(), record.gold.lower()
        predicted, compared = read_answer(output, gold, kind)
        if "###" not in gold and gold not in allowed:
            raise DataError(
                f"row {row}: the gold answer is {record.gold!r}; allowed is one of "
                f"{', '.join(labels)}. The answers were recorded on another benchmark."
            )
        right.append(predicted == compared)
        spread[allowed.get(predicted, OTHER)] += 1
        cut = kind == "mcq" and len(_cleaned(output)) > 1
        if predicted not in allowed or cut:
            failures[record.output] += 1
            first_letter_answers += predicted in allowed
    return Score(
        right=tuple(right),
        format_failures=failures.total(),
        first_letter_answers=first_letter_answers,
        spread=dict(spread),
        commonest_failures=dict(failures.most_common(5)),
    )


def _labels_of(records: Iterable[Generation]) -> tuple[str, ...]:
    """Infer the allowed answers from the gold answers."""
    golds = {record.gold.lower() for record in records}
    if golds <= set(WORDS):
        return WORDS
    last = max({gold for gold in golds if gold in "abcde" and len(gold) == 1} | {"d"})
    return tuple("ABCDE"[: "abcde".index(last) + 1])


# --- Result files ---------------------------------------------------------------------------------


def result_names(benchmark: str, run: str) -> tuple[str, str]:
    """Return the names of the generation file and of the accuracy file."""
    return f"generation_{benchmark}_{run}.jsonl", f"acc_{benchmark}_{run}.txt"


def accuracy_line(score: Score) -> str:
    """Return the content of an accuracy file: it ends in a full stop and a space."""
    return f"Accuracy: {score.accuracy}. "


def write_accuracy(path: Path, score: Score) -> None:
    """Write an accuracy file."""
    storage.write_text(path, accuracy_line(score))


def write_generations(path: Path, records: Iterable[Generation]) -> None:
    r"""Write generations in pandas' format: one JSON array on one line, ASCII only, `/` as `\/`.

    A path ending in `.gz` is compressed, reproducibly.
    """
    rows = [{"prompt": r.prompt, "gold": r.gold, "output": r.output} for r in records]
    # JSON's syntax and its other escapes have no slash, so every slash is inside a string.
    text = json.dumps(rows, separators=(",", ":")).replace("/", "\\/")
    content = text.encode("ascii")
    packed = gzip.compress(content, mtime=0) if path.name.endswith(".gz") else content
    storage.write_bytes(path, packed)


def read_generations(path: Path) -> tuple[Generation, ...]:
    """Read generations: one JSON array or one object per line; gzipped if the path ends in `.gz`.

    Raises
    ------
    DataError
        If the file cannot be read, or a row lacks a field.
    """
    try:
        content = path.read_bytes()
        if path.name.endswith(".gz"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: the recorded answers cannot be read ({first_line(error)}). Expected a file "
            f"such as {result_names('pubmedqa', 'run')[0]}."
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
            f"{place}: {key!r} is {value!r}; recorded answers have the strings {', '.join(_KEYS)}."
        )
    return value
