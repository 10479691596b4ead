"""A further process of a visit; `group.Group` starts it:

    python -P -m grandrounds.site.devices.worker SOCKET FOLDER

It does what rank 0 tells it over the socket, keeps its base between visits, and ends once the other
end is closed: when rank 0 closes it, or has ended in whatever way. It then removes the folder,
which a killed rank 0 leaves behind.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import sys
import threading
from typing import Any

import torch

from grandrounds.config.keys import FIELD_OF_KEY, SECTIONS, Config
from grandrounds.errors import GrandRoundsError, first_line
from grandrounds.model import machine
from grandrounds.model.base import is_out_of_memory
from grandrounds.model.loss import Forward, answer_nll_sum, attending
from grandrounds.model.resident import Resident, checkpoint_activations, keep_weights
from grandrounds.quiet import quiet_libraries
from grandrounds.site.devices.channel import Channel, unpacked
from grandrounds.site.devices.shares import Pass, backward
from grandrounds.site.devices.tensors import Transport, flattened, joined, set_values


class Worker:
    """What rank 0 may ask for: each method answers one kind of message, some without a reply."""

    _resident: Resident
    _forward: Forward
    _transport: Transport
    _trained: list[torch.nn.Parameter]
    _pad: int
    _result: torch.Tensor

    def load(self, config: dict[str, Any]) -> dict[str, Any]:
        """Load the base, unless it is there already; the reply tells that it is."""
        settled = _config_of(config)
        self._resident = machine.prepare_model(settled)
        self._forward = machine.forward(settled)
        return {"values": sum(p.numel() for p in self._resident.parameters.values())}

    def join(self, **how: Any) -> None:
        """Join the process group that rank 0 makes."""
        self._transport = joined(**how)

    def visit(
        self, trained: list[str], checkpointed_layers: int, kept_layers: int, pad_token_id: int
    ) -> dict[str, Any]:
        """Begin a visit that trains the parameters of these names; the reply tells that it may."""
        resident, self._pad = self._resident, pad_token_id
        checkpoint_activations(resident, checkpointed_layers)
        keep_weights(resident, kept_layers, self._forward.bf16)
        for name, parameter in resident.parameters.items():
            parameter.requires_grad_(name in trained)
        self._trained = [resident.parameters[name] for name in trained]
        return {}

    def adapter(self) -> None:
        """Receive the whole adapter."""
        set_values([*self._resident.parameters.values()], self._transport.from_first)

    def step(self) -> None:
        """Receive what the last step has changed."""
        set_values(self._trained, self._transport.from_first)

    def gradient(self, examples: list[Any], step_tokens: int, seed: int) -> dict[str, Any]:
        """Compute the gradient of a pass; the reply tells which parameters have one."""
        self._resident.model.train()
        for parameter in self._trained:
            parameter.grad = None
        one = Pass(unpacked(examples), step_tokens, seed)
        resident = self._resident
        loss = backward(resident.model, one, self._pad, resident.device, self._forward)
        found = [p.grad is not None for p in self._trained]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trained]
        self._result = flattened([*parts, loss])
        return {"found": found}

    def send(self) -> None:
        """Send the gradient, and the loss behind it."""
        self._transport.send(self._result)

    @torch.no_grad()
    def evaluate(self, examples: list[Any]) -> dict[str, Any]:
        """Compute the held-out loss of a batch, in nats."""
        model, how = self._resident.model.eval(), self._forward
        batch, device = unpacked(examples), self._resident.device
        with attending(model, how):
            return {"nll": float(answer_nll_sum(model, batch, self._pad, device, how))}


def _config_of(flat: dict[str, Any]) -> Config:
    """Return the configuration that rank 0 has, which was validated there."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, (section, field) in FIELD_OF_KEY.items():
        sections[section][field] = flat[key]
    return Config(**{name: make(**sections[name]) for name, make in SECTIONS.items()})


def serve(channel: Channel, folder: str) -> None:
    """Do what rank 0 says until it closes its end."""
    told: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                told.put(channel.told())
        except (EOFError, OSError):  # in the middle of a pass too: nobody waits for its result
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    worker = Worker()
    while True:
        message = told.get()
        try:
            reply = getattr(worker, message.pop("do"))(**message)
        except Exception as error:  # rank 0 raises it: there it ends the visit
            known = isinstance(error, GrandRoundsError)
            name = "" if known else f"{type(error).__name__}: "
            reason = f"{name}{first_line(error, 2000 if known else 200)}"
            reply = {"failed": reason, "memory": is_out_of_memory(error)}
        if reply is not None:
            channel.tell(**reply)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0
    quiet_libraries()
    serve(Channel(socket.socket(fileno=int(sys.argv[1]))), sys.argv[2])
