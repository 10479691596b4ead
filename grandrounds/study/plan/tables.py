"""The tables of `grandrounds plan`, as rows of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grandrounds.config.codecs import CODECS
from grandrounds.model.memory import Precision, SiteMemory, precision_of, site_memory
from grandrounds.study.plan.forecast import Forecast, by_codec, link_seconds

Rows = Sequence[tuple[str, ...]]

Link = tuple[float, float]
"""Speed up and down, in Mbit/s."""

MIB, GIB = 2**20, 2**30

PRECISIONS = ((0, 4, "float32"), (0, 2, "bfloat16"), (8, 2, "8-bit"), (4, 2, "4-bit NF4"))
"""Bits (0: not quantised), bytes of a number that is not quantised, name."""

WITHOUT, WITH = "without checkpointing", "with checkpointing"
"""The two ways to hold the activations of a visit, gradient checkpointing is meant."""

NONE = "-"
"""What stands where there is nothing."""


@dataclass(frozen=True)
class Table:
    """One table."""

    title: str
    columns: tuple[str, ...]
    rows: Rows


def tables(forecast: Forecast, link: Link | None) -> list[Table]:
    """Return the tables of one recipe: what it is, what travels, memory, reading and time."""
    config = forecast.config
    batch = f"{config.arguments.per_device_train_batch_size} x {config.train.seq_length} tokens"
    return [
        Table("run", ("item", "value"), run_rows(forecast)),
        Table(
            f"adapter, rank {config.lora.peft_lora_r}",
            ("module", "outputs x inputs", "layers", "parameters", "MiB"),
            module_rows(forecast),
        ),
        Table(
            "communication by FlowerTune's rule, exact if nothing fails",
            ("messages", "count", "MiB each, mean", "MiB", "with key names"),
            traffic_rows(forecast),
        ),
        Table(
            "the same run under other codecs",
            ("codec, both ways", "MiB", "with key names", "times less than as configured"),
            codec_rows(forecast),
        ),
        Table(
            f"GPU memory of one site, GiB, estimated for batches of {batch}",
            ("part", *ways(forecast)),
            site_rows(forecast),
        ),
        Table(
            "the same by precision of the base, GiB",
            ("base", "base alone", "peak with checkpointing", "peak without"),
            [
                (name, *(gib(value) for value in row.values()))
                for name, row in by_precision(forecast).items()
            ],
        ),
        Table("server, data and time", ("item", "value"), other_rows(forecast, link)),
    ]


def side_by_side(planned: Mapping[str, Forecast], link: Link | None) -> Table:
    """Return the totals of several recipes, one column each."""
    columns = [totals(forecast, link) for forecast in planned.values()]
    rows = [
        (name, *(column[name] for column in columns))
        for name in columns[0]
        if any(column[name] != NONE for column in columns)
    ]
    return Table("recipes side by side", ("item", *planned), rows)


def notes(forecast: Forecast, link: Link | None) -> list[str]:
    """Return what a reader must know beside the tables."""
    data = forecast.config.data
    lines = ["memory follows from formulas (docs/planning.md); none is measured on a GPU"]
    if forecast.config.model.gradient_checkpointing == "auto":
        lines.append(
            'model.gradient-checkpointing = "auto" switches gradient checkpointing on where the '
            "peak without it does not fit into the memory that is free"
        )
    if forecast.dora:
        lines.append(
            "DoRA's magnitudes are counted, but a run refuses DoRA: its magnitudes start from base "
            "weights, which the server never has"
        )
    if forecast.plan.is_upper_bound:
        lines.append("entropy coding makes messages smaller than these, never larger")
    if forecast.reading is None:
        lines.append(
            f"the rows of {forecast.config.static.name} are not known: give --rows for examples "
            "and coverage"
        )
    elif not forecast.reading.sizes_known:
        lines.append(
            f"coverage takes sites of equal size: those of {data.partitioner} are not known before "
            "the data are read"
        )
    if link:
        lines.append("a transfer is one message down and one up, without latency or training")
    return lines


# --- Rows -----------------------------------------------------------------------------------------


def run_rows(forecast: Forecast) -> Rows:
    """Return what is planned."""
    base, config, how = forecast.architecture, forecast.config, forecast.config.communication
    shapes = "" if base.known_as == base.name else f", shapes of {base.known_as}"
    bits = config.model.quantization
    again = config.model.gradient_checkpointing
    checkpointing = {True: ", gradient checkpointing", "auto": ", checkpointing where needed"}
    return [
        ("base", f"{base.name}, {base.parameters:,} parameters{shapes}"),
        (
            "stored as",
            f"{f'{bits}-bit' if bits else config.model.dtype}{checkpointing.get(again, '')}",
        ),
        ("adapted", ", ".join(forecast.targets)),
        (
            "federation",
            f"{config.cohort_size} of {config.data.num_partitions} sites a round, "
            f"{config.federation.num_server_rounds} rounds, {config.strategy.name}",
        ),
        ("encoding", f"{how.uplink_codec} up, {how.downlink_codec} down ({how.downlink})"),
        ("GPU memory of a site, peak", peak_words(forecast)),
    ]


def peak_words(forecast: Forecast) -> str:
    """Return the peak of a site, under `auto` without gradient checkpointing and with it."""
    peaks = [f"{gib(site.total)} GiB {way}" for way, site in ways(forecast).items()]
    if len(peaks) == 1:
        return peaks[0]
    return f"{', '.join(peaks)} (auto: on where memory asks for it)"


def module_rows(forecast: Forecast) -> Rows:
    """Return each adapted module over all layers, and their sum."""
    layers = forecast.architecture.num_layers
    rows, total = [], 0
    for module in forecast.architecture.linears:
        if module.name not in forecast.targets:
            continue
        of_layer = forecast.config.lora.peft_lora_r * (module.inputs + module.outputs)
        count = layers * (of_layer + (module.outputs if forecast.dora else 0))
        total += count
        shape = f"{module.outputs:,} x {module.inputs:,}"
        rows.append((module.name, shape, f"{layers}", f"{count:,}", mib(4 * count)))
    return [*rows, ("all", "", "", f"{total:,}", mib(4 * total))]


def traffic_rows(forecast: Forecast) -> Rows:
    """Return messages by kind, in a round and in all, by both counting rules."""
    plan = forecast.plan
    rows = [
        (
            kind,
            f"{t.messages:,}",
            mib(t.tensor_bytes / t.messages),
            mib(t.tensor_bytes),
            mib(t.tensor_bytes + t.key_bytes),
        )
        for kind, t in sorted(plan.ledger.totals.items())
    ]
    total, named = plan.total_bytes, plan.total_bytes_with_key_names
    return [
        *rows,
        ("a round, mean", "", "", mib(total / plan.rounds), mib(named / plan.rounds)),
        ("in all", "", "", mib(total), mib(named)),
    ]


def codec_rows(forecast: Forecast) -> Rows:
    """Return the whole run under every codec."""
    configured = forecast.plan.total_bytes
    return [
        (
            name,
            mib(plan.total_bytes),
            mib(plan.total_bytes_with_key_names),
            f"{configured / plan.total_bytes:.2f}",
        )
        for name, plan in by_codec(forecast, tuple(CODECS)).items()
    ]


def site_rows(forecast: Forecast) -> Rows:
    """Return the parts of a site's memory."""
    columns = [
        {
            "CUDA context (allowance)": site.cuda_context,
            "base": site.base,
            "adapter, as trained and as received": site.adapter,
            "gradient": site.gradient,
            "optimizer": site.optimizer,
            "activations kept for the backward pass": site.activations,
            "logits and loss, or a layer computed again": site.working,
            "copies of weights": site.weight_copies,
            "peak": site.total,
        }
        for site in ways(forecast).values()
    ]
    return [(name, *(gib(column[name]) for column in columns)) for name in columns[0]]


