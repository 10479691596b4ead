"""Whether a visit fits, and what is told where it does not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.data import main_memory
from grandrounds.errors import ModelError
from grandrounds.model import fused, headroom
from grandrounds.model.architectures import find_architecture
from grandrounds.model.base import BaseSpec
from grandrounds.model.lora import LoraSpec
from grandrounds.model.memory import Precision
from grandrounds.model.resident import Resident, resident_model
from tests.conftest import make_base, write_flashcards

MIB = 2**20


@pytest.fixture(autouse=True)
def _undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headroom, "_settled", {})
    monkeypatch.setattr(headroom, "_kept", {})


@pytest.fixture
def config(settings: dict[str, Any]) -> Config:
    return recipes.resolve(settings)


def having(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(headroom, "free_bytes", lambda: free)


def needs(config: Config, *, checkpointing: bool | int) -> int:
    found = headroom.site_needs(config, checkpointing=checkpointing)
    assert found is not None
    return found.total


@pytest.mark.parametrize("wanted", [False, 1, 3, True])
def test_auto_checkpoints_as_few_layers_as_fit(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool | int
) -> None:
    """Of four layers. With no more than planned it does not fit: an allocator wastes some."""
    base = make_base(tmp_path / "deep", layers=4, hidden=64)
    config = recipes.resolve({**settings, "model.name": str(base)})
    planned = needs(config, checkpointing=wanted)
    having(monkeypatch, int(planned / headroom.HEADROOM) + 1)
    assert headroom.checkpoints_activations(config) is wanted
    headroom._settled.clear()
    having(monkeypatch, planned)
    more = headroom.checkpoints_activations(config)
    assert more is True or int(more) > int(wanted)


def fused_on_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = (fused.LORA,)
    precision = Precision(4, 2, True, True, frozenset(pieces))
    monkeypatch.setattr(headroom, "fused_pieces", lambda config: pieces)
    monkeypatch.setattr(headroom, "device_precision", lambda config: precision)


def test_as_many_weights_are_kept_dequantised_as_fit_beside_all_activations(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "deep", layers=4, hidden=64)
    flat = {**settings, "model.name": str(base)}
    config = recipes.resolve(flat)
    assert headroom.kept_layers(config) == 0  # of a base that is not in 4 bits
    fused_on_four_bits(monkeypatch)
    for layers in (4, 2, 0):
        headroom._kept.clear()
        headroom._settled.clear()
        planned = headroom.site_needs(config, checkpointing=False, kept_layers=layers)
        assert planned is not None
        having(monkeypatch, int(planned.total / headroom.HEADROOM) + 1)
        assert headroom.kept_layers(config) == layers
        assert headroom.visit_needs(config) == planned
    having(monkeypatch, 2**40)
    again = recipes.resolve({**flat, "model.gradient-checkpointing": True})
    assert headroom.kept_layers(again) == 0  # where memory is asked for, none is spent on speed


def test_running_out_steps_to_more_layers_until_all_are_checkpointed(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 32: 0, 16, 24, all. Without a plan for the family: all at once."""
    llama = find_architecture("meta-llama/Meta-Llama-3-8B")
    monkeypatch.setattr(headroom, "architecture_of", lambda name: llama)
    steps: list[bool | int] = [False]
    while steps[-1] is not True:
        steps.append(headroom.more_layers(config, steps[-1]))
    assert steps == [False, 16, 24, True]
    monkeypatch.setattr(headroom, "architecture_of", lambda name: None)
    assert headroom.more_layers(config, False) is True


