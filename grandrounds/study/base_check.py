"""What a base model is, and whether a visit on it fits into this machine's memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grandrounds.config.bases import KNOWN_BASES, bases_here, folder_of
from grandrounds.config.keys import Config
from grandrounds.config.words import command
from grandrounds.data.chat import NOT_A_PREFIX, chat_format
from grandrounds.data.chat_settings import options_of, prints_today
from grandrounds.data.formulary import FORMULARY, base_path
from grandrounds.errors import ModelError, nearest
from grandrounds.model.architectures import FAMILIES, target_modules
from grandrounds.model.base import base_config, load_tokenizer, stored_bits
from grandrounds.model.base_cache import gguf_sha256
from grandrounds.model.headroom import (
    HEADROOM,
    architecture_of,
    device_precision,
    free_bytes,
    site_needs,
    size_text,
    smaller_settings,
)
from grandrounds.model.lora import LoraSpec, adapter_layout
from grandrounds.site.custody.base_content import KnownHashes, content_sha256


@dataclass(frozen=True)
class Fact:
    """One line about a base."""

    subject: str
    text: str
    is_problem: bool = False


def place_of(name: str) -> Path:
    """Return the folder of a base by its name or path.

    Raises
    ------
    ModelError
        If there is none on this machine.
    """
    if name == FORMULARY:
        return base_path()
    folder = folder_of(name) or Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if name in KNOWN_BASES:
        fetch = command("grandrounds", "base", "fetch", name)
        raise ModelError(f"The base {name!r} is not on this machine: {fetch}")
    names = [FORMULARY, *bases_here()]
    what = "has no config.json" if folder.is_dir() else "is no base here and no folder"
    raise ModelError(f"{name!r} {what}.{nearest(name, names)} Bases here: {', '.join(names)}.")


def facts_of(folder: Path, config: Config) -> Iterator[Fact]:
    """Yield what a base is, and what a run with this configuration needs of the machine.

    Parameters
    ----------
    config : Config
        With `model.name` naming the base.

    Raises
    ------
    ModelError
        If the folder cannot be read as a base model.
    """
    name = config.model.name
    yield Fact("folder", str(folder))
    if made_of := gguf_sha256(folder):
        known = [key for key, base in KNOWN_BASES.items() if base.gguf_sha256 == made_of]
        yield Fact("made of", f"GGUF sha256 {made_of}" + (f", {known[0]}" if known else ""))
    described = base_config(name)
    base = architecture_of(name)
    if base is None:
        text = f"{described.model_type}, not among {', '.join(FAMILIES)}: trained, not planned"
        yield Fact("family", text)
        yield from _adapted(name)
    else:
        shape = f"{base.num_layers} layers of {base.hidden_size}, vocabulary {base.vocabulary:,}"
        yield Fact("family", f"{base.model_type}, {shape}")
        yield Fact("parameters", f"{base.parameters:,}")
        linears = ", ".join(module.name for module in base.linears)
        chosen = ", ".join(target_modules(base, config.lora.target_modules))
        yield Fact("LoRA targets", f"{chosen}; all linear modules: {linears}")
    if bits := stored_bits(name):
        yield Fact("weights", f"stored in {bits} bits by bitsandbytes, loaded as they are")
    yield Fact("chat template", _template_text(load_tokenizer(name)))
    files = [file for file in folder.rglob("*") if file.is_file()]
    yield Fact("size", size_text(sum(file.stat().st_size for file in files)))
    yield Fact("sha256", content_sha256(folder, KnownHashes()))
    yield from _memory(config)


def _adapted(name: str) -> Iterator[Fact]:
    """Yield what an adapter under `all-linear` is put on, and what it leaves out."""
    _, targets = adapter_layout(name, LoraSpec(1, 1.0, "all-linear", 0.0))
    yield Fact("LoRA targets", f"all linear modules: {', '.join(targets.modules)}")
    if targets.frozen:
        yield Fact("left frozen", ", ".join(targets.frozen))


def _template_text(tokenizer: Any) -> str:
    """Return what a tokenizer's chat template is, and how it ends an answer."""
    if not tokenizer.chat_template:
        return "none: data.prompt-template = chat is not possible, alpaca is"
    form = chat_format(tokenizer)
    ends = "".join(tokenizer.convert_ids_to_tokens(list(form.end)))
    template = tokenizer.get_chat_template()
    told = [f"yes, {len(template):,} characters", f"an answer ends with {ends}"]
    told += [] if form.is_prefix else [NOT_A_PREFIX]
    told += ["prints the date (data.template-date)"] if prints_today(template) else []
    if options := options_of(template):
        told.append(f"data.template-options: {', '.join(options)}")
    return "; ".join(told)


def _memory(config: Config) -> Iterator[Fact]:
    """Yield what a visit needs and what is free."""
    plans = [
        (how, needs)
        for how, again in (("without", False), ("with", True))
        if (needs := site_needs(config, checkpointing=again)) is not None
    ]
    if not plans:
        return
    batch = config.arguments.per_device_train_batch_size
    free, precision = free_bytes(), device_precision(config)
    what = (
        f"batches of {batch} x {config.train.seq_length} tokens, "
        f"{precision.quantization or 8 * precision.base_bytes}-bit weights"
    )
    for how, needs in plans:
        if needs.total <= HEADROOM * free:
            text = (
                f"{what}, {how} gradient checkpointing: {size_text(needs.total)} planned, "
                f"{size_text(free)} free: fits"
            )
            yield Fact("a visit here", text)
            return
    settings = list(smaller_settings(config, True))
    fits = [f"{name} ({size_text(need)})" for name, need in settings if need <= HEADROOM * free]
    advice = f"what would: {'; or '.join(fits[:3])}" if fits else "no setting fits"
    text = (
        f"{what}: {size_text(plans[-1][1].total)} planned, {size_text(free)} free: does not fit; "
    )
    yield Fact("a visit here", text + advice, is_problem=True)
