"""The processes of a visit as the site's own process sees them: it is rank 0, and leads.

They start with the first visit, keep their base, and end with the run or with this process, however
that ends. A failure of one ends them all, and the visit; the next visit starts them anew.

Tensors are sent only once the sender has said that it is ready: whoever dies, hangs or runs out of
memory is noticed on a socket, and nobody waits for a tensor that does not come.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from grandrounds.config.keys import Config
from grandrounds.data.tokenization import TokenizedExample
from grandrounds.errors import ModelError
from grandrounds.model.devices import processes
from grandrounds.model.resident import Resident
from grandrounds.site.devices.channel import Channel, packed
from grandrounds.site.devices.shares import Pass
from grandrounds.site.devices.tensors import GLOO, NCCL, Transport, flattened, joined

LOADING_SECONDS = 1800.0
"""How long a process may take to start and to load its base."""

PATIENCE_SECONDS = 120.0
"""How long one may take longer than rank 0 over its share, ten times that if it is more; shares
have about as many tokens each."""

ENDING_SECONDS = 5.0
"""Between closing a process's socket and killing it."""


@dataclass(frozen=True)
class Other:
    """A process of another rank."""

    rank: int
    device: str
    """`cuda:1` or `the CPU`."""
    process: subprocess.Popen[bytes]
    channel: Channel
    errors: Path
    """File of its standard error."""


