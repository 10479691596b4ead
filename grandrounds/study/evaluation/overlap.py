"""Finds benchmark questions that occur in training data, verbatim or as near-duplicates."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grandrounds.data.rows import Joined
from grandrounds.data.sources import load_rows
from grandrounds.study.evaluation.benchmarks import Questions

THRESHOLD = 0.8
"""Minimum Jaccard similarity of a near-duplicate."""

NGRAM = 5
"""Words per shingle of a long question."""

_PERMUTATIONS = 128
"""Hash functions of a MinHash."""

_SEED = 1
_MISS_PROBABILITY = 1e-3
_WORDS_PER_SHINGLE_WORD = 4
_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")  # soft hyphen, zero-width characters
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Overlap:
    """One benchmark question found in one training text."""

    item: int
    """Index of the benchmark question."""
    row: int
    """Index of the training text."""
    kind: Literal["exact", "near"]
    """`exact`: after normalisation, the training text equals or contains the question."""
    similarity: float
    """Jaccard similarity of the two whole texts; low if the training text is much longer."""


def find_overlap(
    benchmark_questions: Sequence[str], training_texts: Sequence[str]
) -> list[Overlap]:
    """Return every benchmark question that occurs in a training text, by item, then by row.

    Texts are normalised: Unicode NFKC, case folding, and one space for every run of punctuation and
    whitespace. Numbers and words are kept, symbols such as `<` are not.

    Exact: the normalised texts are equal, or the training text contains the question as whole
    words. Questions of fewer than `NGRAM` words must be the whole text: "Pneumonia" occurs in
    thousands of texts without being a leak.

    Near: the sets of word n-grams (shingles) of the two have a Jaccard similarity of at least
    `THRESHOLD` (Broder 1997, "On the resemblance and containment of documents", section 2).
    Candidates come from MinHash with banding (Leskovec, Rajaraman and Ullman, "Mining of Massive
    Datasets", section 3.4) and are then compared exactly: no pair below the threshold is reported,
    and a pair at or above it is missed with probability at most 0.001 (for ideal hash functions).

    A question of w words has shingles of min(`NGRAM`, max(1, w // 4)) words, and so has a text
    compared with it. One word replaced in the middle is detected from 49 words on; in a short
    question it usually makes another question, and is detected only near an end. Texts in languages
    without spaces between words match only if they are equal.

    Because the near comparison is of whole texts, pass the questions and answers of a training set
    as separate texts, `[*questions, *answers]`: a question joined to its long answer is found
    verbatim or not at all.

    Parameters
    ----------
    benchmark_questions : sequence of str
        Questions without their options. One without any word overlaps with nothing.
    training_texts : sequence of str
        Texts that the model was trained on.
    """
    items = [_words(question) for question in benchmark_questions]
    exact = _ExactIndex(items)
    near = _near_indexes(items)
    found = []
    for row, text in enumerate(training_texts):
        words = _words(text)
        matches: dict[int, tuple[Literal["exact", "near"], float]] = {}
        for index in near:
            matches |= {item: ("near", similarity) for item, similarity in index.find(words)}
        for item in exact.find(words):
            size = _shingle_size(len(items[item]))
            similarity = _jaccard(_shingles(items[item], size), _shingles(words, size))
            matches[item] = ("exact", similarity)
        found += [Overlap(item, row, *match) for item, match in matches.items()]
    return sorted(found, key=lambda overlap: (overlap.item, overlap.row))


def _words(text: str) -> list[str]:
    """Return the normalised words of a text."""
    visible = _INVISIBLE.sub("", text)
    return _WORD.findall(unicodedata.normalize("NFKC", visible).casefold())


def _shingle_size(word_count: int) -> int:
    """Return the words per shingle: fewer for a short text, so that it has several shingles."""
    return min(NGRAM, max(1, word_count // _WORDS_PER_SHINGLE_WORD))


def _shingles(words: Sequence[str], size: int) -> set[str]:
    """Return the distinct runs of `size` words; none if there are fewer words."""
    return {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}


def _jaccard(one: set[str], other: set[str]) -> float:
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


class _ExactIndex:
    """Finds the questions that a text contains, by their first `NGRAM` words."""

    def __init__(self, items: Sequence[Sequence[str]]) -> None:
        self._texts = [" ".join(words) for words in items]
        self._whole: defaultdict[str, list[int]] = defaultdict(list)
        self._by_start: defaultdict[str, list[int]] = defaultdict(list)
        for item, words in enumerate(items):
            if len(words) >= NGRAM:
                self._by_start[" ".join(words[:NGRAM])].append(item)
            elif words:
                self._whole[self._texts[item]].append(item)

    def find(self, words: Sequence[str]) -> Iterator[int]:
        """Yield the items that equal this text or that it contains."""
        text = " ".join(words)
        yield from self._whole.get(text, ())
        padded = f" {text} "
        for start in self._by_start.keys() & _shingles(words, NGRAM):
            yield from (i for i in self._by_start[start] if f" {self._texts[i]} " in padded)


class _NearIndex:
    """Finds near-duplicates among the questions that share one shingle size."""

    def __init__(self, shingles: dict[int, set[str]], size: int) -> None:
        from datasketch import MinHash, MinHashLSH

        self._shingles = shingles
        self._size = size
        self._fewest = min(map(len, shingles.values()))
        self._most = max(map(len, shingles.values()))
        self._empty = MinHash(num_perm=_PERMUTATIONS, seed=_SEED)
        self._index = MinHashLSH(num_perm=_PERMUTATIONS, params=_bands())
        for item, grams in shingles.items():
            self._index.insert(item, self._sketch(grams))

    def find(self, words: Sequence[str]) -> Iterator[tuple[int, float]]:
        """Yield the items similar to this text, with their similarity."""
        # The similarity of two sets is at most the smaller size divided by the larger.
        if (len(words) - self._size + 1) / self._fewest < THRESHOLD:
            return
        grams = _shingles(words, self._size)
        if min(len(grams) / self._fewest, self._most / len(grams)) < THRESHOLD:
            return
        for item in self._index.query(self._sketch(grams)):
            similarity = _jaccard(self._shingles[item], grams)
            if similarity >= THRESHOLD:
                yield item, similarity

    def _sketch(self, grams: set[str]) -> Any:
        sketch = self._empty.copy()
        sketch.update_batch([gram.encode() for gram in grams])
        return sketch


def _near_indexes(items: Sequence[Sequence[str]]) -> list[_NearIndex]:
    """Return one index for each shingle size among the items."""
    by_size: defaultdict[int, dict[int, set[str]]] = defaultdict(dict)
    for item, words in enumerate(items):
        if words:
            size = _shingle_size(len(words))
            by_size[size][item] = _shingles(words, size)
    return [_NearIndex(shingles, size) for size, shingles in sorted(by_size.items())]


def _bands() -> tuple[int, int]:
    """Return bands b and rows r of the MinHash index.

    Two sets of similarity s share a band with probability s^r each, so the index misses them with
    probability (1 - s^r)^b (Mining of Massive Datasets, section 3.4.2). Of the choices for which
    this is at most 0.001 at the threshold, the one with most rows gives the fewest candidates.
    """
    choices = ((_PERMUTATIONS // rows, rows) for rows in range(_PERMUTATIONS // 2, 0, -1))
    return next((b, r) for b, r in choices if (1 - THRESHOLD**r) ** b <= _MISS_PROBABILITY)


def check_overlap(
    training: str,
    questions: Questions,
    *,
    question_column: str = "input",
    answer_column: str = "output",
) -> dict[str, Any]:
    """Search training data for the questions of benchmarks.

    Parameters
    ----------
    training : str
        Any source of `grandrounds.data.sources.load_rows`: a local file, a hub name or `formulary`.
    question_column, answer_column : str
        Columns of the training data, searched separately.

    Returns
    -------
    dict
        `training`, `rows`, `threshold`, and `benchmarks`: name → n, items (with an overlap of
        either kind), exact, near, source, and found: one object per pair.
    """
    rows = load_rows(training, question_column=question_column, answer_column=answer_column)
    texts = Joined([rows[question_column], rows[answer_column]])
    report = {}
    for task in questions.tasks:
        asked = [item.question for item in task.items]
        pairs = [
            {
                "item": task.items[overlap.item].row,
                "training_row": overlap.row % len(rows) + 1,
                "column": question_column if overlap.row < len(rows) else answer_column,
                "kind": overlap.kind,
                "similarity": round(overlap.similarity, 4),
                "question": asked[overlap.item],
                "training_text": texts[overlap.row][:500],
            }
            for overlap in find_overlap(asked, texts)
        ]
        exact = {pair["item"] for pair in pairs if pair["kind"] == "exact"}
        either = {pair["item"] for pair in pairs}
        report[task.benchmark.name] = {
            "n": len(asked),
            "items": len(either),
            "exact": len(exact),
            "near": len(either - exact),
            "source": task.source,
            "found": pairs,
        }
    joined = "\x00".join(texts)
    return {
        "training": training,
        "rows": len(rows),
        "texts_sha256": hashlib.sha256(joined.encode()).hexdigest(),
        "threshold": THRESHOLD,
        "benchmarks": report,
    }
