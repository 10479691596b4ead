"""Exports a checkpoint as a PEFT adapter or a merged model, with a model card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from grandrounds.config.words import command, is_utf8
from grandrounds.data.chat_settings import ChatSettings
from grandrounds.data.formulary import FORMULARY
from grandrounds.data.own_prompt import is_own, own_prompt
from grandrounds.data.tokenization import end_token_ids
from grandrounds.errors import (
    ConfigError,
    DataError,
    GrandRoundsError,
    RunDirectoryError,
    first_line,
)
from grandrounds.model.base import (
    BaseSpec,
    base_config,
    bits_of,
    load_base,
    loading,
    model_location,
)
from grandrounds.model.licence import licence_of
from grandrounds.model.lora import PEFT_PREFIX, module_of, without_weights
from grandrounds.model.saved import WEIGHTS, check_fit, lora_spec, read_adapter
from grandrounds.model.scoring import stop_tokens
from grandrounds.model.targets import decoder_path, is_conv1d
from grandrounds.model.tokenizers import set_in, tokenizer_of
from grandrounds.server import budgets, states
from grandrounds.server.directory import Checkpoint
from grandrounds.server.guarantees import AUDIT
from grandrounds.server.listeners.start_rows import device_of
from grandrounds.server.model_card import Accuracy, Findings, model_card
from grandrounds.site.personal_files import FOLDER as SITES
from grandrounds.statistics import wilson_interval
from grandrounds.storage import whole_folder, writing
from grandrounds.study.evaluation.answers import RESULT
from grandrounds.study.evaluation.greedy import GREEDY
from grandrounds.study.evaluation.verification import BASE, evaluations_in, faults_in
from grandrounds.study.personal import facts_in
from grandrounds.wire.adapter import MAGNITUDE, A, Adapter
from grandrounds.wire.guarantee import BUDGET_SPENT
from grandrounds.wire.told import pairs_in, total_of_sites

T = TypeVar("T")

PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "audio_tokenizer_config.json",
)
"""Files of a composite base's processor, beside its tokenizer's."""

Say = Callable[[str], None]
"""Receives progress messages."""


def export(
    checkpoint: Checkpoint,
    *,
    merge: bool = False,
    to: Path | None = None,
    repository: str | None = None,
    say: Say = lambda line: None,
) -> Path:
    """Write a checkpoint atomically as an adapter or a merged model; return the folder.

    Parameters
    ----------
    to : Path, optional
        A new or empty folder; by default `export/peft_<round>` or `export/merged_<round>` in the
        run directory.
    repository : str, optional
        Repository that it will be published in, for the card.

    Raises
    ------
    RunDirectoryError
        If the folder is not empty, or cannot be written.
    ModelError
        If the checkpoint is damaged, or does not fit the base (`merge`).
    DataError
        If the run's evaluation.json has impossible figures.
    """
    name = f"{'merged' if merge else 'peft'}_{checkpoint.round}"
    if is_of_a_site(checkpoint):
        name = f"{'merged-' if merge else ''}{checkpoint.folder.name}"
    folder = (to or checkpoint.run.path / "export" / name).expanduser().absolute()
    _check_empty(folder)
    if merge and not is_utf8(str(folder)):
        raise RunDirectoryError(
            f"{folder} is not UTF-8, and the libraries that write models take no such folder. "
            "Choose another one with --to."
        )
    adapter = read_adapter(checkpoint.folder)
    link = f"https://huggingface.co/{repository}" if repository else None
    found = findings(checkpoint, link)
    advice = "Free some disk space, or choose another folder with --to."
    failures = (OSError, SafetensorError)
    with writing(str(folder), advice, RunDirectoryError, failures), whole_folder(folder) as partial:
        merged = None
        if merge:
            merged = _write_merged(checkpoint, adapter, partial, say)
        else:
            for file in (WEIGHTS, "adapter_config.json"):
                shutil.copyfile(checkpoint.folder / file, partial / file)
        card = _card(checkpoint, found, merged)
        (partial / "README.md").write_text(card, encoding="utf-8")
        _check_empty(folder)  # a merge takes minutes
    return folder


def is_of_a_site(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is the personal adapter of a site (`study.personal`)."""
    return checkpoint.folder.parent.name == SITES


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunDirectoryError(
            f"{folder} exists and is not an empty folder. Remove it, or choose another one with "
            "--to."
        )


