"""Finds benchmark questions that occur in training data, word for word or nearly so."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grandrounds.data.sources import load_rows
from grandrounds.study.evaluation.benchmarks import get_benchmark, load_items, source_of

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
    """`exact`: the training text is the question or contains it, after normalisation."""
    similarity: float
    """Jaccard similarity of the two whole texts, exact; low where `row` is the longer by far."""
    question: str
    """The benchmark question as given."""
    training_text: str
    """The training text as given."""


def find_overlap(
    benchmark_questions: Sequence[str],
    training_texts: Sequence[str],
    *,
    threshold: float = 0.8,
    num_perm: int = 128,
    ngram: int = 5,
) -> list[Overlap]:
    """Return every benchmark question that occurs in a training text.

    Both sides are normalised: Unicode NFKC, case folded, every run of punctuation and blanks one
    blank. Numbers and words stay, signs such as `<` do not.

    Exact: the normalised texts are equal, or the training text contains the question as whole
    words. Questions of fewer than `ngram` words must be the whole text: "Pneumonia" stands in
    thousands of texts without being a leak.

    Near: the sets of word n-grams (shingles) of the two have a Jaccard similarity of at least
    `threshold` (Broder 1997, "On the resemblance and containment of documents", section 2).
    Candidates come from MinHash with banding (Leskovec, Rajaraman and Ullman, "Mining of Massive
    Datasets", section 3.4), and are then compared exactly, so no pair below the threshold is
    reported; a pair at the threshold is missed with probability at most 0.001, a more similar one
    with less (for ideal hash functions).

    A question of w words is cut into shingles of min(`ngram`, max(1, w // 4)) words, and so is a
    text compared with it. At the defaults one word replaced in the middle is found from 49 words
    on; in a short question it mostly makes another question, and is found only near an end.
    Languages written without blanks between words are found only if the texts are equal.

    Since the near comparison is of whole texts, give questions and answers of a training set as
    separate texts, `[*questions, *answers]`: a question joined to its long answer is found word for
    word or not at all.

    Parameters
    ----------
    benchmark_questions : sequence of str
        Questions without their options. One without any word overlaps with nothing.
    training_texts : sequence of str
        What the model was trained on.
    threshold : float
        Least Jaccard similarity of a near-duplicate, above 0 and at most 1.
    num_perm : int
        Hash functions of a MinHash, at least 2. More let a lower threshold be searched.
    ngram : int
        Words in a shingle of a long question, at least 1.

    Returns
    -------
    list of Overlap
        By item, then by row; one entry for each pair found. The same call gives the same list.

    Raises
    ------
    ValueError
        If an argument is out of its range, or `num_perm` is too small for `threshold`.
    """
    if ngram < 1:
        raise ValueError(f"ngram must be at least 1, got {ngram}")
    bands = _bands(threshold, num_perm)
    items = [_words(question) for question in benchmark_questions]
    exact = _ExactIndex(items, ngram)
    near = _near_indexes(items, threshold, num_perm, ngram, bands)
    found = []
    for row, text in enumerate(training_texts):
        words = _words(text)
        matches: dict[int, tuple[Literal["exact", "near"], float]] = {}
        for index in near:
            matches |= {item: ("near", similarity) for item, similarity in index.find(words)}
        for item in exact.find(words):
            size = _shingle_size(len(items[item]), ngram)
            similarity = _jaccard(_shingles(items[item], size), _shingles(words, size))
            matches[item] = ("exact", similarity)
        for item, (kind, similarity) in matches.items():
            question = benchmark_questions[item]
            found.append(Overlap(item, row, kind, similarity, question, text))
    return sorted(found, key=lambda overlap: (overlap.item, overlap.row))


def _words(text: str) -> list[str]:
    """Return the words of a text, normalised."""
    visible = _INVISIBLE.sub("", text)
    return _WORD.findall(unicodedata.normalize("NFKC", visible).casefold())


def _shingle_size(word_count: int, ngram: int) -> int:
    """Return how many words a shingle has: fewer where a text has few, so that it has several."""
    return min(ngram, max(1, word_count // _WORDS_PER_SHINGLE_WORD))


def _shingles(words: Sequence[str], size: int) -> set[str]:
    """Return the different runs of `size` words; none if there are fewer words."""
    return {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}


def _jaccard(one: set[str], other: set[str]) -> float:
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


class _ExactIndex:
    """Finds the questions that a text contains, by the question's first `ngram` words."""

    def __init__(self, items: Sequence[Sequence[str]], ngram: int) -> None:
        self._ngram = ngram
        self._texts = [" ".join(words) for words in items]
        self._whole: defaultdict[str, list[int]] = defaultdict(list)
        self._by_start: defaultdict[str, list[int]] = defaultdict(list)
        for item, words in enumerate(items):
            if len(words) >= ngram:
                self._by_start[" ".join(words[:ngram])].append(item)
            elif words:
                self._whole[self._texts[item]].append(item)

    def find(self, words: Sequence[str]) -> Iterator[int]:
        """Yield the items that are this text, or that it contains."""
        text = " ".join(words)
        yield from self._whole.get(text, ())
        padded = f" {text} "
        for start in self._by_start.keys() & _shingles(words, self._ngram):
            yield from (i for i in self._by_start[start] if f" {self._texts[i]} " in padded)


class _NearIndex:
    """Finds near-duplicates among the questions that share one shingle size."""

    def __init__(
        self,
        shingles: dict[int, set[str]],
        size: int,
        threshold: float,
        num_perm: int,
        bands: tuple[int, int],
    ) -> None:
        from datasketch import MinHash, MinHashLSH

        self._shingles = shingles
        self._size = size
        self._threshold = threshold
        self._fewest = min(map(len, shingles.values()))
        self._most = max(map(len, shingles.values()))
        self._empty = MinHash(num_perm=num_perm, seed=_SEED)
        self._index = MinHashLSH(num_perm=num_perm, params=bands)
        for item, grams in shingles.items():
            self._index.insert(item, self._sketch(grams))

    def find(self, words: Sequence[str]) -> Iterator[tuple[int, float]]:
        """Yield the items similar to this text, with their similarity."""
        # The similarity of two sets is at most the smaller size divided by the larger.
        if (len(words) - self._size + 1) / self._fewest < self._threshold:
            return
        grams = _shingles(words, self._size)
        if min(len(grams) / self._fewest, self._most / len(grams)) < self._threshold:
            return
        for item in self._index.query(self._sketch(grams)):
            similarity = _jaccard(self._shingles[item], grams)
            if similarity >= self._threshold:
                yield item, similarity

    def _sketch(self, grams: set[str]) -> Any:
        sketch = self._empty.copy()
        sketch.update_batch([gram.encode() for gram in grams])
        return sketch


def _near_indexes(
    items: Sequence[Sequence[str]],
    threshold: float,
    num_perm: int,
    ngram: int,
    bands: tuple[int, int],
) -> list[_NearIndex]:
    """Return one index for each shingle size there is among the items."""
    by_size: defaultdict[int, dict[int, set[str]]] = defaultdict(dict)
    for item, words in enumerate(items):
        if words:
            size = _shingle_size(len(words), ngram)
            by_size[size][item] = _shingles(words, size)
    return [
        _NearIndex(shingles, size, threshold, num_perm, bands)
        for size, shingles in sorted(by_size.items())
    ]


def _bands(threshold: float, num_perm: int) -> tuple[int, int]:
    """Return bands b and rows r of the MinHash index.

    Two sets of similarity s meet in a band with probability s^r, so that the index misses them with
    probability (1 - s^r)^b (Mining of Massive Datasets, section 3.4.2). The most rows, hence the
    fewest needless candidates, are taken that keep this at most 0.001 at the threshold.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
    if num_perm < 2:
        raise ValueError(f"num_perm must be at least 2, got {num_perm}")
    for rows in range(num_perm // 2, 0, -1):
        bands = num_perm // rows
        if (1 - threshold**rows) ** bands <= _MISS_PROBABILITY:
            return bands, rows
    raise ValueError(
        f"with num_perm {num_perm} a pair of similarity {threshold} would be missed with a "
        f"probability above {_MISS_PROBABILITY}; raise num_perm or threshold"
    )


THRESHOLD = 0.8
"""Least Jaccard similarity of a near-duplicate."""


def check_overlap(
    training: str,
    benchmarks: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    question_column: str = "input",
    answer_column: str = "output",
) -> dict[str, Any]:
    """Look for every question of some benchmarks in training data.

    Parameters
    ----------
    training : str
        What `grandrounds.data.sources.load_rows` takes: a local file, a hub name or `formulary`.
    benchmarks : sequence of str
        Names of `grandrounds.study.evaluation.benchmarks`.
    data : Path, optional
        Folder with the benchmarks' files.
    limit : int, optional
        Look for the first so many items of each benchmark only.
    question_column, answer_column : str
        Columns of the training data; each is searched by itself.

    Returns
    -------
    dict
        `training`, `rows`, `threshold`, and `benchmarks`: name → n, items (with an overlap of any
        kind), exact, near, source, and found: one object for each pair.
    """
    known = [get_benchmark(name) for name in dict.fromkeys(benchmarks)]
    asked = [(b, load_items(b, data, limit), source_of(b, data)) for b in known]
    rows = load_rows(training, question_column=question_column, answer_column=answer_column)
    questions, answers = list(rows[question_column]), list(rows[answer_column])
    texts = [*questions, *answers]
    report = {}
    for benchmark, items, source in asked:
        found = find_overlap([item.question for item in items], texts, threshold=THRESHOLD)
        pairs = [
            {
                "item": items[overlap.item].row,
                "training_row": overlap.row % len(questions) + 1,
                "column": question_column if overlap.row < len(questions) else answer_column,
                "kind": overlap.kind,
                "similarity": round(overlap.similarity, 4),
                "question": overlap.question,
                "training_text": overlap.training_text[:500],
            }
            for overlap in found
        ]
        exact = {pair["item"] for pair in pairs if pair["kind"] == "exact"}
        either = {pair["item"] for pair in pairs}
        report[benchmark.name] = {
            "n": len(items),
            "items": len(either),
            "exact": len(exact),
            "near": len(either - exact),
            "source": source,
            "found": pairs,
        }
    joined = "\x00".join(texts)
    return {
        "training": training,
        "rows": len(questions),
        "texts_sha256": hashlib.sha256(joined.encode()).hexdigest(),
        "threshold": THRESHOLD,
        "benchmarks": report,
    }
