"""Which library computes float32 matrix products on a CPU.

PyTorch hands them to the library that it was built with, on x86 usually MKL, which is slow on some
processors; oneDNN takes them under `torch.set_float32_matmul_precision("medium")`. That setting
allows oneDNN to compute in bfloat16 where the processor has matrix units for it, so its result is
measured against float64 before it is used. Sums are added in another order: the bits of an adapter
depend on the library.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import linear

from grandrounds.errors import ModelError

AUTO, DEFAULT, ONEDNN = "auto", "default", "onednn"
"""Values of `train.cpu-matmul`."""

LIBRARIES = (DEFAULT, ONEDNN)
_SETTING = {DEFAULT: "highest", ONEDNN: "medium"}

PROBE_SECONDS = 0.2
"""Time for the products of a probe."""

REPEATS = 3
"""Timed products of each library in a probe, in turn."""

SHARE = 0.8
"""oneDNN is chosen if its products take at most this share of the default library's time."""

ERROR_FACTOR = 4.0
"""oneDNN is chosen if its error is at most this many times the default library's. The order of the
sums accounts for a factor of about 2; bfloat16 would be above 1,000."""

LEAST_ROWS, MOST_ROWS = 64, 2048
"""Tokens in a probe's products: as many as its time allows."""

MOST_WEIGHTS = 2**20
"""Weights in a probe's products: of a larger matrix only a part of the inner size is used."""

_CHECKED_ROWS = 32


@dataclass(frozen=True)
class Probe:
    """What both libraries did with the same products."""

    seconds: dict[str, float]
    """Library → least time of a product and its gradient, the least disturbed; empty
    if time ran out."""
    errors: dict[str, float]
    """Library → relative error (Frobenius norm) of the product against float64."""

    @property
    def is_exact(self) -> bool:
        """Whether oneDNN computes in float32."""
        return self.errors[ONEDNN] <= ERROR_FACTOR * self.errors[DEFAULT]

    @property
    def choice(self) -> str:
        """The library to use under `auto`."""
        if not self.seconds or not self.is_exact:
            return DEFAULT
        faster = self.seconds[ONEDNN] <= SHARE * self.seconds[DEFAULT]
        return ONEDNN if faster else DEFAULT


@contextmanager
def computed_by(library: str) -> Iterator[None]:
    """Compute the float32 products of this process with a library within the context."""
    before = current()
    if library == before:
        yield
        return
    torch.set_float32_matmul_precision(_SETTING[library])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(_SETTING[before])


def current() -> str:
    """Return the library that computes float32 products now."""
    return ONEDNN if torch.get_float32_matmul_precision() == _SETTING[ONEDNN] else DEFAULT


def by_default_backwards(inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
    """Compute the backward pass between an operation's output and inputs by the default library.

    Call it after the operation. The engine runs the nodes between them before any earlier one, so
    the first gradient of an input that is ready ends it.
    """
    library = current()
    if library == DEFAULT or not output.requires_grad:
        return

    def switch(wanted: str) -> Callable[[torch.Tensor], None]:
        return lambda _: torch.set_float32_matmul_precision(_SETTING[wanted])

    output.register_hook(switch(DEFAULT))  # type: ignore[no-untyped-call]
    for tensor in inputs:
        if tensor.requires_grad:
            tensor.register_hook(switch(library))  # type: ignore[no-untyped-call]


@lru_cache(maxsize=8)
def probed(hidden: int, inner: int, threads: int) -> Probe:
    """Return how this machine computes products of a base's size; measured once per process.

    Parameters
    ----------
    hidden, inner : int
        Hidden size, and the size between the two products of an MLP.
    threads : int
        CPU threads, as in a visit.
    """
    before = torch.get_num_threads()
    if before != threads:
        torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            return _probe(hidden, inner)
    finally:
        if before != threads:
            torch.set_num_threads(before)


def _probe(hidden: int, inner: int) -> Probe:
    inner = min(inner, max(LEAST_ROWS, MOST_WEIGHTS // hidden))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(inner, hidden, generator=generator)
    states = torch.randn(LEAST_ROWS, hidden, generator=generator)
    gradient = torch.randn(LEAST_ROWS, inner, generator=generator)
    exact = linear(states[:_CHECKED_ROWS].double(), weight.double())
    errors = {}
    for library in LIBRARIES:
        with computed_by(library):
            product = linear(states, weight)[:_CHECKED_ROWS]
        errors[library] = float((product - exact).norm() / exact.norm())

    started = time.perf_counter()
    for library in LIBRARIES:
        _seconds(library, states, gradient, weight)  # the first one compiles
    slower = max(_seconds(library, states, gradient, weight) for library in LIBRARIES)
    left = PROBE_SECONDS - (time.perf_counter() - started)
    copies = min(int(left / (len(LIBRARIES) * (REPEATS + 1) * slower)), MOST_ROWS // LEAST_ROWS)
    if copies < 1:
        return Probe({}, errors)
    states, gradient = states.repeat(copies, 1), gradient.repeat(copies, 1)
    taken: dict[str, list[float]] = {library: [] for library in LIBRARIES}
    for repeat in range(REPEATS + 1):
        for library, times in taken.items():
            took = _seconds(library, states, gradient, weight)
            if repeat:  # the first one compiles
                times.append(took)
    return Probe({name: min(times) for name, times in taken.items()}, errors)


def _seconds(
    library: str, states: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor
) -> float:
    """Return the time of a product, and of the gradient of its input."""
    with computed_by(library):
        started = time.perf_counter()
        linear(states, weight)
        gradient @ weight
        return time.perf_counter() - started


def require_exact(probe: Probe) -> None:
    """Raise `ModelError` if oneDNN does not compute in float32 on this CPU."""
    if not probe.is_exact:
        raise ModelError(
            f'train.cpu-matmul = "{ONEDNN}": on this CPU oneDNN computes in reduced precision '
            f"(relative error {probe.errors[ONEDNN]:.1e}, float32 {probe.errors[DEFAULT]:.1e}). "
            f'Set "{DEFAULT}" or "{AUTO}"; for bfloat16 throughout, model.dtype = "bfloat16".'
        )
