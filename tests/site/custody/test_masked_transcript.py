"""All that leaves the agents of a masked run, with one record of one site changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Context, Message

from grandrounds.config import recipes
from grandrounds.wire.masks.rehearsal import identity_of, roster_of_run
from tests.masking import give_keys
from tests.own_sites import sites_of
from tests.runs import GOOD_SITES, Settings, play
from tests.site.custody.test_custody import grid_of_sites
from tests.site.custody.test_own_masks import MASKED_RUN, NEEDS_MASKS
from tests.transcripts import Left, left, with_same_coins

CHANGED = 2
"""The site of which one record is another one in the second run."""


def transcript(settings: Settings, folder: Path, *, changed: bool) -> list[Left]:
    """Return every reply of four sites in custody, from the roll call to the last round."""
    settings = {**settings, "run-directory": str(folder / "run")}
    sites = sites_of(settings, folder, **NEEDS_MASKS)
    seed, sent = recipes.resolve(settings).federation.seed, list[Left]()
    for i, site in enumerate(sites):
        give_keys(site, roster_of_run(seed, 4), identity_of(seed, i))
    if changed:
        cards = folder / f"site{CHANGED}" / "cards.jsonl"
        lines = cards.read_text().splitlines(keepends=True)
        others = [line.replace("Rest, and", "Walk, and") for line in lines[:1]]
        assert others != lines[:1]
        cards.write_text("".join(others + lines[1:]))

    def noted(message: Message, context: Context) -> Message:
        sent.append(left(reply := GOOD_SITES(message, context)))
        return reply

    play(settings, grid=grid_of_sites(settings, sites, noted))
    return sent


@pytest.mark.slow
@pytest.mark.usefixtures("by_the_runs_seed")
def test_with_the_same_coins_a_record_changes_nothing_but_the_masked_vectors_of_its_site(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No figure, size, text or order differs over two rounds, and no key, box or share.

    In round 2 the sum of round 1 tells: vectors are masked, and survivors signed, for the adapter
    that it made. Left out is `data-tag`, a keyed hash that every set-up of a site has for itself.
    """
    settings |= MASKED_RUN | {
        "strategy.fraction-evaluate": 0.0,  # a held-out loss is told in the clear
        "data.held-out-fraction": 0.0,
        "train.training-arguments.per-device-train-batch-size": 32,
    }
    begin = with_same_coins(monkeypatch)
    first = transcript(settings, tmp_path / "first", changed=False)
    begin()
    second = transcript(settings, tmp_path / "second", changed=True)
    for reply in (*first, *second):
        for record in reply.told[3].values():
            record.pop("data-tag", None)
    assert [one.told for one in first] == [two.told for two in second]
    pairs = zip(first, second, strict=True)
    differing = [one.told[0] for one, two in pairs if one.arrays != two.arrays]
    of_round_2 = ["train.masked"] * 4 + ["train.confirm"] * 4  # bound to another adapter
    assert differing == ["train.masked", *of_round_2]
