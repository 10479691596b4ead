"""Where the time of a visit goes: seconds by kind of work, and the share that the GPU computes; no
script by itself.

On a GPU the times of its kernels, by their names; on a CPU the operators' own times.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from bare_loops import synchronize

KINDS = {
    "dequantisation": r"dequant",
    "attention": r"flash|fmha|attn|attention|varlen",
    "optimizer": r"adam|multi_tensor|optimizer|foreach|lpnorm|clip_grad",
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|mkldnn|_4bit"
    r"|aten::(b?mm|addmm|baddbmm|linear|matmul|dot)\b",
    "norms": r"rms|layer_?norm|meanops|rsqrt|pow_tensor|aten::(mean|pow|rsqrt)\b",
    "activation and rotation": r"silu|swiglu|rope|rotary|gelu|aten::(neg|cos|sin)\b",
    "copies and casts": r"copy|memcpy|memset|catarray|fill|index|gather|scatter|arange"
    r"|aten::(cat|clone|zeros|empty\w*|_to_copy|contiguous|to|slice|narrow|view|split\w*)\b",
    "loss": r"exp|softmax|logsumexp|maxops|argmax|nll|aten::(amax|sum|log)\b",
}
"""Kind → pattern of the names of its kernels and operators; the first that matches counts."""

OTHER = "other elementwise"


def kind_of(name: str) -> str:
    """Return the kind of work of a kernel or an operator."""
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower()))
    return next(found, OTHER)


def profiled(visit: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Return milliseconds a step by kind of a visit whose shapes were seen before.

    `busy_share` is the time in which at least one kernel runs, of the time without the profiler;
    None on a CPU. `largest` are the ten kernels or operators that take longest.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    visit()
    synchronize()
    started = time.perf_counter()
    visit()
    synchronize()
    wall = time.perf_counter() - started
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=activities) as run:
        visit()
        synchronize()
    seconds: dict[str, float] = defaultdict(float)
    intervals: list[tuple[int, int]] = []
    if on_gpu:
        for event in run.profiler.kineto_results.events():  # type: ignore[union-attr]
            name = event.name()
            if event.device_type() != torch.autograd.DeviceType.CUDA or "#" in name:
                continue  # `#` names a span of the program, such as Optimizer.step#AdamW.step
            begin = event.start_ns()
            intervals.append((begin, begin + event.duration_ns()))
            seconds[name] += event.duration_ns() / 1e9
    else:
        for average in run.key_averages():
            seconds[average.key] += average.self_cpu_time_total / 1e6
    kinds: dict[str, float] = defaultdict(float)
    for name, spent in seconds.items():
        kinds[kind_of(name)] += 1e3 * spent / steps
    busy = union_seconds(intervals)
    largest = sorted(seconds.items(), key=lambda pair: -pair[1])[:10]
    return {
        "wall_ms_a_step": 1e3 * wall / steps,
        "busy_ms_a_step": 1e3 * busy / steps if on_gpu else None,
        "busy_share": busy / wall if on_gpu else None,
        "launches_a_step": len(intervals) / steps if on_gpu else None,
        "kinds_ms_a_step": dict(sorted(kinds.items(), key=lambda pair: -pair[1])),
        "largest": [
            {"name": name[:120], "kind": kind_of(name), "ms_a_step": 1e3 * spent / steps}
            for name, spent in largest
        ],
    }


def union_seconds(intervals: list[tuple[int, int]]) -> float:
    """Return the time that is covered by intervals of nanoseconds, in seconds."""
    covered, end = 0, 0
    for first, last in sorted(intervals):
        covered += max(0, last - max(first, end))
        end = max(end, last)
    return covered / 1e9


def profile_lines(found: dict[str, Any]) -> list[str]:
    """Return a profile in lines."""
    wall = found["wall_ms_a_step"]
    busy = ""
    if found["busy_share"] is not None:
        busy = (
            f", GPU busy {found['busy_ms_a_step']:.0f} ms ({found['busy_share']:.0%}), "
            f"{found['launches_a_step']:,.0f} kernels"
        )
    lines = [f"a step {wall:.0f} ms{busy}; by kind, ms"]
    lines += [f"  {kind:<32}{ms:>10.1f}" for kind, ms in found["kinds_ms_a_step"].items()]
    return lines