def _card(checkpoint: Checkpoint, found: Findings, merged: str | None) -> str:
    return model_card(
        checkpoint.config,
        lora_spec(checkpoint.folder).target_modules.split(","),
        checkpoint.round,
        checkpoint.record.get("held-out-loss"),
        checkpoint.record["communication-mib"],
        dataclasses.replace(found, merged=merged),
    )


# --- Merging --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounding:
    """Rounding error of merged weights, in the base's dtype."""

    dtype: str
    """Dtype of the merged weights."""
    relative_error: float
    """Frobenius norm of the rounding error, as a fraction of that of the adapter's change."""


def _write_merged(checkpoint: Checkpoint, adapter: Adapter, folder: Path, say: Say) -> str:
    """Write base and adapter as one model; return a description for the card."""
    from transformers import AutoTokenizer

    configured = checkpoint.config.model
    name = configured.source
    spec = lora_spec(checkpoint.folder)
    check_fit(checkpoint.folder, spec, name)
    said = ChatSettings(*checkpoint.config.data.chat)
    tokens = tokenizer_of(name, said)  # reports a missing base in one line
    settings = base_config(name)
    text = settings.get_text_config()
    own = settings.dtype or text.dtype or torch.float32
    quantization = bits_of(BaseSpec(name, configured.quantization, configured.dtype))
    say(f"loading {name}")
    model = _load(name, quantization, configured.dtype, own)
    say("merging")
    scales: Mapping[str, float] = {key: spec.scale_of(module_of(key)) for key in adapter}
    tensors, scales = _on_the_whole(adapter, model, name), _on_the_whole(scales, model, name)
    rounding = merge(model, tensors, scales, own)
    model.config.get_text_config().use_cache = getattr(text, "use_cache", True)
    learned = end_token_ids(tokens, checkpoint.config.data.prompt)
    stops = stop_tokens(model, tokens, learned)
    model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    say("writing")
    _save_model(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(model_location(name), **loading(name))
    set_in(tokenizer, said, name)
    if is_own(template := checkpoint.config.data.prompt):
        tokenizer.chat_template = own_prompt(template).chat_template(tokenizer)
    for option in ("is_local", "local_files_only"):  # describe this load, not the tokenizer
        tokenizer.init_kwargs.pop(option, None)
    tokenizer.save_pretrained(folder)
    if text is not settings:
        _copy_processor(name, folder)
    return merged_text(quantization, rounding)


def _save_model(model: Any, folder: Path) -> None:
    """Write a model; its generation settings as they are, those without effect included.

    transformers refuses a changed file with, for example, a temperature beside do_sample = false,
    as published bases have it.
    """
    from transformers import GenerationConfig

    settings = model.generation_config
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    settings.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])


def _load(name: str, quantization: int, dtype: str, own: torch.dtype) -> Any:
    """Load the base: dequantised from the run's quantisation, or in its own dtype."""
    if quantization:
        return load_base(BaseSpec(name, quantization, dtype), whole=True).dequantize()
    exact = "bfloat16" if own is torch.bfloat16 else "float32"  # float32 represents float16 exactly
    return load_base(BaseSpec(name, 0, exact), whole=True)


def _on_the_whole(values: Mapping[str, T], model: Any, name: str) -> Mapping[str, T]:
    """Return values by an adapter's tensors under the names of these in the whole checkpoint.

    They differ where a run trains on the text model of a composite base alone.
    """
    trained, whole = decoder_path(without_weights(name)), decoder_path(model)
    if trained == whole:
        return values
    before, after = (f"{PEFT_PREFIX}{path + '.' if path else ''}" for path in (trained, whole))
    return {after + key.removeprefix(before): value for key, value in values.items()}


def _copy_processor(name: str, folder: Path) -> None:
    """Copy what reads a composite base's images and sounds, as far as there is any."""
    from transformers.utils import cached_file

    given = {key: value for key, value in loading(name).items() if key == "revision"}
    for file in PROCESSOR_FILES:
        found = cached_file(
            model_location(name), file, **given, _raise_exceptions_for_missing_entries=False
        )
        if found:
            shutil.copyfile(found, folder / file)


