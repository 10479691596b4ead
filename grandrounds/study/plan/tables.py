"""Tables and notes of `grandrounds plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grandrounds.config.keys import Config
from grandrounds.config.words import counted, with_own
from grandrounds.errors import documented
from grandrounds.model.memory import (
    Precision,
    SiteMemory,
    precision_of,
    share_size,
    site_memory,
)
from grandrounds.server.described import cautions, data_text, start_text
from grandrounds.study.plan import masks, privacy
from grandrounds.study.plan.forecast import Forecast, link_seconds
from grandrounds.study.tables import NONE, Table, in_gib, in_mib, number, percent
from grandrounds.wire.adapter import count_parameters

Rows = Sequence[tuple[str, ...]]

Link = tuple[float, float]
"""A site's uplink and downlink speed in Mbit/s."""

PRECISIONS = ((0, 4, "float32"), (0, 2, "bfloat16"), (8, 2, "8-bit"), (4, 2, "4-bit NF4"))
"""Bits per quantised weight (0: not quantised), bytes per other number, and name."""

WITHOUT, WITH = "without checkpointing", "with checkpointing"
"""Names of the two ways to keep the activations of a visit."""


def tables(forecast: Forecast, link: Link | None) -> list[Table]:
    """Return the tables of one recipe: the run, its messages, memory, data and time."""
    config, lora = forecast.config, forecast.config.lora
    passes = "batches" if config.train.devices == 1 else "shares"
    batch = f"{passes} of {share_size(config)} x {config.train.seq_length} tokens"
    return [
        Table(("item", "value"), run_rows(forecast), "run"),
        Table(
            ("module", "outputs x inputs", "layers", "parameters", "MiB"),
            module_rows(forecast),
            f"adapter, {'DoRA, ' * lora.peft_use_dora}"
            f"rank {with_own(lora.peft_lora_r, lora.ranks_by_pattern)}",
        ),
        Table(
            ("messages", "count", "MiB each, mean", "MiB", "with key names"),
            traffic_rows(forecast),
            "communication by FlowerTune's rule, exact unless a reply fails",
        ),
        *([] if config.is_masked else [codec_table(forecast)]),
        Table(
            ("part", *ways(forecast)),
            site_rows(forecast),
            f"GPU memory of {_of_site(config)}, GiB, estimated for {batch}",
        ),
        Table(
            ("base", "base alone", "peak with checkpointing", "peak without"),
            [(name, *map(in_gib, row.values())) for name, row in by_precision(forecast).items()],
            f"GPU memory of {_of_site(config)} by precision of the base, GiB",
        ),
        Table(("item", "value"), other_rows(forecast, link), "server, data and time"),
        *([privacy.table(forecast.privacy)] if forecast.privacy else []),
    ]


def _of_site(config: Config) -> str:
    """Return whose memory is planned: a site's, or that of each of its GPUs."""
    devices = config.train.devices
    return "one site" if devices == 1 else f"each of the {devices} GPUs of one site"


def side_by_side(planned: Mapping[str, Forecast], link: Link | None) -> Table:
    """Return the totals of several recipes, one column per recipe."""
    columns = [totals(forecast, link) for forecast in planned.values()]
    rows = [
        (name, *(column[name] for column in columns))
        for name in columns[0]
        if any(column[name] != NONE for column in columns)
    ]
    return Table(("item", *planned), rows, "recipes side by side")


