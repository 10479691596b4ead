"""Two processes with gloo on a CPU: the bits of one, and the end of all if one fails."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.engines.in_process import run_in_process
from grandrounds.errors import ModelError
from grandrounds.model import devices, headroom, machine
from grandrounds.model.resident import Resident, set_adapter
from grandrounds.server.listeners import Listener
from grandrounds.site import training
from grandrounds.site.devices import group
from grandrounds.site.devices.group import Group
from grandrounds.site.devices.shares import shares_of
from tests.processes import counted
from tests.real import wait_for
from tests.runs import Settings, adapter_bytes, interrupted_at, metrics_of, play, read_json
from tests.site.test_training import PAD, Batches, examples_of, weights
from tests.site.test_training import settings as visit_settings

EXAMPLES = examples_of([9, 14, 6, 11, 8, 12, 10, 7, 5])
BATCHES: Batches = [EXAMPLES[i : i + 4] for i in range(0, 9, 4)]
"""Two batches of four, and a last one with fewer examples than there are processes."""

DROPOUT = {"model.lora.dropout": 0.2}


@pytest.fixture(autouse=True)
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "usable_cpus", lambda: 2)


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    """Processes stay between the tests of this module, as between visits."""
    yield
    group.end()


def prepared(settings: Settings, **changes: Any) -> tuple[Config, Resident]:
    """Return the tiny base with an adapter that is random in every tensor."""
    config = recipes.resolve({**settings, "train.devices": 2, **changes})
    resident = machine.prepare_model(config)
    rng = np.random.default_rng(0)
    adapter = {
        name: (np.abs if "magnitude" in name else np.asarray)(
            0.1 * rng.normal(size=tuple(p.shape))
        ).astype(np.float32)
        for name, p in resident.parameters.items()
    }
    set_adapter(resident, adapter)
    return config, resident


Visited = tuple[list[torch.Tensor], training.VisitResult, int]
"""The adapter, what was measured, and the passes that this process computed."""


def visited(
    settings: Settings,
    *,
    alone: bool,
    only: str = "",
    parts: Callable[[str], tuple[slice, ...]] | None = None,
    batches: Batches = BATCHES,
    changes: Settings | None = None,
    **options: Any,
) -> Visited:
    """Train a visit: in this process alone, or with another one."""
    config, resident = prepared(settings, **(changes or {}))
    for name, parameter in resident.parameters.items():
        parameter.requires_grad_(only in name)
    names = [name for name in resident.parameters if only in name]
    others = None if alone else group.begun(config, resident, names, PAD)
    forward = machine.forward(config)
    how = visit_settings(shares=config.train.devices, forward=forward, group=others, **options)
    own = 0

    def counting(*arguments: Any) -> torch.Tensor:
        nonlocal own
        own += 1
        return original(*arguments)

    original, training.backward = training.backward, counting  # type: ignore[attr-defined]
    try:
        result = training.train_visit(
            resident.model,
            [resident.parameters[name] for name in names],
            batches,
            how,
            PAD,
            [parts(name) for name in names] if parts else None,
        )
    finally:
        training.backward = original  # type: ignore[attr-defined]
    return weights(resident), dataclasses.replace(result, seconds=0.0), own


def first_ranks(name: str) -> tuple[slice, ...]:
    """Return the trained part of a site with rank 2 of 4."""
    ranks = slice(0, 2)
    return (ranks, slice(None)) if ".lora_A." in name else (slice(None), ranks)


EVERYTHING: Settings = {"max_grad_norm": 0.05, "weight_decay": 0.3, "proximal_mu": 0.5}


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        (EVERYTHING, {}),
        ({**EVERYTHING, "accumulation_steps": 2}, {}),
        ({"seed": 11}, DROPOUT),
        ({"accumulation_steps": 2}, {"train.devices": 3}),
        ({}, {"train.batching": "padded", "train.response-only-logits": False}),
        ({}, {"model.gradient-checkpointing": True}),
        (EVERYTHING, {"model.lora.peft-use-dora": True}),
        ({**EVERYTHING, "only": ".lora_B."}, {}),
        ({**EVERYTHING, "parts": first_ranks}, {}),
    ],
    ids=[
        *("plain", "fedprox, clipping, decay", "accumulation", "dropout", "3 shares"),
        *("padded", "checkpointing", "dora", "ffa", "own rank"),
    ],
)
def test_two_processes_train_the_bits_of_one(
    settings: Settings, options: dict[str, Any], changes: Settings
) -> None:
    alone = visited(settings, alone=True, changes=changes, **options)
    both = visited(settings, alone=False, changes=changes, **options)
    for one, other in zip(alone[0], both[0], strict=True):
        assert torch.equal(one, other)
    assert both[1] == alone[1]
    assert alone[1].examples == 9
    assert 0 < both[2] < alone[2]  # the other process had the rest


def test_shares_are_accumulated_as_batches_of_their_own_are(settings: Settings) -> None:
    """The steps of a recipe with half the batch, and as many more of them in a step."""
    whole = BATCHES[:2]
    shares = [list(share) for batch in whole for share in shares_of(batch, 2)]
    divided, result, _ = visited(settings, alone=False, batches=whole, **EVERYTHING)
    one = {"train.devices": 1}
    apart, expected, _ = visited(
        *(settings,), alone=True, batches=shares, changes=one, accumulation_steps=2, **EVERYTHING
    )
    for a, b in zip(divided, apart, strict=True):
        assert torch.equal(a, b)
    assert result == expected


def test_dropout_of_a_share_has_a_seed_of_its_own(settings: Settings) -> None:
    first, again, other = (
        visited(settings, alone=True, changes=DROPOUT, seed=seed)[0] for seed in (5, 5, 6)
    )
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_the_held_out_loss_is_that_of_one_device(settings: Settings) -> None:
    config, resident = prepared(settings)
    others = group.begun(config, resident, [], PAD)
    assert others is not None
    how = machine.forward(config)
    loss = (resident.model, EXAMPLES, 2, PAD, how)
    assert training.held_out_loss(*loss, others) == training.held_out_loss(*loss)


def test_a_module_that_no_share_of_a_rank_has_reached_gets_no_gradient_from_it() -> None:
    """As an expert that no token was routed to: (1, 2) + (3, 4), and the second has none."""
    first, second, third = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    first.grad = torch.tensor([1.0, 2.0])
    rank_0 = Group.__new__(Group)
    rank_0._parameters = [first, second, third]
    row = torch.tensor([3.0, 4.0, 0.0, 0.0, 5.0, 6.0, 7.5])
    loss = rank_0._add(row, [True, False, True])
    assert first.grad.tolist() == [4.0, 6.0]
    assert second.grad is None
    assert third.grad is not None
    assert third.grad.tolist() == [5.0, 6.0]
    assert (loss.shape, float(loss)) == ((), 7.5)


# --- A process that fails -------------------------------------------------------------------------


def other_process() -> psutil.Process:
    assert group._group is not None
    [other] = group._group._others
    return psutil.Process(other.process.pid)


def failing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, harm: Callable[[psutil.Process], object]
) -> str:
    """Harm the other process during a pass of this one; return the error that ends the visit."""
    config, resident = prepared(settings)
    names = list(resident.parameters)
    others = group.begun(config, resident, names, PAD)
    process, passed = other_process(), training.backward  # type: ignore[attr-defined]

    def harming(*arguments: Any) -> torch.Tensor:
        harm(process)
        loss: torch.Tensor = passed(*arguments)
        return loss

    monkeypatch.setattr(training, "backward", harming)
    how = visit_settings(shares=2, forward=machine.forward(config), group=others)
    long = [examples_of([60] * 64)]
    parameters = list(resident.parameters.values())
    with pytest.raises((ModelError, torch.OutOfMemoryError)) as caught:
        training.train_visit(resident.model, parameters, long, how, PAD)
    monkeypatch.setattr(training, "backward", passed)
    assert not process.is_running()
    return str(caught.value)


def test_a_killed_process_ends_the_visit_in_one_line(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted() as living:
        said = failing(settings, monkeypatch, lambda process: process.kill())
        assert living() == []
    assert said.startswith("Rank 1 on the CPU was ended by signal 9 (SIGKILL), and with it the")
    assert said.count("\n") == 0


def test_the_next_visit_starts_its_processes_anew(settings: Settings) -> None:
    both = visited(settings, alone=False)
    alone = visited(settings, alone=True)
    assert all(map(torch.equal, both[0], alone[0]))


@pytest.mark.slow
def test_a_process_that_hangs_is_ended(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(group, "ENDING_SECONDS", 0.1)
    said = failing(settings, monkeypatch, lambda process: process.suspend())
    assert "Rank 1 on the CPU has not answered for" in said
    assert said.count("\n") == 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_AS"), reason="limits of other processes: Linux")
def test_a_process_without_memory_is_named(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(process: psutil.Process) -> None:
        held = process.memory_info().vms
        process.rlimit(psutil.RLIMIT_AS, (held, held))

    said = failing(settings, monkeypatch, limited)
    assert said.startswith("Rank 1 on the CPU: ")
    assert "memory" in said
    monkeypatch.setattr(headroom, "free_bytes", lambda: 2**40)
    config = recipes.resolve({**settings, "train.devices": 2})
    told = torch.OutOfMemoryError(said)

    def short() -> None:
        raise told

    explained = headroom.explaining_out_of_memory(config, True)
    with (
        pytest.raises(ModelError, match=r"a device's share of 2 x 512 tokens.*Rank 1 on"),
        explained,
    ):
        short()


def test_what_a_process_cannot_load_is_told_with_its_rank(
    settings: Settings, tmp_path: Path
) -> None:
    config, resident = prepared(settings)
    model = dataclasses.replace(config.model, name=str(tmp_path / "gone"))
    elsewhere = dataclasses.replace(config, model=model)
    group.start(elsewhere)
    with pytest.raises(ModelError, match=r"Rank 1 on the CPU: .*gone.* cannot be loaded"):
        group.begun(elsewhere, resident, list(resident.parameters), PAD)
    assert group._group is not None
    assert group._group.is_closed


SITE = """
import sys, time
from grandrounds.config import recipes
from grandrounds.model import devices
from grandrounds.site.devices import group