@torch.no_grad()
def merge(
    model: Any, adapter: Adapter, scales: Mapping[str, float], dtype: torch.dtype
) -> Rounding:
    """Merge an adapter into the weights of a base in place, and convert them to one dtype.

    W + s B A with s = alpha / r: Hu et al., LoRA (2021), section 4.1. With DoRA each row of it is
    brought to its magnitude (Liu et al., 2024, equation 5). Summed in float32 and rounded once,
    layer by layer, to avoid a second copy of the base in memory. `scales` holds s by tensor.
    """
    rounded, changed = 0.0, 0.0
    for name, a in adapter.items():
        if ".lora_A." not in name:
            continue
        module = model.get_submodule(name.removeprefix(PEFT_PREFIX).removesuffix(A))
        weight = module.weight
        b = torch.tensor(adapter[name.replace(".lora_A.", ".lora_B.")], device=weight.device)
        # (out-features, rank) x (rank, in-features)
        change = scales[name] * (b @ torch.tensor(a, device=weight.device))
        if is_conv1d(module):
            change = change.T
        exact = weight.float() + change
        magnitudes = adapter.get(name.removesuffix(A) + MAGNITUDE)
        if magnitudes is not None:
            rows = exact.T if is_conv1d(module) else exact  # (out-features, in-features)
            rows *= (torch.tensor(magnitudes, device=weight.device) / rows.norm(dim=1))[:, None]
            change = exact - weight.float()
        weight.data = exact.to(dtype)
        rounded += float((weight.float() - exact).double().square().sum())
        changed += float(change.double().square().sum())
    model.to(dtype)
    share = (rounded / changed) ** 0.5 if changed else 0.0
    return Rounding(str(dtype).removeprefix("torch."), share)


def merged_text(quantization: int, rounding: Rounding) -> str:
    """Describe the merge for the card."""
    into = (
        f"the base as the run trained on it: {quantization}-bit weights, dequantised"
        if quantization
        else "the base's published weights"
    )
    activations = (
        " In the run, LLM.int8 rounded activations to 8 bits too, which the merged model does not: "
        "its answers may differ from the run's, and the evaluations above are of the run's."
        if quantization == 8
        else ""
    )
    return (
        f"The adapter is merged into {into}, in {rounding.dtype}. The rounding error is "
        f"{100 * rounding.relative_error:.2g} % of the adapter's change.{activations}"
    )


# --- Findings of the card -------------------------------------------------------------------------


def findings(checkpoint: Checkpoint, repository: str | None = None) -> Findings:
    """Return what the run directory records about a checkpoint beyond its configuration."""
    run, config = checkpoint.run, checkpoint.config
    summary = run.read_json("summary.json") or {}
    start = next((m for m in run.read_metrics() if m["round"] == 0), {})
    sites = run.read_json("sites.json") or []
    data = {key: total_of_sites(sites, key) for key in ("train-examples", "held-out-examples")}
    first = sites[0] if sites else {}
    state = f"{states.FOLDER}/round-{checkpoint.round:06d}"
    then = run.read_json(f"{state}/{states.SITES}")  # as the sites had told it by then
    spent = [site["partition-id"] for site in then or () if site.get(BUDGET_SPENT)]
    device = f"{device_of(first)}: {first['precision']}" if first else None
    return Findings(
        base_held_out_loss=start.get("held-out-loss"),
        pairs=pairs_in(checkpoint.record),
        data=data if sites else None,
        accuracies=(*evaluated(checkpoint), *_asked_at_the_sites(checkpoint, summary)),
        device=device,
        sites=sites,
        plan=run.read_json("plan.json") or {},
        lora=lora_spec(checkpoint.folder),
        licence=licence_of(config.model.source),
        failed_replies=_failed_replies(checkpoint, run.read_json(f"{state}/state.json")),
        repository=repository,
        privacy=budgets.summary_of(config, then, spent) if then else summary.get("privacy"),
        audit=run.read_json(AUDIT),
        subgroups=summary.get("subgroups") if _is_the_runs_last(checkpoint) else None,
        personal=facts_in(checkpoint.folder) if is_of_a_site(checkpoint) else None,
    )


def _is_the_runs_last(checkpoint: Checkpoint) -> bool:
    """Whether it is the adapter that was evaluated after the last round."""
    return checkpoint.is_last and not is_of_a_site(checkpoint)


def _failed_replies(checkpoint: Checkpoint, state: Mapping[str, Any] | None) -> int:
    """Return the number of unused replies up to a checkpoint, as its state has it.

    Without that state, as metrics.jsonl has it, which knows finished rounds only.
    """
    if state:
        return int(state["failed-replies"])
    records = checkpoint.run.read_metrics()
    rounds = [record for record in records if record["round"] <= checkpoint.round]
    kinds = ("failed", "evaluate-failed")
    return sum(len(record.get(kind) or ()) for record in rounds for kind in kinds)


