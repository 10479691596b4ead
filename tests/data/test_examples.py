"""Sites: how rows are divided, cleaned and split, and that none is ever lost."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from flwr_datasets import FederatedDataset, federated_dataset, partitioner

from grandrounds.data.examples import Example, SiteData, split_rows
from grandrounds.data.partitioning import PARTITIONERS, Division, Partition, partition_rows
from grandrounds.data.rows import Rows
from grandrounds.data.sources import load_rows
from grandrounds.errors import DataError
from tests.places import SHARED

WIKIDOC = SHARED / "train/wikidoc_patient_information.jsonl.gz"
SITES = 5


def make_rows(count: int = 300, labels: int = SITES) -> datasets.Dataset:
    """Rows sorted by label, as a data set that is grouped by drug is."""
    return datasets.Dataset.from_dict(
        {
            "input": [f"question {i}" for i in range(count)],
            "output": [f"answer {i}" for i in range(count)],
            "label": [f"label {i * labels // count}" for i in range(count)],
        }
    )


def from_pairs(*pairs: tuple[str | None, str | None]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"input": [question for question, _ in pairs], "output": [answer for _, answer in pairs]}
    )


def partition(
    rows: datasets.Dataset,
    number: int,
    *,
    partitioner: str = "iid",
    column: str = "",
    alpha: float = 0.5,
    sites: int = SITES,
    seed: int = 42,
) -> datasets.Dataset:
    """Return the rows of one site."""
    division = Division(partitioner, column, alpha)
    return partition_rows(table(rows), division, Partition(seed, number, sites)).as_dataset()


def table(rows: datasets.Dataset | Rows) -> Rows:
    return rows if isinstance(rows, Rows) else Rows(rows.to_dict())


def site(
    rows: datasets.Dataset,
    number: int = 0,
    *,
    sites: int = 1,
    seed: int = 42,
    held_out_fraction: float = 0.0,
    question_column: str = "input",
    answer_column: str = "output",
    **division: Any,
) -> SiteData:
    """Return the examples of one site of one, unless told otherwise."""
    return split_rows(
        table(partition(rows, number, sites=sites, seed=seed, **division)),
        Partition(seed, number, sites),
        question_column=question_column,
        answer_column=answer_column,
        held_out_fraction=held_out_fraction,
    )


def failure(rows: datasets.Dataset, number: int = 0, **changes: Any) -> str:
    """Return the message of the DataError, which must be one line."""
    with pytest.raises(DataError) as caught:
        site(rows, number, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestPartitions:
    @pytest.mark.parametrize("name", PARTITIONERS)
    def test_every_row_belongs_to_exactly_one_site(self, name: str) -> None:
        rows = make_rows()
        parts = [partition(rows, i, partitioner=name, column="label") for i in range(SITES)]
        assert sorted(q for part in parts for q in part["input"]) == sorted(rows["input"])
        assert min(len(part) for part in parts) > 0

    @pytest.mark.parametrize("name", PARTITIONERS)
    def test_same_arguments_give_the_same_rows_and_another_seed_others(self, name: str) -> None:
        arguments: dict[str, Any] = {"partitioner": name, "column": "label"}
        first = partition(make_rows(), 2, **arguments)["input"][:]
        assert partition(make_rows(), 2, **arguments)["input"][:] == first
        assert partition(make_rows(), 2, **arguments, seed=43)["input"][:] != first

    def test_iid_sites_are_mixed_though_rows_are_sorted(self) -> None:
        rows = make_rows()
        for i in range(SITES):
            part = partition(rows, i)
            assert len(part) == 60
            counts = Counter(part["label"])  # 12 of each expected; a shard of sorted rows has 60, 0
            assert len(counts) == SITES
            assert max(counts.values()) < 25

    def test_iid_with_seed_42_holds_the_rows_that_flowertune_gives_a_site(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(federated_dataset, "event", lambda *_: None)  # telemetry
        rows = make_rows(count=103)
        rows.to_json(tmp_path / "rows.jsonl")
        federated = FederatedDataset(
            dataset="json",
            data_files=str(tmp_path / "rows.jsonl"),
            cache_dir=str(tmp_path / "cache"),
            partitioners={"train": partitioner.IidPartitioner(SITES)},
        )
        for i in range(SITES):
            assert partition(rows, i).to_list() == federated.load_partition(i).to_list()

    def test_natural_gives_a_site_the_rows_that_flower_gives_it(self) -> None:
        rows = make_rows(count=103)
        flower = partitioner.NaturalIdPartitioner("label")
        flower.dataset = rows.shuffle(seed=42)
        for i in range(SITES):
            own = partition(rows, i, partitioner="natural", column="label")
            assert own.to_list() == flower.load_partition(i).to_list()

    def test_size_skewed_site_i_is_proportional_to_i_plus_1(self) -> None:
        sizes = [len(partition(make_rows(), i, partitioner="size-skewed")) for i in range(SITES)]
        assert sizes == [20, 40, 60, 80, 100]

    def test_size_skewed_sites_are_mixed_though_rows_are_sorted(self) -> None:
        assert len(set(partition(make_rows(), 0, partitioner="size-skewed")["label"])) > 1

    def test_natural_site_i_holds_the_i_th_value_in_sorted_order(self) -> None:
        rows = make_rows()
        for i in range(SITES):
            part = partition(rows, i, partitioner="natural", column="label")
            assert set(part["label"]) == {f"label {i}"}

    def test_natural_integer_sites_are_sorted_as_numbers(self) -> None:
        rows = make_rows(12).remove_columns("label").add_column("label", [10, 2, 1] * 4)
        for i, value in enumerate((1, 2, 10)):
            part = partition(rows, i, partitioner="natural", column="label", sites=3)
            assert set(part["label"]) == {value}

    def test_dirichlet_with_small_alpha_is_more_skewed_than_with_large(self) -> None:
        rows = make_rows(2000)

        def largest_share(alpha: float) -> float:
            parts = [
                partition(rows, i, partitioner="dirichlet", column="label", alpha=alpha)
                for i in range(SITES)
            ]
            shares = [max(Counter(part["label"]).values()) / len(part) for part in parts]
            return sum(shares) / SITES

        assert largest_share(0.2) > 0.5
        assert largest_share(1000.0) < 0.25

    @pytest.mark.parametrize("name", PARTITIONERS)
    def test_what_was_said_before_a_question_stays_with_it(self, name: str) -> None:
        plain = make_rows()
        said = [(("system", question),) for question in plain["input"]]
        rows = Rows(plain.to_dict(), histories=said)
        part = partition_rows(rows, Division(name, "label", 0.5), Partition(42, 1, SITES))
        assert [before[0][1] for before in part.histories] == list(part["input"])

    def test_partitioning_prints_nothing_and_warns_of_nothing(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        rows = make_rows()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for name in PARTITIONERS:
                partition(rows, 0, partitioner=name, column="label")
            failure(rows, partitioner="dirichlet", column="label", sites=250)
        assert capfd.readouterr() == ("", "")


class TestPartitionErrors:
    def test_arguments_out_of_range_are_named(self) -> None:
        rows = make_rows()
        message = failure(rows, partitioner="dirichlett")
        assert "iid, dirichlet, size-skewed, natural. Did you mean 'dirichlet'?" in message
        assert "num-partitions = 0" in failure(rows, sites=0)
        assert "site 5 does not exist" in failure(rows, 5, sites=5)
        assert "site -1 does not exist" in failure(rows, -1, sites=5)
        assert "seed is -1" in failure(rows, seed=-1)
        for alpha in (0.0, -1.0, float("nan"), float("inf")):
            assert "dirichlet-alpha" in failure(rows, alpha=alpha)
        for fraction in (-0.1, 1.0, float("nan")):
            assert "held-out-fraction" in failure(rows, held_out_fraction=fraction)

    @pytest.mark.parametrize("name", ["dirichlet", "natural"])
    def test_column_must_be_named_there_and_filled(self, name: str) -> None:
        rows = make_rows()
        message = failure(rows, partitioner=name)
        assert "needs data.partition-by" in message
        assert "the columns are: input, output, label." in message
        message = failure(rows, partitioner=name, column="lable")
        assert "'lable': there is no such column; the columns are: input, output, label." in message
        assert "Did you mean 'label'?" in message
        gaps = make_rows(4).remove_columns("label").add_column("label", ["a", None, " ", "b"])
        message = failure(gaps, partitioner=name, column="label")
        assert "2 of 4 rows have no value" in message

    def test_natural_sites_must_be_as_many_as_partitions(self) -> None:
        message = failure(make_rows(), partitioner="natural", column="label", sites=20)
        assert "has 5 distinct values" in message
        assert "data.num-partitions = 20. Set data.num-partitions = 5, or leave it out." in message

    @pytest.mark.parametrize("name", ["iid", "dirichlet", "size-skewed"])
    def test_fewer_rows_than_sites(self, name: str) -> None:
        message = failure(make_rows(10), partitioner=name, column="label", sites=11)
        assert "10 rows cannot fill 11 sites. Set data.num-partitions to at most 10" in message

    def test_size_skewed_with_an_empty_first_site(self) -> None:
        message = failure(make_rows(20), partitioner="size-skewed", sites=10)
        assert "share is 1/55" in message
        assert "only 20 rows" in message

    def test_dirichlet_that_cannot_fill_every_site(self) -> None:
        message = failure(
            make_rows(100, labels=2),
            partitioner="dirichlet",
            column="label",
            sites=50,
            alpha=0.01,
        )
        assert "dirichlet-alpha = 0.01 could not fill 50 sites with 100 rows" in message

    def test_missing_question_column(self) -> None:
        message = failure(make_rows(), question_column="inputs")
        assert "data.question-column = 'inputs'" in message
        assert "Did you mean 'input'?" in message
        assert "data.answer-column" in failure(make_rows(), answer_column="x")


class TestCleaning:
    def test_empty_rows_and_repeated_rows_are_dropped_and_counted(self) -> None:
        rows = from_pairs(
            ("q", "a"),
            (" q\n", "a "),
            ("q", "b"),
            ("", "a"),
            ("q", " \n"),
            (None, "a"),
            ("q", None),
        )
        data = site(rows)
        assert set(data.train) == {Example("q", "a"), Example("q", "b")}
        assert len(data.train) == 2
        report = data.report
        assert (report.rows, report.empty_rows, report.duplicate_rows) == (7, 4, 1)
        assert (report.train_examples, report.held_out_examples) == (2, 0)

    def test_examples_keep_the_order_of_the_partition(self) -> None:
        rows = make_rows(50)
        expected = partition(rows, 0, sites=1)["input"][:]
        data = site(rows, held_out_fraction=0.2)
        held_out = {example.question for example in data.held_out}
        assert [e.question for e in data.train] == [q for q in expected if q not in held_out]

    def test_site_without_training_example_is_named_with_its_numbers(self) -> None:
        message = failure(from_pairs(("q", ""), ("q", "")), 1, sites=2)
        assert "site 1 has no example to train on: of its 1 rows 1 have no question" in message
        message = failure(from_pairs(("q", "a"), ("r", "b")), held_out_fraction=0.9)
        assert "site 0" in message
        assert "2 are held out" in message


class TestHeldOut:
    @pytest.mark.parametrize(
        ("examples", "fraction", "expected"),
        [(100, 0.05, 5), (100, 0.0, 0), (10, 0.01, 1), (2, 0.01, 1), (1, 0.5, 0), (10, 0.25, 2)],
    )
    def test_number_is_the_rounded_share_and_at_least_one(
        self, examples: int, fraction: float, expected: int
    ) -> None:
        data = site(make_rows(examples), held_out_fraction=fraction)
        assert len(data.held_out) == data.report.held_out_examples == expected
        assert len(data.train) == data.report.train_examples == examples - expected

    def test_same_seed_gives_the_same_split_and_each_site_its_own(self) -> None:
        rows = from_pairs(*((f"q {i}", "a") for i in range(100)))

        def chosen(seed: int) -> set[Example]:
            return set(site(rows, held_out_fraction=0.1, seed=seed).held_out)

        assert chosen(1) == chosen(1)
        assert chosen(1) != chosen(2)

    def test_no_held_out_question_is_trained_on(self) -> None:
        rows = from_pairs(*((f"q {i % 40}", f"a {i}") for i in range(100)))
        for seed in range(20):
            data = site(rows, held_out_fraction=0.2, seed=seed)
            train, held_out = ({e.question for e in part} for part in (data.train, data.held_out))
            assert held_out
            assert not train & held_out
            assert 18 <= len(data.held_out) <= 20

    def test_smallest_question_is_held_out_when_all_are_larger_than_the_share(self) -> None:
        pairs = [("q", f"a {i}") for i in range(6)] + [("r", f"b {i}") for i in range(4)]
        data = site(from_pairs(*pairs), held_out_fraction=0.1)
        assert {e.question for e in data.held_out} == {"r"}
        assert len(data.held_out) == 4

    def test_site_with_a_single_question_holds_nothing_out(self) -> None:
        data = site(from_pairs(("q", "a"), ("q", "b")), held_out_fraction=0.5)
        assert len(data.train) == 2
        assert data.held_out == ()


@pytest.fixture(scope="module")
def wikidoc() -> datasets.Dataset:
    if not WIKIDOC.exists():
        pytest.skip("shared/data/train is not here")
    return load_rows(str(WIKIDOC), question_column="input", answer_column="output")


class TestWikidoc:
    def test_one_site_counts_66_exact_duplicates(self, wikidoc: datasets.Dataset) -> None:
        report = site(wikidoc).report
        assert report.rows == 4952
        assert report.duplicate_rows == 66

    @pytest.mark.parametrize("name", ["iid", "size-skewed"])
    def test_nothing_is_lost_over_20_sites(self, wikidoc: datasets.Dataset, name: str) -> None:
        reports = [
            site(wikidoc, i, partitioner=name, sites=20, held_out_fraction=0.05).report
            for i in range(20)
        ]
        assert sum(report.rows for report in reports) == 4952
        for report in reports:
            assert report.rows == (
                report.empty_rows
                + report.duplicate_rows
                + report.train_examples
                + report.held_out_examples
            )
            assert report.held_out_examples >= 1


@pytest.mark.slow
def test_20_sites_of_a_large_file_are_loaded_in_seconds(tmp_path: Path) -> None:
    """33,955 rows as in FlowerTune's flashcards; about 1.5 s on one core, 10 s allowed."""
    make_rows(33_955).to_json(tmp_path / "rows.jsonl")
    start = time.perf_counter()
    for i in range(20):
        rows = load_rows(
            str(tmp_path / "rows.jsonl"), question_column="input", answer_column="output"
        )
        site(rows, i, sites=20, held_out_fraction=0.05)
    assert time.perf_counter() - start < 10
