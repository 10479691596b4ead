"""The most bytes that PyTorch holds at a time while a function runs: exact on the CPU too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler import profile


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the most bytes allocated at a time on top of what was there before."""
    return peak_and_left_bytes(function)[0]


def peak_and_left_bytes(function: Callable[[], Any]) -> tuple[int, int]:
    """Return the most bytes at a time on top of what was there before, and those left at the end.

    On a GPU as its allocator counts them; on the CPU every allocation and release is recorded by
    PyTorch's profiler, which slows the function down.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    # torch.profiler would build a tree of all events too, which takes longer than the function
    with profile(profile_memory=True) as run:
        function()
    events = [e for e in run.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most, held