def test_what_is_set_is_not_questioned(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    having(monkeypatch, 1)
    for wanted in (True, False):
        config = recipes.resolve({**settings, "model.gradient-checkpointing": wanted})
        assert headroom.checkpoints_activations(config) is wanted


def test_a_family_that_is_not_known_checkpoints_under_auto(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headroom, "architecture_of", lambda name: None)
    assert headroom.checkpoints_activations(config)


def test_a_container_leaves_what_its_group_allows(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text("30\n")
    for limit, left in (("100\n", 70), ("max\n", sys.maxsize), ("20\n", 0)):
        (tmp_path / "memory.max").write_text(limit)
        assert main_memory.container_bytes(tmp_path) == left
    assert main_memory.container_bytes(tmp_path / "none") == sys.maxsize


def test_a_unit_leaves_what_its_own_group_allows_cached_files_counted_as_free(
    tmp_path: Path,
) -> None:
    """systemd's MemoryMax stands in the group of the unit, not in that of the machine."""
    own, unit = tmp_path / "cgroup", tmp_path / "system.slice" / "agent.service"
    own.write_text("4:memory:/old\n0::/system.slice/agent.service\n")
    unit.mkdir(parents=True)
    groups = main_memory._groups(tmp_path, own)
    assert groups == [tmp_path, tmp_path / "system.slice", unit]
    for name, text in (
        ("max", "1000\n"),
        ("current", "700\n"),
        ("stat", "anon 400\ninactive_file 200\nactive_file 100\n"),
    ):
        (unit / f"memory.{name}").write_text(text)
    assert [main_memory._group_bytes(group) for group in groups] == [sys.maxsize, sys.maxsize, 600]
    assert main_memory._groups(tmp_path, tmp_path / "none") == [tmp_path]


def test_a_visit_that_is_known_not_to_fit_is_refused_with_what_would(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One planned at 22.5 GiB was started with 2.6 GiB free."""
    headroom.check_fits(config)
    needs = headroom.site_needs(config, checkpointing=True)
    assert needs is not None
    monkeypatch.setattr(headroom, "free_bytes", lambda: needs.total - 1)
    with pytest.raises(ModelError, match=r"does not fit into memory: it needs \d+ MiB with grad"):
        headroom.check_fits(config)
    monkeypatch.setattr(headroom, "architecture_of", lambda name: None)
    headroom.check_fits(config)


# --- Running out ----------------------------------------------------------------------------------


@pytest.fixture
def resident(config: Config) -> Resident:
    return resident_model(
        BaseSpec(config.model.name, 0, "float32"), LoraSpec(4, 8.0, "q_proj,v_proj", 0.0)
    )


SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
def test_a_visit_that_runs_out_is_run_again_from_its_start_with_checkpointing(
    config: Config, resident: Resident, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    having(monkeypatch, 2**40)
    starts, checkpointing = [], []

    def visit() -> str:
        starts.append([p.detach().clone() for p in resident.parameters.values()])
        checkpointing.append(resident.checkpoints_activations)
        with torch.no_grad():
            for parameter in resident.parameters.values():
                parameter.add_(1.0)
        if not resident.checkpoints_activations:
            raise error
        return "done"

    assert headroom.run_visit(config, resident, visit) == "done"
    assert checkpointing == [False, True]
    for first, second in zip(*starts, strict=True):
        assert torch.equal(first, second)
    assert headroom.run_visit(config, resident, visit) == "done"
    assert checkpointing == [False, True, True]  # it is not tried in vain again


def test_a_visit_that_runs_out_lets_go_of_kept_weights_first(
    config: Config, resident: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    having(monkeypatch, 2**40)
    fused_on_four_bits(monkeypatch)
    kept: list[int] = []
    monkeypatch.setattr(fused, "keep_weights", lambda model, layers, bf16: kept.append(layers))
    tried: list[tuple[int, bool]] = []

    def visit() -> str:
        tried.append((kept[-1], resident.checkpoints_activations))
        if len(tried) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert headroom.run_visit(config, resident, visit) == "done"
    assert tried == [(2, False), (0, False), (0, True)]
    assert headroom.run_visit(config, resident, visit) == "done"
    assert tried[3:] == [(0, True)]


def test_an_error_of_another_kind_is_not_taken_for_a_lack_of_memory(
    config: Config, resident: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    having(monkeypatch, 2**40)

    def visit() -> None:
        raise RuntimeError("shape '[32, 0]' is invalid")

    with pytest.raises(RuntimeError, match="is invalid"):
        headroom.run_visit(config, resident, visit)
    explained = headroom.explaining_out_of_memory(config, False)
    with pytest.raises(RuntimeError, match="is invalid"), explained:
        visit()


def message_of(config: Config, checkpointing: bool) -> str:
    explained = headroom.explaining_out_of_memory(config, checkpointing)
    with pytest.raises(ModelError) as caught, explained:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    return str(caught.value)


def test_the_plans_figures_and_what_would_fit_are_told(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits by the plan itself: every setting named takes less than what is there."""
    free = int(1.2 * needs(config, checkpointing=True))
    having(monkeypatch, free)
    message = message_of(config, False)
    assert "on a batch of 4 x 512 tokens without gradient checkpointing" in message
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB)" in message
    assert f"Planned: {needs(config, checkpointing=False) / MIB:.0f} MiB" in message
    assert f"{free / MIB:.0f} MiB available" in message
    assert "What would fit: model.gradient-checkpointing = true (" in message
    sizes = [float(s) for s in re.findall(r"\((\d+) MiB\)", message.partition("would fit")[2])]
    assert sizes
    assert all(size <= free / MIB for size in sizes)


def test_a_smaller_batch_trains_on_as_many_examples_a_step(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = dict(headroom.smaller_settings(config, True))
    half = (
        "train.training-arguments.per-device-train-batch-size = 2 with "
        "gradient-accumulation-steps = 2"
    )
    assert offered[half] < needs(config, checkpointing=True)
    assert all("accumulation-steps = 8" not in setting for setting in offered)  # of a batch of 4


def test_where_nothing_fits_the_least_is_told(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    having(monkeypatch, 1000)
    message = message_of(config, True)
    least = min(need for _, need in headroom.smaller_settings(config, True))
    assert f"No setting fits; the smallest takes {least / MIB:.0f} MiB" in message


def test_a_base_that_cannot_be_planned_is_told_too(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headroom, "architecture_of", lambda name: None)
    assert "cannot be planned" in message_of(config, True)


LIMITED = """
import resource, sys
import psutil, torch
torch.set_num_threads(1)
from grandrounds import client_app, server_app
from grandrounds.model import machine
from grandrounds.cli import app
import datasets, peft, bitsandbytes, scipy.linalg
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from grandrounds.data.sources import load_rows
load_rows("formulary", question_column="input", answer_column="output")
room = int(sys.argv.pop(1)) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + room,) * 2)
app(sys.argv[1:])
"""


def run_with_room(
    mib: int, tmp_path: Path, *assignments: str, layers: int = 12
) -> subprocess.CompletedProcess[str]:
    """Run one round of one site, a base of small layers on 400 flashcards at a time, in a
    process that gets `mib` of memory and no more once everything is imported."""
    base = make_base(tmp_path / "base", layers=layers)
    cards = write_flashcards(tmp_path / "cards.jsonl", 400)
    settings = [
        "strategy.fraction-evaluate=0.0",
        "strategy.fraction-train=1.0",
        "data.held-out-fraction=0.0",
        "data.num-partitions=1",
        "train.num-threads=1",
        "train.training-arguments.per-device-train-batch-size=400",
        "train.training-arguments.max-steps=1",
        "model.lora.target-modules=q_proj,v_proj",
        *assignments,
    ]
    options = [*("--model", str(base), "--data", str(cards), "--rounds", "1", "--plain")]
    options += [*("--run-dir", str(tmp_path / "run")), *(w for s in settings for w in ("--set", s))]
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(mib), "run", *options],
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"},  # what is let go goes back at once
    )


limits = pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")


@limits
@pytest.mark.slow
def test_memory_that_really_runs_out_is_one_line_and_nothing_is_half_written(
    tmp_path: Path,
) -> None:
    """Some 2 GiB are needed, and more than 500 MiB with checkpointing."""
    done = run_with_room(300, tmp_path, layers=24)
    assert done.returncode == 1, done.stderr
    assert "Memory ran out on a batch of 400 x 512 tokens with gradient" in done.stderr
    assert "What would fit: train.training-arguments.per-device-train-batch-size = " in done.stderr
    assert "Traceback" not in done.stderr
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text())["status"] == "failed"
    assert not [f for f in run.rglob("*") if ".partial" in f.name or f.name.startswith("peft_")]


@limits
@pytest.mark.slow
def test_where_only_checkpointing_fits_a_run_goes_through_with_it(tmp_path: Path) -> None:
    """Between 450 and 600 MiB both hold."""
    room = 525
    without = run_with_room(room, tmp_path / "without", "model.gradient-checkpointing=false")
    assert without.returncode == 1
    assert "Memory ran out" in without.stderr
    done = run_with_room(room, tmp_path / "auto")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "auto" / "run" / "summary.json").read_text())
    assert summary["status"] == "completed"
