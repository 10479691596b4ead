"""A site's attack on an adapter that it received: its own rows, on its own screen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config import recipes
from grandrounds.errors import DataError
from grandrounds.study.audit import own_site
from grandrounds.study.audit.membership import membership
from grandrounds.study.audit.own_site import SiteAudit, audit_site, notes, tables
from tests.own_sites import sites_of
from tests.runs import Settings, play

ONE_SITE = {
    "data.num-partitions": 1,
    "data.held-out-fraction": 0.4,
    "strategy.fraction-train": 1.0,
    "strategy.fraction-evaluate": 1.0,
    "strategy.name": "fedavg",
    "strategy.proximal-mu": 0.0,
    "num-server-rounds": 1,
    "train.training-arguments.max-steps": 1,
}


@pytest.fixture
def received(settings: Settings) -> Path:
    """An adapter after one step at a site with 72 training examples and 48 held-out ones."""
    return play(settings, **ONE_SITE) / "peft_1"


def test_an_attack_is_shown_at_the_site_and_changes_nothing_there(
    settings: Settings, tmp_path: Path, received: Path
) -> None:
    settings = {**settings, **ONE_SITE}
    [site] = sites_of(settings, tmp_path / "sites")
    found = audit_site(site, received, recipes.resolve(settings))
    assert (found.tuned.members, found.tuned.others) == (72, 48)
    assert not found.is_shifted  # rows are held out at random, and the base has seen none
    gains = [gain for _, gain in found.exposed]
    assert len(gains) == 10
    assert gains == sorted(gains, reverse=True)
    assert gains[0] != 0.0  # the adapter was in the model, and then was not
    before = {file: file.read_bytes() for file in site.path.parent.rglob("*") if file.is_file()}
    arguments = ["site", "audit", str(received), "--config", str(site.path)]
    shown = CliRunner().invoke(app, [*arguments, "--set", "train.num-threads=1"])
    assert shown.exit_code == 0
    assert f"{found.tuned.auc:.3f} (" in shown.stdout
    assert "a weak attack shows no protection" in shown.stdout
    assert all(file.read_bytes() == content for file, content in before.items())

    few = sites_of({**settings, "data.held-out-fraction": 0.1}, tmp_path / "few")[0]
    with pytest.raises(DataError, match="holds out 12 examples that can be scored"):
        audit_site(few, received, recipes.resolve(settings))


def test_rows_that_an_adapter_knows_by_heart_are_named(
    settings: Settings, tmp_path: Path, received: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three training answers are 5 nats likelier, number 8 by one more; no other one is."""
    [site] = sites_of({**settings, **ONE_SITE}, tmp_path / "sites")
    known = np.array([5.0 * (i % 3 != 0) + 1.0 * (i == 8 - 1) for i in range(72)] + [0.0] * 48)
    passes = iter([known - 9.0, np.full(120, -9.0)])
    monkeypatch.setattr(own_site, "log_likelihoods", lambda model, examples: next(passes))
    found = audit_site(site, received, recipes.resolve({**settings, **ONE_SITE}))
    assert found.tuned.auc == pytest.approx((48 + 24 / 2) / 72)  # 24 of 72 tie with all others
    assert [one.found for one in found.tuned.hits] == [48, 48]
    assert found.untuned.auc == 0.5
    assert [number for number, _ in found.exposed] == [8, 2, 3, 5, 6, 9, 11, 12, 14, 15]


def test_a_split_that_the_untuned_base_tells_apart_is_called_a_shift() -> None:
    is_member = np.arange(200) < 100
    apart, alike = np.where(is_member, 1.0, 0.0), np.arange(200) % 7 * 1.0
    shifted = SiteAudit(membership(apart, is_member), membership(apart, is_member), ((1, 2.0),))
    fair = SiteAudit(membership(apart, is_member), membership(alike, is_member), ((1, 2.0),))
    assert shifted.is_shifted
    assert "measures that shift too" in notes(shifted)[0]
    assert not fair.is_shifted
    assert not any("shift" in line for line in notes(fair))
    assert [table.rows[0][0] for table in tables(fair)] == ["AUC (0.5: by chance)", "1"]