def notes(forecast: Forecast, link: Link | None) -> list[str]:
    """Return the assumptions behind the tables."""
    config = forecast.config
    measured = f"{documented('planning')} compares them with measurements"
    lines = [f"memory is computed from formulas; {measured}"]
    lines += cautions(config)
    if config.model.gradient_checkpointing == "auto":
        lines.append(
            'model.gradient-checkpointing = "auto" switches gradient checkpointing on in as few '
            "layers as make the peak fit into the free GPU memory"
        )
    if (devices := config.train.devices) > 1:
        lines.append(
            f"train.devices = {devices}: a batch of {config.arguments.per_device_train_batch_size} "
            f"in {devices} shares, each GPU with a base of its own; the first one's memory is "
            "planned, which also holds the optimizer. On fewer GPUs the shares take turns"
        )
    if forecast.plan.start_bytes:
        lines.append(
            f"with the {in_mib(forecast.plan.start_bytes)} MiB of magnitudes.up, sites tell once "
            "where DoRA's magnitudes start; FlowerTune's figures have no such message"
        )
    if forecast.plan.is_upper_bound:
        what = "pruned ranks" if config.strategy.prunes else "entropy coding"
        lines.append(f"sizes are upper bounds: {what} can only make messages smaller")
    if forecast.reading is None:
        lines.append(
            f"the number of rows of {config.static.name} is unknown: pass --rows to plan examples "
            "and coverage"
        )
    elif not forecast.reading.sizes_known:
        lines.append(
            f"coverage assumes sites of equal size: with {config.data.partitioner} partitions the "
            "sizes are unknown until the data are read"
        )
    lines += masks.notes(config)
    if forecast.privacy:
        lines += privacy.notes(forecast.privacy)
    elif config.is_private:
        lines.append(privacy.UNITS_UNKNOWN)
    if link:
        lines.append("a transfer is one message down and one up; latency and training are left out")
    return lines


# --- Rows -----------------------------------------------------------------------------------------


def run_rows(forecast: Forecast) -> Rows:
    """Return the recipe in a few lines."""
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
        *([("continued from", saved)] if (saved := start_text(config)) else []),
        ("data", data_text(config)),
        (
            "federation",
            f"{config.cohort_size} of {counted(config.data.num_partitions, 'site')} a round, "
            f"{counted(config.federation.num_server_rounds, 'round')}, {config.strategy.name}",
        ),
        ("encoding", f"{config.codec_up} up, {how.downlink_codec} down ({how.downlink})"),
        (
            "peak GPU memory of a site" + (", each GPU" if config.train.devices > 1 else ""),
            peak_text(forecast),
        ),
    ]


def peak_text(forecast: Forecast) -> str:
    """Return the peak memory of a site; under `auto` both without and with checkpointing."""
    peaks = [f"{in_gib(site.total)} GiB {way}" for way, site in ways(forecast).items()]
    if len(peaks) == 1:
        return peaks[0]
    return f"{', '.join(peaks)} (auto: on if memory is short)"


def module_rows(forecast: Forecast) -> Rows:
    """Return each adapted module, summed over all layers, and the total."""
    layers = forecast.architecture.num_layers
    rows, total = [], 0
    for module in forecast.architecture.linears:
        if module.name not in forecast.targets:
            continue
        own = {n: s for n, s in forecast.shapes.items() if f".{module.path}.lora_" in n}
        count = count_parameters(own)
        total += count
        shape = f"{module.outputs:,} x {module.inputs:,}"
        rows.append((module.name, shape, f"{layers}", f"{count:,}", in_mib(4 * count)))
    return [*rows, ("all modules", "", "", f"{total:,}", in_mib(4 * total))]


def traffic_rows(forecast: Forecast) -> Rows:
    """Return messages by kind, per round and in total, by both counting rules."""
    plan = forecast.plan
    rows = [
        (
            kind,
            f"{t.messages:,}",
            in_mib(t.tensor_bytes / t.messages),
            in_mib(t.tensor_bytes),
            in_mib(t.tensor_bytes + t.key_bytes),
        )
        for kind, t in sorted(plan.ledger.totals.items())
    ]
    total, named = plan.total_bytes, plan.total_bytes_with_key_names
    return [
        *rows,
        ("mean per round", "", "", in_mib(total / plan.rounds), in_mib(named / plan.rounds)),
        ("total", "", "", in_mib(total), in_mib(named)),
    ]


def codec_table(forecast: Forecast) -> Table:
    """Return the table of a run with other codecs, which a masked one cannot have."""
    columns = ("codec, both ways", "MiB", "with key names", "times smaller than configured")
    return Table(columns, codec_rows(forecast), "the same run with other codecs")


