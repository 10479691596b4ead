"""A run's data in words: the one source for console, plan, report, comparison and model card.

At real sites the data are each site's own, whatever `static.dataset.name` and the partitioner say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grandrounds.config import recipes
from grandrounds.config.bases import REAL_BASE
from grandrounds.config.keys import Config
from grandrounds.config.words import NOT_TOLD, command, counted, place_name
from grandrounds.data.embedded import EMBEDDED
from grandrounds.data.formulary import FORMULARY
from grandrounds.wire.names import SOURCE
from grandrounds.wire.told import in_custody

Sites = Sequence[Mapping[str, Any]]
"""Introductions, as in sites.json; empty before the roll call."""


def are_real(sites: Iterable[Mapping[str, Any]]) -> bool:
    """Whether these are introductions of real sites: only they include the base's hash."""
    facts = list(sites)
    return bool(facts) and all(map(in_custody, facts))


def examples_text(trained: int, held_out: int | None) -> str:
    """Return `1,425 to train on, 75 held out`; what sites keep to themselves is not told."""
    held = f"{held_out:,}" if held_out is not None else NOT_TOLD
    return f"{trained:,} to train on, {held} held out"


def with_own_data(sites: Sites) -> Sites:
    """Return the sites that brought data of their own."""
    return [site for site in sites if in_custody(site) and site.get(SOURCE) not in EMBEDDED]


def named_data(source: str, count: int, partitioner: str, column: str) -> str:
    """Return data that a recipe names, with the number of sites and how they divide it."""
    is_used = column and partitioner in ("natural", "dirichlet")
    how = f"{partitioner} by {column}" if is_used else partitioner
    return f"{place_name(source)}, {counted(count, 'site')}, {how}"


def data_text(config: Config, sites: Sites = ()) -> str:
    """Return what is trained on and how it is divided: `formulary, 20 sites, iid`."""
    data = config.data
    real = [site for site in sites if in_custody(site)]
    own, count = with_own_data(sites), max(len(sites), data.num_partitions)
    if real and len(own) == len(sites):
        return f"each site's own, {counted(count, 'site')}"
    if len(real) == len(sites) > 0 and not own:
        brought = " and ".join(sorted({str(site[SOURCE]) for site in real}))
        return f"{brought}, all of it at each of {counted(count, 'site')}"
    named = named_data(config.static.name, count, data.partitioner, data.partition_by)
    if not real:
        return named
    return f"{named}; each site's own at {len(real)} of them"


def leaderboard_differences(config: Config, sites: Sites = ()) -> list[str]:
    """Return why a run is not comparable with FlowerTune's leaderboard; empty if it is."""
    if any(map(in_custody, sites)):
        return ["each site's own data"]
    return recipes.leaderboard_differences(config)


def leaderboard_text(config: Config, sites: Sites = ()) -> str:
    """Return `not comparable: ...`; empty if it is comparable, or the sites brought their data."""
    if any(map(in_custody, sites)):
        return ""
    reasons = "; ".join(recipes.leaderboard_differences(config))
    return f"not comparable: {reasons}" if reasons else ""


def start_text(config: Config) -> str:
    """Return the saved adapter from which a run goes on, with its hash; empty if it is drawn."""
    lora = config.lora
    if not lora.is_continued:
        return ""
    sha256 = f"sha256 {lora.from_adapter_sha256}" if lora.from_adapter_sha256 else "hash unknown"
    return f"{place_name(lora.from_adapter) or 'a saved adapter'}, {sha256}"


def named_start(config: Config) -> dict[str, str]:
    """Return the same as plan.json has it: place and hash."""
    lora = config.lora
    return {"place": place_name(lora.from_adapter), "sha256": lora.from_adapter_sha256}


def objective_text(config: Config) -> str:
    """Return what training on preferences minimises, in words."""
    train = config.train
    normalised = ", normalised by length" * train.dpo_length_normalised
    reference = {"base": "the base", "received": "the adapter as received"}[train.dpo_reference]
    return f"DPO, beta {train.dpo_beta:g}{normalised}; reference: {reference}"


def before_training(config: Config) -> str:
    """Return what the held-out loss of round 0 is of."""
    if config.lora.is_continued:
        return f"the adapter from which the run goes on ({start_text(config)})"
    return "the untrained base"


def is_of_the_formulary(config: Config, sites: Sites = ()) -> bool:
    """Whether the run trains on the formulary's fictional drugs."""
    named = config.is_on_formulary and not with_own_data(sites)
    return named and {site.get(SOURCE, FORMULARY) for site in sites} <= {FORMULARY}


def is_fictional(config: Config, sites: Sites = ()) -> bool:
    """Whether the run trains on built-in data, all of which are of drugs that do not exist."""
    return config.static.name in EMBEDDED and not with_own_data(sites)


def cautions(config: Config, sites: Sites = ()) -> list[str]:
    """Return what a reader of any answer or figure of this run must know about base and data."""
    return [*_of_base_and_data(config, sites), *_of_replay(config, sites)]


def _of_replay(config: Config, sites: Sites) -> list[str]:
    real, count = sum(map(in_custody, sites)), config.train.replay_examples
    if not count or not real:
        return []
    return [
        f"train.replay-examples = {count} has no effect at {counted(real, 'site')} with a policy: "
        "only a site's own examples train there"
    ]


def _of_base_and_data(config: Config, sites: Sites) -> list[str]:
    fictional = is_fictional(config, sites)
    if config.model.name == FORMULARY and not fictional:
        return [NO_ENGLISH]
    if config.model.name != FORMULARY and fictional:
        whose = "the formulary's" if is_of_the_formulary(config, sites) else "of"
        return [f"the data are {whose} fictional drugs; to train on your own: --data FILE"]
    return []


NO_ENGLISH = (
    "the embedded base has never read English, only the formulary's sentences: its answers to "
    f"anything else are nonsense. A real base: grandrounds base fetch {REAL_BASE}, then --model "
    f"{REAL_BASE}"
)
"""Said of every run on other data than the formulary over the embedded base."""


def engine_options(sites: Sites, summary: Mapping[str, Any] | None = None) -> str:
    """Return the options that run on the same engine again; empty for the default one.

    Parameters
    ----------
    summary
        As `on_finished` gets it: names the engine or the connection where they are known.
    """
    known = summary or {}
    if connection := known.get("connection"):
        return " " + command("--engine", "deployment", "--connection", connection)
    if engine := known.get("engine"):
        return f" --engine {engine}"
    return " --engine deployment --connection NAME" if are_real(sites) else ""
