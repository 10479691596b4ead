"""What a run needs, checked within a second: run directory, base, data, and sound amounts.

Loads neither torch nor transformers nor Flower. A hub's models and data are not looked up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from grandrounds.config.keys import Config
from grandrounds.config.validation import idle_last_round
from grandrounds.config.values import words_of
from grandrounds.data.embedded import EMBEDDED
from grandrounds.data.forms import INSTRUCTION
from grandrounds.data.formulary import FORMULARY
from grandrounds.data.own_prompt import check_prompt, columns_apart
from grandrounds.data.partitioning import Division, check_counts, check_gaps
from grandrounds.data.survey import Survey, survey
from grandrounds.data.tokenization import check_room, check_text
from grandrounds.errors import ModelError
from grandrounds.model.architectures import (
    find_architecture,
    target_modules,
    unmatched,
)
from grandrounds.model.location import check_location
from grandrounds.server.directory import check_vacant
from grandrounds.site.private.rehearsal import mechanism_of
from grandrounds.study.continued import check_start
from grandrounds.study.plan.forecast import kept_rows, site_sizes
from grandrounds.wire.guarantee import REHEARSAL
from grandrounds.wire.schedule import cohorts_of, evaluation_cohort_of, examples_of_a_visit

MOST_PASSES_A_VISIT = 5.0
"""Passes of one visit over a site's examples, beyond which a visit is warned of."""

MOST_PASSES_A_RUN = 20.0
"""Passes of a whole run over a site's examples, beyond which a run is warned of."""

MOST_HELD_OUT = 0.25
"""Share of the examples held out, beyond which it is warned of."""

LEAST_HELD_OUT = 10
"""Held-out examples of the evaluating sites, below which their loss is warned of."""

MOST_EMPTY = 0.1
"""Share of rows without question or answer, beyond which it is warned of."""

MOST_NAMED = 5
"""Rows and columns that are named; of further ones the number is told."""

HIGHEST_LEARNING_RATE = 1e-3
"""Learning rate beyond which LoRA on a pretrained base is warned of."""


def check(config: Config, from_round: int | None = None) -> list[str]:
    """Check what a run in this place needs; return warnings of damage and of unsound amounts.

    Parameters
    ----------
    from_round : int, optional
        The round after which a run is resumed; None is its last.

    Raises
    ------
    RunDirectoryError
        If the run directory is not empty or cannot be made, or a run cannot be resumed.
    ModelError
        If the base is a folder without a model, or a target is not one of its linear modules, or a
        saved adapter does not fit.
    DataError
        If the data are a file that is missing, damaged, without a column or without content, or
        cannot be divided among the sites.
    ConfigError
        If a private run cannot be calibrated, or a prompt template of one's own is not valid.
    """
    check_prompt(config.data.prompt_template, config.data.system_prompt)
    damage = check_place(config, from_round)
    unmatched = [*check_base(config), *check_start(config)]
    found = warnings(config, check_data(config))
    return [*damage, *unmatched, *found, *check_privacy(config)]


def check_privacy(config: Config) -> list[str]:
    """Calibrate the noise of a private run; return what its guarantee is worth here.

    Raises
    ------
    ConfigError
        If no units are declared, no noise reaches the target, or dp-accounting is missing.
    """
    if not config.is_private:
        return []
    mechanism_of(config)
    exact = "; its held-out losses are exact, and outside of the guarantee"
    told = exact if config.strategy.fraction_evaluate > 0 else ""
    guarantee = "only a site's own agent guarantees anything"
    return [f"this private run is {REHEARSAL}: {guarantee}{told}"]


def check_place(config: Config, from_round: int | None) -> list[str]:
    """Check the run directory of a new run, or the run that is resumed; return what is mended."""
    federation = config.federation
    if federation.resume_from:
        from grandrounds.server import resumption

        return resumption.check(config, from_round)
    if federation.run_directory:
        check_vacant(Path(federation.run_directory))
    return []


def check_base(config: Config) -> list[str]:
    """Check the base's folder, and the target modules where its architecture is known.

    Returns a warning of names that match nothing.
    """
    name, targets = config.model.name, config.lora.target_modules
    check_location(name)
    if set(words_of(targets)) <= {"auto", "all-linear"}:
        return []
    try:
        architecture = find_architecture(name)
    except ModelError:
        return []  # unknown without its weights; a run finds out
    found = target_modules(architecture, targets)
    missing = unmatched(targets, found)
    if not missing:
        return []
    return [
        f"{', '.join(missing)} of model.lora.target-modules match nothing in {name}: "
        f"{', '.join(found)} are adapted, as PEFT would"
    ]


def check_data(config: Config) -> Survey | None:
    """Check the data and their division among the sites; None if they are not surveyed."""
    data, by = config.data, config.data.partition_by
    named = data.question_column, data.answer_column, by
    rejected = data.rejected_column if config.is_on_pairs else ""
    found = survey(config.static.name, *named, data.prompt_template, rejected)
    if found is not None:
        check_text(data.prompt_template, found.texts, found.usable)
        alone = found.with_system_only
        check_room(data.prompt, found.conversations, found.usable, alone)
        if data.partitioner in ("natural", "dirichlet"):
            check_gaps(by, found.unlabelled, found.rows)
        division = Division(data.partitioner, by, data.dirichlet_alpha)
        check_counts(division, data.num_partitions, found.rows, len(found.usable_by_label))
    return found


