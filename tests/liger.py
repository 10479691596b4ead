"""Liger's functions by PyTorch's operations, for machines that cannot run Triton's kernels."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, silu

from grandrounds.model import fused


class Function:
    """What Liger's autograd functions look like from outside; `calls` counts their uses."""

    calls = 0

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        cls.calls += 1
        return cls.compute(*arguments)

    @staticmethod
    def compute(*arguments: Any) -> Any:
        raise NotImplementedError


class LigerRMSNormFunction(Function):
    @staticmethod
    def compute(
        x: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        offset: float,
        casting: str,
        in_place: bool,
    ) -> torch.Tensor:
        assert not in_place
        exact = x.float()
        scaled = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
        if casting == "gemma":
            return (scaled * (offset + weight.float())).to(x.dtype)
        return scaled.to(x.dtype) * (offset + weight)


class LigerSiLUMulFunction(Function):
    @staticmethod
    def compute(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return silu(gate.float()).to(up.dtype) * up


class LigerGELUMulFunction(Function):
    @staticmethod
    def compute(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gelu(gate.float(), approximate="tanh").to(up.dtype) * up


class LigerFusedGateUpSiLUMulFunction(Function):
    @staticmethod
    def compute(both: torch.Tensor) -> torch.Tensor:
        assert both.dim() == 2, "the gradient of Liger's kernel has two dimensions"
        gate, up = both.chunk(2, dim=-1)
        return silu(gate.float()).to(up.dtype) * up


class LigerRopeFunction(Function):
    @staticmethod
    def compute(
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        position_ids: None,
        unsqueeze_dim: int,
    ) -> tuple[torch.Tensor, ...]:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        width = cos.shape[-1]
        turned = []
        for t in (q, k):
            part, rest = t[..., :width], t[..., width:]
            left, right = part.chunk(2, dim=-1)
            part = part * cos + torch.cat([-right, left], dim=-1) * sin
            turned.append(torch.cat([part, rest], dim=-1))
        return tuple(turned)


FUNCTIONS = (
    LigerRMSNormFunction,
    LigerSiLUMulFunction,
    LigerGELUMulFunction,
    LigerFusedGateUpSiLUMulFunction,
    LigerRopeFunction,
)


def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `liger_kernel.ops` these functions for the duration of a test."""
    ops = ModuleType("liger_kernel.ops")
    for function in FUNCTIONS:
        function.calls = 0
        setattr(ops, function.__name__, function)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    monkeypatch.setattr(fused, "has_liger", lambda: True)
