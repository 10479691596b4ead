"""How a batch is divided, and what is refused; no process is started here."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from grandrounds.config import recipes
from grandrounds.config.digest import recipe_sha256
from grandrounds.data.tokenization import TokenizedExample
from grandrounds.errors import ConfigError, ModelError
from grandrounds.model import devices, headroom
from grandrounds.model.memory import share_size
from grandrounds.site.devices import group
from grandrounds.site.devices.shares import passes, shares_of
from grandrounds.site.devices.tensors import NCCL, Transport
from tests.runs import Settings


def batch_of(*lengths: int) -> list[TokenizedExample]:
    return [TokenizedExample(tuple(range(2, 2 + length)), 1) for length in lengths]


def lengths_of(shares: list[list[TokenizedExample]]) -> list[list[int]]:
    return [[len(e.input_ids) for e in share] for share in shares]


def test_shares_have_about_as_many_tokens_and_keep_the_order() -> None:
    """Longest first: 14 to the first, 11 and 9 to the second (20), 6 to the first (20)."""
    assert lengths_of(shares_of(batch_of(9, 14, 6, 11), 2)) == [[14, 6], [9, 11]]
    assert lengths_of(shares_of(batch_of(5, 5, 5, 5, 5), 2)) == [[5, 5, 5], [5, 5]]


def test_a_batch_of_fewer_examples_has_as_many_shares_as_examples() -> None:
    assert lengths_of(shares_of(batch_of(7), 4)) == [[7]]
    assert lengths_of(shares_of(batch_of(7, 8), 4)) == [[8], [7]]


def test_a_pass_has_a_seed_of_its_own_only_where_a_batch_is_divided() -> None:
    batches = [batch_of(4, 6), batch_of(5)]
    [first, second] = passes(batches, 1, 7, 0)
    assert (first.examples, second.examples) == tuple(batches)
    assert first.seed is second.seed is None
    assert first.step_tokens == second.step_tokens == 3 + 5 + 4
    divided = passes(batches, 2, 7, 0)
    assert lengths_of([one.examples for one in divided]) == [[6], [4], [5]]  # type: ignore[list-item]
    assert divided == passes(batches, 2, 7, 0)
    seeds = {one.seed for step in (0, 1) for one in passes(batches, 2, 7, step)}
    assert len(seeds) == 6


def test_there_are_no_more_processes_than_devices(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = recipes.resolve({**settings, "train.devices": 4})
    monkeypatch.setattr(devices, "usable_cpus", lambda: 3)
    assert devices.processes(four) == 3
    assert devices.processes(recipes.resolve(settings)) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.processes(four) == 2


def test_each_rank_has_one_gpu_in_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device, environment = group._place(2)
    assert (device, environment["CUDA_VISIBLE_DEVICES"]) == ("cuda:2", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8f1c")  # as Ray or an operator sets it
    device, environment = group._place(1)
    assert (device, environment["CUDA_VISIBLE_DEVICES"]) == ("cuda:1", "GPU-8f1c")


def test_private_visits_stay_on_one_device(settings: Settings) -> None:
    private = {
        "privacy.unit-guarantee": "example",
        "privacy.target-epsilon": 8.0,
        "privacy.declared-units": 27,
        "train.training-arguments.max-grad-norm": 0.0,
    }
    with pytest.raises(ConfigError, match=r"train.devices = 2 does not go with priv") as caught:
        recipes.resolve({**settings, **private, "train.devices": 2})
    assert str(caught.value).count("\n") == 0
    one = recipes.resolve({**settings, **private})
    asked = dataclasses.replace(one, train=dataclasses.replace(one.train, devices=2))
    assert devices.processes(asked) == 1


@pytest.mark.parametrize(("value", "allowed"), [(0, "at least 1"), (17, "at most 16"), ("2", "")])
def test_a_wrong_number_of_devices_is_refused(
    settings: Settings, value: object, allowed: str
) -> None:
    with pytest.raises(ConfigError, match=f"train.devices = .*{allowed}"):
        recipes.resolve({**settings, "train.devices": value})


def test_a_process_that_torchrun_started_cannot_lead(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ModelError, match="Start it without torchrun"):
        group.Group(2)


def test_a_recipe_with_one_device_keeps_its_hash(settings: Settings) -> None:
    one, two = (recipes.resolve({**settings, "train.devices": n}) for n in (1, 2))
    assert recipe_sha256(recipes.resolve(settings)) == recipe_sha256(one)
    assert recipe_sha256(one) != recipe_sha256(two)


def test_memory_is_planned_for_a_share(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU both processes share its memory."""
    monkeypatch.setattr(devices, "usable_cpus", lambda: 2)
    size = {"train.training-arguments.per-device-train-batch-size": 9}
    one, two = (recipes.resolve({**settings, **size, "train.devices": n}) for n in (1, 2))
    assert (share_size(one), share_size(two)) == (9, 5)
    whole, share = (headroom.site_needs(c, checkpointing=False) for c in (one, two))
    assert whole is not None
    assert share is not None
    assert share.activations / whole.activations == pytest.approx(5 / 9, rel=0.01)
    assert share.gradient * 2 == whole.gradient * 3  # autograd's, the proximal term's, received
    assert share.base == whole.base
    least = headroom.site_needs(two, checkpointing=True)
    assert least is not None
    monkeypatch.setattr(headroom, "free_bytes", lambda: 2 * least.total)
    headroom.check_fits(two)
    monkeypatch.setattr(headroom, "free_bytes", lambda: 2 * least.total - 2)
    with pytest.raises(ModelError, match="does not fit into memory"):
        headroom.check_fits(two)


def test_nccls_group_is_aborted_since_its_orderly_end_waits_for_the_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    aborted: list[bool] = []
    group_of = torch.distributed.distributed_c10d
    monkeypatch.setattr(group_of, "_abort_process_group", lambda: aborted.append(True))
    Transport(NCCL).leave()
    assert aborted == [True]