class Group:
    """Rank 0 of a visit's processes, and the others.

    Raises
    ------
    ModelError
        From every method, with rank and device, if a process has failed; all have ended then.
    torch.OutOfMemoryError
        If it ran out of memory in a pass.
    """

    def __init__(self, count: int) -> None:
        if distributed.is_initialized():
            raise ModelError(
                "train.devices: this process already belongs to a group of torch.distributed, so "
                "that it cannot lead one. Start it without torchrun or accelerate launch, or set "
                "train.devices = 1."
            )
        self.count = count
        self.loading: Config | None = None
        """The configuration whose base the others load, until a visit begins."""
        self._folder = Path(tempfile.mkdtemp(prefix="grandrounds-devices-"))
        self._transport: Transport | None = None
        self._parameters: list[torch.nn.Parameter] = []
        self._others: list[Other] = []
        with self._ending_all():
            for rank in range(1, count):
                self._others.append(self._started(rank))

    def _started(self, rank: int) -> Other:
        ours, theirs = socket.socketpair()
        device, environment = _place(rank)
        errors = self._folder / f"rank-{rank}.log"
        module = "grandrounds.site.devices.worker"
        words = ("-P", "-m", module, str(theirs.fileno()), str(self._folder))
        with theirs, errors.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=[theirs.fileno()],
                env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        return Other(rank, device, process, Channel(ours), errors)

    # --- A visit ----------------------------------------------------------------------------------

    def load(self, config: Config) -> None:
        """Let the others load the base of a configuration; `begin` waits for them."""
        with self._ending_all():
            for other in self._others:
                self._tell(other, do="load", config=config.flat())
            self.loading = config

    def begin(self, resident: Resident, trained: Sequence[str], pad_token_id: int) -> None:
        """Begin a visit with the adapter that is on the resident model.

        Parameters
        ----------
        trained
            Names of the parameters that get a gradient.
        """
        with self._ending_all():
            values = sum(p.numel() for p in resident.parameters.values())
            for other in self._others:
                if (told := self._told(other, LOADING_SECONDS)["values"]) != values:
                    raise ModelError(
                        f"{_named(other)} has an adapter of {told:,} values, and rank 0 one of "
                        f"{values:,}: the files of the base have changed since. Run again."
                    )
            self.loading = None
            if self._transport is None:
                self._transport = self._join()
            for other in self._others:
                self._tell(
                    other,
                    do="visit",
                    trained=list(trained),
                    checkpointed_layers=resident.checkpointed_layers,
                    kept_layers=resident.kept_layers,
                    pad_token_id=pad_token_id,
                )
            for other in self._others:
                self._told(other, PATIENCE_SECONDS)
                self._tell(other, do="adapter")
            with self._naming_the_lost("the adapter"):
                self._transport.to_others(flattened([*resident.parameters.values()]))
            self._parameters = [resident.parameters[name] for name in trained]

    def _join(self) -> Transport:
        gpus = {_gpu_of(rank) for rank in range(self.count)}
        on_gpus = torch.cuda.is_available() and len(gpus) == self.count
        how = {
            "backend": NCCL if on_gpus else GLOO,
            "store": str(self._folder / "store"),
            "count": self.count,
            "seconds": PATIENCE_SECONDS,
        }
        for other in self._others:
            self._tell(other, do="join", rank=other.rank, **how)
        with self._naming_the_lost("the process group"):
            return joined(rank=0, **how)  # type: ignore[arg-type]

    def step(self) -> None:
        """Send what an optimizer step has changed."""
        with self._ending_all(), self._naming_the_lost("the adapter"):
            for other in self._others:
                self._tell(other, do="step")
            self._joined.to_others(flattened(self._parameters))

    def losses(
        self, passes: Sequence[Pass], own: Callable[[Pass], torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """Compute passes on all devices; yield their losses in order.

        `.grad` gets the passes' gradients one after another in this order, as in one process.

        Parameters
        ----------
        own
            Adds the gradient of a pass to `.grad` here, and returns its loss.
        """
        like = flattened([*self._parameters, torch.zeros((), device=self._parameters[0].device)])
        for start in range(0, len(passes), self.count):
            mine, *theirs = passes[start : start + self.count]
            others = self._others[: len(theirs)]
            with self._ending_all():
                for other, one in zip(others, theirs, strict=True):
                    self._tell(
                        other,
                        do="gradient",
                        examples=packed(one.examples),
                        step_tokens=one.step_tokens,
                        seed=one.seed,
                    )
                began = time.monotonic()
                loss = own(mine)
                patience = max(PATIENCE_SECONDS, 10 * (time.monotonic() - began))
                found = [self._told(other, patience)["found"] for other in others]
            yield loss
            for other, has_gradient in zip(others, found, strict=True):
                with self._ending_all(), self._naming_the_lost("its gradient", other):
                    self._tell(other, do="send")
                    row = self._joined.receive(like, other.rank)
                yield self._add(row, has_gradient)

    @torch.no_grad()
    def _add(self, row: torch.Tensor, found: Sequence[bool]) -> torch.Tensor:
        """Add a gradient to `.grad`, as autograd does; return the loss behind it."""
        *parts, loss = torch.split(row, [*(p.numel() for p in self._parameters), 1])
        sums: list[torch.Tensor] = []
        added: list[torch.Tensor] = []
        for parameter, part, has in zip(self._parameters, parts, found, strict=True):
            gradient = part.view_as(parameter)
            if has and parameter.grad is None:
                parameter.grad = gradient.clone()
            elif has and parameter.grad is not None:
                sums.append(parameter.grad)
                added.append(gradient)
        if sums:
            torch._foreach_add_(sums, added)
        return loss.squeeze(0)

    def evaluated(
        self,
        batches: Sequence[Sequence[TokenizedExample]],
        own: Callable[[Sequence[TokenizedExample]], float],
    ) -> Iterator[float]:
        """Compute the loss of batches on all devices; yield them in order."""
        for start in range(0, len(batches), self.count):
            mine, *theirs = batches[start : start + self.count]
            others = self._others[: len(theirs)]
            with self._ending_all():
                for other, batch in zip(others, theirs, strict=True):
                    self._tell(other, do="evaluate", examples=packed(batch))
                began = time.monotonic()
                nll = own(mine)
                patience = max(PATIENCE_SECONDS, 10 * (time.monotonic() - began))
                told = [float(self._told(other, patience)["nll"]) for other in others]
            yield from (nll, *told)

    # --- What can go wrong ------------------------------------------------------------------------

    @property
    def _joined(self) -> Transport:
        assert self._transport is not None  # by `begin`
        return self._transport

    def _tell(self, other: Other, **message: Any) -> None:
        try:
            other.channel.tell(**message)
        except OSError as error:
            raise self._lost(other) from error

    def _told(self, other: Other, seconds: float) -> dict[str, Any]:
        """Return what a process answers."""
        try:
            answer = other.channel.told(seconds)
        except TimeoutError as error:
            raise ModelError(
                f"{_named(other)} has not answered for {seconds:g} s and was ended, and with it "
                f"the visit. {_ADVICE}"
            ) from error
        except EOFError as error:
            raise self._lost(other) from error
        if "failed" not in answer:
            return answer
        if answer["memory"]:
            raise torch.OutOfMemoryError(f"{_named(other)}: {answer['failed']}")
        raise ModelError(f"{_named(other)}: {answer['failed']}")

    @contextlib.contextmanager
    def _naming_the_lost(self, what: str, other: Other | None = None) -> Iterator[None]:
        """Raise a failure of torch.distributed as one of the process that is the cause."""
        try:
            yield
        except RuntimeError as error:
            ended = [one for one in self._others if _has_ended(one)]
            if ended:
                raise self._lost(ended[0]) from error
            who = _named(other) if other else f"One of ranks 1 to {self.count - 1}"
            raise ModelError(
                f"{who} did not take or send {what} within {PATIENCE_SECONDS:g} s and was ended, "
                f"and with it the visit. {_ADVICE}"
            ) from error

    def _lost(self, other: Other) -> ModelError:
        """Return the error for a process that has ended."""
        if not _has_ended(other):
            return ModelError(f"{_named(other)} has closed its socket. {_ADVICE}")
        code = other.process.returncode
        if code < 0:
            how = f"was ended by signal {-code} ({signal.Signals(-code).name})"
        else:
            lines = other.errors.read_text(errors="replace").strip().splitlines()
            how = f"ended with exit code {code} ({lines[-1][:200] if lines else 'no message'})"
        return ModelError(f"{_named(other)} {how}, and with it the visit. {_ADVICE}")

    @contextlib.contextmanager
    def _ending_all(self) -> Iterator[None]:
        """End all processes if the block fails, by Ctrl-C too."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the other processes; return once none is left."""
        for other in self._others:
            other.channel.close()
        deadline = time.monotonic() + ENDING_SECONDS
        for other in self._others:
            try:
                other.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                other.process.kill()
                other.process.wait()
        self._others = []
        if self._transport is not None:
            self._transport.leave()
            self._transport = None
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def is_closed(self) -> bool:
        """Whether the other processes have ended."""
        return not self._others


_ADVICE = (
    "A process killed by signal 9 often means that main memory ran out. The next visit starts its "
    "processes anew; train.devices = 1 does without them."
)


def _named(other: Other) -> str:
    return f"Rank {other.rank} on {other.device}"


def _has_ended(other: Other) -> bool:
    """Whether a process has ended, or does so within a second of closing its sockets."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        other.process.wait(1.0)
    return other.process.returncode is not None


def _gpu_of(rank: int) -> int:
    """Return the number of a rank's GPU among those in view."""
    return rank


def _place(rank: int) -> tuple[str, dict[str, str]]:
    """Return a rank's device in words, and an environment in which it is the only GPU in view."""
    if not torch.cuda.is_available():
        return "the CPU", dict(os.environ)
    number = _gpu_of(rank)
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpu = listed.split(",")[number] if listed else str(number)
    return f"cuda:{number}", {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}


# --- The group of this process --------------------------------------------------------------------

_group: Group | None = None


def start(config: Config) -> None:
    """Let the other processes of a configuration load the base while this one does; none with
    `train.devices = 1`."""
    global _group
    count = processes(config)
    if _group and (_group.is_closed or _group.count != count):
        end()
    if _group and _group.loading not in (None, config):  # for a visit that did not come
        end()
    if count == 1 or (_group and _group.loading):
        return
    if _group is None:
        _group = Group(count)
    _group.load(config)


def begun(
    config: Config, resident: Resident, trained: Sequence[str], pad_token_id: int
) -> Group | None:
    """Return the processes of a visit, ready for its passes; None with one device."""
    if processes(config) == 1:
        return None
    start(config)  # unless it was, and nothing has failed since
    assert _group is not None
    _group.begin(resident, trained, pad_token_id)
    return _group


def end() -> None:
    """End the other processes of this one."""
    global _group
    if _group:
        _group.close()
        _group = None


atexit.register(end)
