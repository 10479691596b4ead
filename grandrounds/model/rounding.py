"""How far rounding alone moves a model's logits, to tell a wrong way of reading from a rounded one.

Two ways to the same logits, such as with and without a cache, round differently in bfloat16, and a
deep model carries that further than a shallow one: a fixed tolerance is too narrow for the one and
too wide for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

COARSE = (torch.bfloat16, torch.float16)
"""Types in which rounding is felt."""

ROUNDING_FACTOR = 2.0
"""Two ways agree where their largest difference is at most this many times that of `rerounded`.
With SmolLM2-135M in bfloat16 padding gives 0.5 times, a wrong position 19 times, a token that is
not seen 5.6 times."""


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest L2 distance of the logits of one position: (..., vocabulary)."""
    return float((one - other).norm(dim=-1).max())


@contextmanager
def rerounded(model: Any) -> Iterator[None]:
    """Move what each innermost module returns by up to one unit in the last place at random.

    About two thirds of the values change, which moves the logits of Llamas of 2 to 32 layers about
    twice as far as bfloat16 is from float32. Values in float32 stay as they are.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def move(module: Any, inputs: Any, output: Any) -> torch.Tensor | None:
        if not isinstance(output, torch.Tensor) or output.dtype not in COARSE:
            return None
        device = output.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(0)
        drawn = torch.rand(output.shape, generator=generators[device], device=device)
        moved = output.float() * (1 + torch.finfo(output.dtype).eps * (2 * drawn - 1))
        return moved.to(output.dtype)

    innermost = [module for module in model.modules() if not any(module.children())]
    hooks = [module.register_forward_hook(move) for module in innermost]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def differ_by_rounding(
    found: torch.Tensor, plain: torch.Tensor, noise: Callable[[], torch.Tensor]
) -> bool:
    """Whether logits differ from the plain ones by no more than rounding explains.

    Parameters
    ----------
    found, plain : float32 tensor of (..., vocabulary)
    noise
        Returns the plain logits `rerounded`.
    """
    return apart(found, plain) <= ROUNDING_FACTOR * apart(noise(), plain)