def ways(forecast: Forecast) -> dict[str, SiteMemory]:
    """Return a site's memory as configured; under `auto` in both of the ways that it may take."""
    asked = forecast.config.model.gradient_checkpointing
    return {
        way: _site(forecast, precision_of(forecast.config), checkpointing)
        for way, checkpointing in ((WITHOUT, False), (WITH, True))
        if asked in ("auto", checkpointing)
    }


def _site(forecast: Forecast, precision: Precision, checkpointing: bool) -> SiteMemory:
    return site_memory(
        forecast.config,
        forecast.architecture,
        forecast.targets,
        precision,
        checkpointing=checkpointing,
    )


def by_precision(forecast: Forecast) -> dict[str, dict[str, int]]:
    """Return the bytes of the base, and at the peak with checkpointing and without."""
    found = {}
    for bits, base_bytes, name in PRECISIONS:
        precision = Precision(bits, base_bytes, forecast.config.arguments.bf16)
        with_it, without = (
            _site(forecast, precision, checkpointing) for checkpointing in (True, False)
        )
        found[name] = {
            "base": with_it.base,
            "peak-with-checkpointing": with_it.total,
            "peak-without-checkpointing": without.total,
        }
    return found


def other_rows(forecast: Forecast, link: Link | None) -> Rows:
    """Return the server's memory, what is read, and how long messages travel."""
    rows = [("server, adapter tensors at the peak", f"{mib(forecast.server_bytes)} MiB")]
    if (read := forecast.reading) is not None:
        rows += [
            ("rows of the data", f"{read.rows:,}"),
            ("examples of a visit", f"{read.examples_per_visit:,}"),
            ("examples seen", f"{read.examples_seen:,}, repeats counted"),
            (
                "share of the data covered",
                f"{read.share_covered:.1%} of {read.train_examples:,} training examples",
            ),
        ]
    if link:
        seconds = link_seconds(forecast.plan, *link)
        way = f"{link[0]:g} Mbit/s up, {link[1]:g} down"
        rows += [
            (f"transfer, one site, one round ({way})", duration(seconds["round"])),
            ("transfer, one site, all rounds one after another", duration(seconds["all-rounds"])),
        ]
    return rows