def codec_rows(forecast: Forecast) -> Rows:
    """Return the traffic of the whole run with each codec."""
    configured = forecast.plan.total_bytes
    return [
        (
            name,
            in_mib(plan.total_bytes),
            in_mib(plan.total_bytes_with_key_names),
            f"{configured / plan.total_bytes:.2f}",
        )
        for name, plan in forecast.codecs.items()
    ]


def site_rows(forecast: Forecast) -> Rows:
    """Return a site's memory by part."""
    columns = [
        {
            "CUDA context (allowance)": site.cuda_context,
            "base": site.base,
            "adapter, trained and received copy": site.adapter,
            "gradient": site.gradient,
            "optimizer": site.optimizer,
            "activations kept for the backward pass": site.activations,
            "logits and loss, or a recomputed layer": site.working,
            "weight copies": site.weight_copies,
            "peak": site.total,
        }
        for site in ways(forecast).values()
    ]
    return [(name, *(in_gib(column[name]) for column in columns)) for name in columns[0]]


def ways(forecast: Forecast) -> dict[str, SiteMemory]:
    """Return a site's memory as configured; under `auto` without and with checkpointing."""
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
    """Return the bytes of the base and of both peaks, by precision of the base."""
    found = {}
    for bits, base_bytes, name in PRECISIONS:
        autocast = forecast.config.arguments.bf16
        precision = Precision(bits, base_bytes, autocast, autocast or base_bytes == 2)
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
    """Return the server's memory, the data seen and the transfer times."""
    rows = [("peak adapter tensors on the server", f"{in_mib(forecast.server_bytes)} MiB")]
    if (read := forecast.reading) is not None:
        rows += [
            ("rows of the data", f"{read.rows:,}"),
            ("examples per visit", f"{read.examples_per_visit:,}"),
            ("examples seen", f"{read.examples_seen:,}, repeats included"),
            (
                "coverage (examples seen at least once)",
                f"{percent(read.share_covered)} of {read.train_examples:,} training examples",
            ),
        ]
    if link:
        seconds = link_seconds(forecast.plan, *link)
        speeds = f"{link[0]:g} Mbit/s up, {link[1]:g} down"
        rows += [
            (f"transfer, one site, one round ({speeds})", transfer_time(seconds["round"])),
            ("transfer, one site, sum over all rounds", transfer_time(seconds["all-rounds"])),
        ]
    return rows


def totals(forecast: Forecast, link: Link | None) -> dict[str, str]:
    """Return a recipe's column of the table side by side."""
    config, plan, read = forecast.config, forecast.plan, forecast.reading
    peaks = {way: in_gib(site.total) for way, site in ways(forecast).items()}
    column = {
        "base": forecast.architecture.name,
        "adapter parameters": f"{plan.adapter_parameters:,}",
        "cohort x rounds": f"{config.cohort_size} x {plan.rounds}",
        "largest message, MiB": in_mib(plan.message_bytes),
        "mean per round, MiB": in_mib(plan.total_bytes / plan.rounds),
        "total, MiB": in_mib(plan.total_bytes),
        "total with key names, MiB": in_mib(plan.total_bytes_with_key_names),
        f"peak GPU memory, GiB, {WITHOUT}": peaks.get(WITHOUT, NONE),
        f"peak GPU memory, GiB, {WITH}": peaks.get(WITH, NONE),
        "peak adapter tensors on the server, MiB": in_mib(forecast.server_bytes),
        "examples seen": f"{read.examples_seen:,}" if read else NONE,
        "coverage": percent(read.share_covered) if read else NONE,
        "epsilon of a site": NONE,
        "noise to clip": NONE,
    }
    if private := forecast.privacy:
        column["epsilon of a site"] = f"{private.epsilon:.2f}"
        column["noise to clip"] = number(private.noise_to_clip, 3)
    if link:
        seconds = link_seconds(plan, *link)
        column["transfer, one site, one round"] = transfer_time(seconds["round"])
        column["transfer, one site, all rounds"] = transfer_time(seconds["all-rounds"])
    return column


def transfer_time(seconds: float) -> str:
    """Format seconds; minutes or hours where they read better."""
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
