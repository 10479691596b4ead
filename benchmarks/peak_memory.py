"""Peak memory that PyTorch allocates while a function runs, exact on the CPU too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler import profile


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the peak of allocated bytes above the starting level."""
    return peak_and_left_bytes(function)[0]


def peak_and_left_bytes(function: Callable[[], Any]) -> tuple[int, int]:
    """Return the peak of allocated bytes above the starting level, and the bytes left at the end.

    A GPU's allocator counts them; on the CPU PyTorch's profiler records every allocation and
    release, which slows the function down.
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
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, held