def evaluated(checkpoint: Checkpoint) -> list[Accuracy]:
    """Return the accuracies from `grandrounds evaluate`, if it evaluated exactly these weights.

    Raises
    ------
    DataError
        If a figure is impossible: a card with it would mislead.
    """
    of_site = f"-{checkpoint.folder.name}" if is_of_a_site(checkpoint) else ""
    file = checkpoint.run.path / f"evaluation{of_site}" / RESULT
    if not file.is_file():
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file} cannot be read ({first_line(error)}). Remove it, or evaluate again."
        ) from error
    if faults := faults_in(content):
        raise DataError(
            f"{file} has impossible figures: {faults[0]}. Evaluate again, or remove it; "
            "grandrounds evaluate --verify lists all faults."
        )
    digest = hashlib.sha256((checkpoint.folder / WEIGHTS).read_bytes()).hexdigest()
    found: list[Accuracy] = []
    for evaluation in evaluations_in(content):
        models = evaluation.get("models", {})
        ours = [name for name, m in models.items() if m["adapter_sha256"] == digest]
        asked = {BASE, *ours[:1]} if ours else set()
        for row in evaluation["rows"]:
            if row["model"] in asked:
                found += _accuracies(evaluation["protocol"], row)
    return found


def _accuracies(protocol: str, row: dict[str, Any]) -> Iterator[Accuracy]:
    f1 = row["f1"] if protocol == GREEDY else {"mean": None, "interval": None}
    for part in row["groups"] or [row]:
        group = "exact match" if protocol == GREEDY else part.get("group")
        yield Accuracy(
            protocol=protocol,
            benchmark=row["benchmark"],
            title=f"{row['title']}, {group}" if group else row["title"],
            is_base=row["model"] == BASE,
            correct=part["correct"],
            n=part["n"],
            interval=(part["interval"][0], part["interval"][1]),
            complete=not row["limited"],
            revision=str((row.get("source") or {}).get("revision", "")),
            f1=f1["mean"],
            f1_interval=tuple(f1["interval"]) if f1["interval"] else None,
            part=part.get("group") or "",
        )


def _asked_at_the_sites(checkpoint: Checkpoint, summary: dict[str, Any]) -> Iterator[Accuracy]:
    """Yield the formulary scores that the run itself measured on its last adapter."""
    scores = summary.get("formulary")
    if not scores or summary.get("adapter") != checkpoint.folder.name:
        return
    for kind in ("private", "public"):
        for who in (BASE, "tuned"):
            correct, n = scores[kind][who]["correct"], scores[kind][who]["n"]
            yield Accuracy(
                protocol="at the sites",
                benchmark=FORMULARY,
                title=f"Formulary (fictional), {kind}",
                is_base=who == BASE,
                correct=correct,
                n=n,
                interval=wilson_interval(correct, n),
                part=kind,
            )


# --- Publishing -----------------------------------------------------------------------------------


def check_repository(name: str) -> None:
    """Raise `ConfigError` if the hub would reject this repository name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"--push {name!r} is not a valid repository name: use OWNER/NAME, with letters, "
            "digits, '-', '_' and '.'."
        ) from error


def push(folder: Path, repository: str, api: Any = None) -> str:
    """Upload an export to the Hugging Face hub and return its address.

    A new repository is private.

    Raises
    ------
    GrandRoundsError
        If the upload fails for any reason; the folder is kept, and the message names the command to
        retry.
    """
    retry = command("hf", "upload", repository, folder, ".", "--private")
    again = f"the export is kept; retry with: {retry}"
    try:
        if api is None:
            from huggingface_hub import HfApi

            api = HfApi(library_name="grandrounds")
        full_name = api.create_repo(repository, private=True, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=full_name, folder_path=str(folder), commit_message="Export of Grand Rounds"
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(again) from None
    except Exception as error:  # whatever the hub's client raises: the folder is safe
        login = "" if os.environ.get("HF_TOKEN") else " `hf auth login` logs in."
        raise GrandRoundsError(
            f"The upload to {repository} failed: {first_line(error)}.{login} "
            f"{again[0].upper()}{again[1:]}"
        ) from error
    return f"https://huggingface.co/{full_name}"