devices.usable_cpus = lambda: 2
group.start(recipes.resolve({"train.devices": 2, "train.num-threads": 1}))
[other] = group._group._others
print(other.process.pid, group._group._folder, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_nothing_is_left_of_a_killed_site(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SITE], stdout=subprocess.PIPE, text=True) as site:
        assert site.stdout is not None
        pid, folder = site.stdout.readline().split()
        other = psutil.Process(int(pid))
        assert Path(folder).is_dir()
        os.kill(site.pid, signal.SIGKILL)
    wait_for(lambda: not other.is_running() or other.status() == psutil.STATUS_ZOMBIE, 60)
    assert not Path(folder).exists()


# --- Whole runs -----------------------------------------------------------------------------------


def test_a_run_on_two_devices_and_its_resume_have_the_bits_of_one(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"train.devices": 2, "num-server-rounds": 2, **DROPOUT}
    started: list[int] = []
    start = Group.__init__

    def noted(self: Group, count: int) -> None:
        started.append(count)
        start(self, count)

    group.end()
    monkeypatch.setattr(Group, "__init__", noted)
    both = play(settings)
    assert started == [2]  # the same processes for all visits of the run
    [site, *_] = read_json(both / "sites.json")
    assert "2 shares a batch on 2 devices" in site["means"]
    assert site["device"] == "2 x CPU"

    with pytest.raises(KeyboardInterrupt):
        play(
            {**settings, "run-directory": str(tmp_path / "resumed")},
            listener=interrupted_at("round"),
        )
    resumed = play(
        recipes.load_recipe(tmp_path / "resumed" / "config.toml"),
        **{"resume-from": str(tmp_path / "resumed")},
    )
    resumed = tmp_path / "resumed"
    assert adapter_bytes(resumed, "peft_2") == adapter_bytes(both, "peft_2")

    monkeypatch.setattr(devices, "usable_cpus", lambda: 1)
    one = play({**settings, "run-directory": str(tmp_path / "one")})
    [site, *_] = read_json(one / "sites.json")
    assert "2 shares a batch on 1 device" in site["means"]
    assert adapter_bytes(one, "peft_2") == adapter_bytes(both, "peft_2")
    figures = ("train_loss", "held_out_loss", "tokens", "padding_tokens")
    assert [[line.get(f) for f in figures] for line in metrics_of(one)] == [
        [line.get(f) for f in figures] for line in metrics_of(both)
    ]


def test_the_processes_end_with_the_run(settings: Settings) -> None:
    config = recipes.resolve({**settings, "train.devices": 2, "num-server-rounds": 1})
    run_in_process(config, Listener())
    assert group._group is None