# --- Amounts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """What a run will do with the examples of one site."""

    train: int
    """Training examples."""
    held_out: int
    """Held-out examples."""
    visit: int
    """Examples in one visit, repeats included."""
    visits: int
    """Visits in the whole run."""


def sites_of(config: Config, found: Survey) -> list[Site]:
    """Return the sites with their examples; under `dirichlet` as if they were of equal size."""
    data = config.data
    if data.partitioner == "natural":
        sizes = [found.usable_by_label[label] for label in sorted(found.usable_by_label)]
    else:
        sizes = site_sizes(config, found.usable)
    visits: Mapping[int, int] = Counter(site for cohort in cohorts_of(config) for site in cohort)
    sites = []
    for number, size in enumerate(sizes):
        train = kept_rows(size, data.held_out_fraction)
        taken = examples_of_a_visit(config, train) if train else 0
        sites.append(Site(train, size - train, taken, visits.get(number, 0)))
    return sites


def warnings(config: Config, found: Survey | None) -> list[str]:
    """Return what is unsound about the amounts of a run, one sentence each."""
    lines = list(_learning_rate(config))
    if found is None:
        return lines
    lines += _forms(config, found)
    if not found.left_out and found.usable < (1 - MOST_EMPTY) * found.rows:
        lines.append(
            f"{found.rows - found.usable} of {found.rows} rows have no question or no answer and "
            "are left out: are data.question-column and data.answer-column the right ones?"
        )
    sites = sites_of(config, found)
    return [*lines, *_passes(sites), *_held_out(config, sites)]


def _forms(config: Config, found: Survey) -> Iterator[str]:
    """Say in which form the data were found, and what of them is left out."""
    if found.form:
        how = ", trained on as a whole and without a prompt" if found.texts else ""
        yield f"the data are read as {found.form}{how} (data.question-column sets it)"
    if found.left_out:
        more = len(found.left_out) - MOST_NAMED
        named = "; ".join(found.left_out[:MOST_NAMED]) + (f"; and {more:,} more" * (more > 0))
        what = "preferences" if found.are_pairs else "conversations"
        yield f"{len(found.left_out):,} of {found.rows:,} {what} are not trained on: {named}"
    if found.unread and config.static.name not in EMBEDDED:
        yield f"columns that are not read: {', '.join(found.unread[:MOST_NAMED])}"
    is_apart = columns_apart(config.data.prompt_template) and not found.are_pairs
    if is_apart and not found.has_instructions:
        yield (
            f"the prompt template shows an instruction, and the data have no column "
            f"{INSTRUCTION!r}: it is empty in every prompt"
        )


def _learning_rate(config: Config) -> Iterator[str]:
    if idle := idle_last_round(config):
        yield f"{idle} Real sites refuse such a run."
    highest = config.train.learning_rate_max
    if config.model.name != FORMULARY and highest > HIGHEST_LEARNING_RATE:
        yield (
            f"train.learning-rate-max = {highest:g} is high for LoRA on a pretrained base: 1e-4 "
            f"to {HIGHEST_LEARNING_RATE:g} is usual. The packaged default suits the embedded base."
        )


def _passes(sites: list[Site]) -> Iterator[str]:
    """Warn of too many passes: of one visit, else of all visits of a site."""
    visited = [site for site in sites if site.train and site.visits]
    if not visited:
        return
    one = max(visited, key=lambda site: site.visit / site.train)
    advice = "use more data, fewer sites, or lower train.training-arguments.max-steps"
    if one.visit > MOST_PASSES_A_VISIT * one.train:
        yield (
            f"a visit passes {one.visit / one.train:.0f} times over the {_examples(one.train)} of "
            "a site, which it will learn by heart (warned of above "
            f"{MOST_PASSES_A_VISIT:g}): {advice}"
        )
        return
    most = max(visited, key=lambda site: site.visits * site.visit / site.train)
    passes = most.visits * most.visit / most.train
    if passes > MOST_PASSES_A_RUN:
        yield (
            f"the run passes {passes:.0f} times over the {_examples(most.train)} of a site "
            f"(warned of above {MOST_PASSES_A_RUN:g}): {advice} or num-server-rounds"
        )


def _examples(count: int) -> str:
    return f"{count} training example{'s' * (count != 1)}"


def _held_out(config: Config, sites: list[Site]) -> Iterator[str]:
    """Warn of too many held-out examples, and of too few to judge by."""
    held_out = sum(site.held_out for site in sites)
    share = held_out / max(1, held_out + sum(site.train for site in sites))
    if share > MOST_HELD_OUT:
        yield (
            f"{share:.0%} of the examples are held out (warned of above {MOST_HELD_OUT:.0%}): "
            "every site holds out at least one; use more data or fewer sites, or lower "
            "data.held-out-fraction"
        )
    judges = evaluation_cohort_of(config)
    judged = sum(sites[number].held_out for number in judges)
    if judges and judged < LEAST_HELD_OUT:
        yield (
            f"the held-out loss rests on {judged} example{'s' * (judged != 1)} of {len(judges)} "
            f"of {len(sites)} sites "
            f"(warned of below {LEAST_HELD_OUT}): raise strategy.fraction-evaluate or "
            "data.held-out-fraction"
        )
