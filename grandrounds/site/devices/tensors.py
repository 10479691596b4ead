"""How tensors go between the processes of a visit: `torch.distributed`, NCCL or gloo."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import distributed

from grandrounds.site.devices.channel import on_loopback

NCCL, GLOO = "nccl", "gloo"


@dataclass(frozen=True)
class Transport:
    """The process group that this process is in."""

    backend: str

    def to_others(self, tensor: torch.Tensor) -> None:
        """Send a tensor from rank 0 to all others."""
        distributed.broadcast(self._carried(tensor), src=0)

    def from_first(self, like: torch.Tensor) -> torch.Tensor:
        """Return the tensor that rank 0 sends, of this shape, on this device."""
        received = torch.empty_like(self._carried(like))
        distributed.broadcast(received, src=0)
        return received.to(like.device)

    def send(self, tensor: torch.Tensor) -> None:
        """Send a tensor to rank 0."""
        distributed.send(self._carried(tensor), dst=0)

    def receive(self, like: torch.Tensor, rank: int) -> torch.Tensor:
        """Return the tensor that a rank sends, of this shape, on this device."""
        received = torch.empty_like(self._carried(like))
        distributed.recv(received, src=rank)
        return received.to(like.device)

    def leave(self) -> None:
        """Leave the process group, whose other processes may have ended.

        NCCL's orderly end waits for them.
        """
        if self.backend == NCCL:
            distributed.distributed_c10d._abort_process_group()
        else:
            distributed.destroy_process_group()

    def _carried(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu() if self.backend == GLOO else tensor


def joined(backend: str, store: str, rank: int, count: int, seconds: float) -> Transport:
    """Make a process group with the other processes; all have to call it.

    Parameters
    ----------
    store : str
        File in which they find each other.
    seconds : float
        How long to wait for another process, now and at each tensor.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if backend == NCCL else None
    with on_loopback():
        distributed.init_process_group(
            backend,
            store=distributed.FileStore(store, count),  # type: ignore[attr-defined]
            rank=rank,
            world_size=count,
            timeout=datetime.timedelta(seconds=seconds),
            device_id=device,
        )
    return Transport(backend)


def flattened(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return float32 tensors in one row."""
    return torch.cat([t.detach().flatten() for t in tensors])


@torch.no_grad()
def set_values(
    parameters: Sequence[torch.nn.Parameter], received: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Set parameters to what is received, as one row of their shapes."""
    row = received(flattened(parameters))
    parts = torch.split(row, [p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.copy_(part.view_as(parameter))
