"""What an adapter is between the modules: float32 tensors under the names that PEFT saves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Adapter = Mapping[str, NDArray[np.float32]]
"""Name, such as `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, to tensor:
(rank, in-features) for A, (out-features, rank) for B."""

Shapes = Mapping[str, tuple[int, ...]]
"""Name → shape of each tensor."""

A, B = ".lora_A.weight", ".lora_B.weight"
"""How the names of the two factors end."""


def factor_of(name: str) -> str:
    """Return which factor a tensor is: `A` or `B`."""
    return "A" if ".lora_A." in name else "B"
