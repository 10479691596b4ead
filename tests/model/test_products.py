"""The library of float32 products on a CPU: chosen by measurement, never a less exact one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from grandrounds.config.recipes import resolve
from grandrounds.errors import ModelError
from grandrounds.model import machine, products
from grandrounds.model.products import DEFAULT, ONEDNN, Probe, by_default_backwards, computed_by
from grandrounds.waiting import usable_cpus

FLOAT32 = {DEFAULT: 2.5e-7, ONEDNN: 3.9e-7}
TWICE_AS_FAST = {DEFAULT: 2.0, ONEDNN: 1.0}


@pytest.mark.parametrize(
    ("seconds", "errors", "choice"),
    [
        (TWICE_AS_FAST, FLOAT32, ONEDNN),
        ({DEFAULT: 1.0, ONEDNN: 0.79}, FLOAT32, ONEDNN),
        ({DEFAULT: 1.0, ONEDNN: 0.81}, FLOAT32, DEFAULT),
        ({DEFAULT: 1.0, ONEDNN: 1.6}, FLOAT32, DEFAULT),
        (TWICE_AS_FAST, {DEFAULT: 2.5e-7, ONEDNN: 2.9e-3}, DEFAULT),  # bfloat16
        (TWICE_AS_FAST, {DEFAULT: 2.5e-7, ONEDNN: 2.0e-4}, DEFAULT),  # TensorFloat-32
        ({}, FLOAT32, DEFAULT),  # time ran out
    ],
)
def test_onednn_is_chosen_only_if_it_is_faster_and_as_exact(
    seconds: dict[str, float], errors: dict[str, float], choice: str
) -> None:
    assert Probe(seconds, errors).choice == choice


def test_a_probe_measures_the_error_of_both_libraries_on_this_cpu() -> None:
    """The relative error of a float32 product is some 2^-24 = 6e-8 times a small factor."""
    probe = products.probed(64, 96, 1)
    assert probe.seconds.keys() == probe.errors.keys() == {DEFAULT, ONEDNN}
    assert 1e-8 < probe.errors[DEFAULT] < 2e-6
    assert products.current() == DEFAULT


def test_a_reduced_precision_is_refused_by_its_name() -> None:
    with pytest.raises(ModelError, match=r'"onednn": .* error 2\.9e-03, float32 2\.5e-07\)'):
        products.require_exact(Probe(TWICE_AS_FAST, {DEFAULT: 2.5e-7, ONEDNN: 2.9e-3}))
    products.require_exact(Probe(TWICE_AS_FAST, FLOAT32))


def test_the_library_is_set_within_the_context_only() -> None:
    with computed_by(ONEDNN):
        assert products.current() == ONEDNN
        with computed_by(DEFAULT):
            assert products.current() == DEFAULT
        assert products.current() == ONEDNN
    assert products.current() == DEFAULT


class _Noting(torch.autograd.Function):
    """The identity; notes the library of its backward pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *upstream: torch.Tensor) -> torch.Tensor:
        NOTED.append(products.current())
        return upstream[0]


NOTED: list[str] = []


def noting(x: torch.Tensor) -> torch.Tensor:
    return _Noting.apply(x)  # type: ignore[no-any-return,no-untyped-call]


def test_attentions_backward_pass_keeps_the_default_library() -> None:
    NOTED.clear()
    weight = torch.ones(2, 2, requires_grad=True)
    with computed_by(ONEDNN):
        before = noting(linear(torch.ones(1, 2), weight))
        inside = noting(before * 2)
        output = inside + 1
        by_default_backwards((before,), output)
        noting(output).sum().backward()
        assert products.current() == ONEDNN
    assert NOTED == [ONEDNN, DEFAULT, ONEDNN]  # from the last node to the first


@pytest.fixture
def large(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A base that is not too small for oneDNN, on a machine where that is faster."""
    monkeypatch.setattr(machine, "SMALL_BASE_PARAMETERS", 1)
    monkeypatch.setattr(products, "probed", lambda *_: Probe(TWICE_AS_FAST, FLOAT32))
    machine.matmul.cache_clear()
    yield str(tiny_base)
    machine.matmul.cache_clear()


def test_the_choice_follows_the_key_and_the_probe(large: str) -> None:
    config = resolve({"model.name": large, "train.num-threads": 1})
    assert machine.forward(config).matmul == ONEDNN
    assert machine.precision(config).endswith("products by oneDNN")
    for key, value in (("train.cpu-matmul", DEFAULT), ("model.dtype", "bfloat16")):
        other = resolve({**config.flat(), key: value})
        assert machine.matmul(other) == DEFAULT
        assert "oneDNN" not in machine.precision(other)


def test_a_small_base_is_never_probed(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "probed", None)
    assert machine.matmul(resolve({"model.name": str(tiny_base)})) == DEFAULT


def test_what_was_recorded_at_the_roll_call_is_kept(large: str) -> None:
    config = resolve({"model.name": large, "train.num-threads": 0})
    fresh = machine.settled(config, {})
    assert (fresh.train.num_threads, fresh.train.cpu_matmul) == (machine.threads(config), ONEDNN)
    kept = machine.settled(config, {"threads": 1, "cpu-matmul": DEFAULT})
    assert (kept.train.num_threads, kept.train.cpu_matmul) == (1, DEFAULT)
    assert machine.settled(kept, {"threads": 1, "cpu-matmul": ONEDNN}) == kept


def test_recorded_onednn_is_given_up_where_it_is_not_exact(
    large: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        products, "probed", lambda *_: Probe(TWICE_AS_FAST, {**FLOAT32, ONEDNN: 2.9e-3})
    )
    config = resolve({"model.name": large})
    recorded = {"threads": 1, "cpu-matmul": ONEDNN}
    assert machine.settled(config, recorded).train.cpu_matmul == DEFAULT
    written = resolve({"model.name": large, "train.cpu-matmul": ONEDNN})
    with pytest.raises(ModelError, match="reduced precision"):
        machine.settled(written, recorded)


@pytest.mark.parametrize("claimed", [0, -1, 10**6, "2", 1.5])
def test_a_server_cannot_ask_for_more_threads_than_there_are_cpus(
    large: str, claimed: object
) -> None:
    config = resolve({"model.name": large, "train.num-threads": 0})
    settled = machine.settled(config, {"threads": claimed, "cpu-matmul": "fast"})
    assert settled == machine.settled(config, {})
    assert dataclasses.replace(settled, train=config.train) == config


@pytest.mark.parametrize(
    ("quota", "cpus"), [("max 100000", 64), ("250000 100000", 2), ("50000 100000", 1), (None, 64)]
)
def test_a_containers_quota_limits_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str | None, cpus: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    if quota:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert usable_cpus(tmp_path) == cpus
