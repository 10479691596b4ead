"""Fresh adapters, drawn from the seed alike at the server and at every site."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from grandrounds.wire import schedule as sampling
from grandrounds.wire.adapter import Adapter, Shapes


def initial_adapter(shapes: Shapes, generator: np.random.Generator) -> Adapter:
    """Return a fresh adapter: A uniform in ±1/sqrt(fan-in), B zero, so that it changes nothing.

    PEFT's own initialisation (Kaiming uniform with a = sqrt(5); Hu et al., LoRA (2021), section
    4.1, draw A from a Gaussian), from a generator that needs no base model.
    """
    adapter = {}
    for name, shape in shapes.items():
        if ".lora_A." in name:
            bound = 1.0 / np.sqrt(shape[1])
            adapter[name] = generator.uniform(-bound, bound, shape).astype(np.float32)
        else:
            adapter[name] = np.zeros(shape, dtype=np.float32)
    return adapter


def drawn_adapter(shapes: Shapes, seed: int, *round_number: int) -> Adapter:
    """Return the fresh adapter of a run, or of one of its rounds, which every site can draw."""
    return _drawn(tuple(shapes.items()), seed, *round_number)


@lru_cache(maxsize=2)
def _drawn(shapes: tuple[tuple[str, tuple[int, ...]], ...], *numbers: int) -> Adapter:
    drawn = initial_adapter(dict(shapes), sampling.adapter_generator(*numbers))
    for tensor in drawn.values():
        tensor.setflags(write=False)
    return drawn