def totals(forecast: Forecast, link: Link | None) -> dict[str, str]:
    """Return a recipe's column in a comparison."""
    config, plan, read = forecast.config, forecast.plan, forecast.reading
    peaks = {way: gib(site.total) for way, site in ways(forecast).items()}
    column = {
        "base": forecast.architecture.name,
        "adapter parameters": f"{plan.adapter_parameters:,}",
        "cohort x rounds": f"{config.cohort_size} x {plan.rounds}",
        "largest message, MiB": mib(plan.message_bytes),
        "a round, MiB": mib(plan.total_bytes / plan.rounds),
        "in all, MiB": mib(plan.total_bytes),
        "with key names, MiB": mib(plan.total_bytes_with_key_names),
        f"GPU memory, GiB, {WITHOUT}": peaks.get(WITHOUT, NONE),
        f"GPU memory, GiB, {WITH}": peaks.get(WITH, NONE),
        "server's adapter tensors, MiB": mib(forecast.server_bytes),
        "examples seen": f"{read.examples_seen:,}" if read else NONE,
        "data covered": f"{read.share_covered:.1%}" if read else NONE,
    }
    if link:
        seconds = link_seconds(plan, *link)
        column["transfer, one site, one round"] = duration(seconds["round"])
        column["transfer, one site, all rounds"] = duration(seconds["all-rounds"])
    return column


def mib(size: float) -> str:
    """Return bytes as MiB with two digits."""
    return f"{size / MIB:,.2f}"


def gib(size: float) -> str:
    """Return bytes as GiB with two digits."""
    return f"{size / GIB:,.2f}"


def duration(seconds: float) -> str:
    """Return seconds, as minutes or hours where that reads better."""
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
