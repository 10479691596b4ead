"""What people type for a key or a value elsewhere, and what it is called here.

Looked up by meaning: `lr` is nearer to `seed` by its letters than to `train.learning-rate-max`.
"""

from __future__ import annotations

import re

from grandrounds.config.values import Scalar

_ARGUMENTS = "train.training-arguments."

MAX_STEPS = f"{_ARGUMENTS}max-steps"
"""The key that is -1 where epochs are counted."""

_NAMES: dict[str, str] = {
    "num-server-rounds": "rounds num-rounds n-rounds server-rounds global-rounds total-rounds "
    "communication-rounds fl-rounds global-epochs",
    "seed": "random-seed random-state rng-seed",
    "run-directory": "run-dir output-dir out-dir out save-dir save-path logging-dir",
    "model.name": "model base base-model model-name model-id model-path model-name-or-path "
    "pretrained-model-name-or-path checkpoint",
    "model.revision": "revision model-revision base-revision commit",
    "model.quantization": "quantization quantisation quantize bits num-bits load-in-4bit "
    "load-in-8bit 4bit 8bit qlora",
    "model.dtype": "dtype torch-dtype precision compute-dtype",
    "model.gradient-checkpointing": "gradient-checkpointing grad-checkpointing "
    "activation-checkpointing",
    "model.lora.peft-lora-r": "r rank lora-r lora-rank peft-r lora-dim",
    "model.lora.peft-lora-alpha": "alpha lora-alpha peft-alpha",
    "model.lora.use-rslora": "rslora use-rslora peft-use-rslora rank-stabilised",
    "model.lora.dropout": "dropout lora-dropout peft-lora-dropout",
    "model.lora.rank-pattern": "rank-pattern peft-rank-pattern lora-rank-pattern "
    "peft-lora-rank-pattern ranks-pattern",
    "model.lora.alpha-pattern": "alpha-pattern peft-alpha-pattern lora-alpha-pattern "
    "peft-lora-alpha-pattern",
    "model.lora.target-modules": "target-modules lora-target-modules lora-target targets modules",
    "train.learning-rate-max": "lr learning-rate learning-rate-init initial-learning-rate max-lr "
    "lr-max peak-lr client-lr local-lr eta",
    "train.learning-rate-min": "min-lr lr-min eta-min",
    "train.seq-length": "seq-length seq-len sequence-length max-length max-len max-seq-length "
    "max-seq-len max-tokens cutoff-len context-length block-size-tokens model-max-length",
    "train.optimizer": "optimizer optimiser optim",
    "train.num-threads": "threads num-threads n-threads cpus num-cpus",
    "train.devices": "devices num-devices n-devices gpus num-gpus n-gpus n-gpu ngpu num-processes "
    "nproc-per-node world-size",
    "train.report-to": "report-to tracker trackers wandb tensorboard mlflow trackio use-wandb",
    f"{_ARGUMENTS}per-device-train-batch-size": "batch-size batchsize train-batch-size "
    "per-device-batch-size per-device-train-batch-size micro-batch-size local-batch-size bs",
    f"{_ARGUMENTS}gradient-accumulation-steps": "gradient-accumulation-steps "
    "gradient-accumulation grad-accumulation grad-accum accumulation-steps",
    f"{_ARGUMENTS}num-train-epochs": "epochs num-epochs local-epochs n-epochs num-train-epochs "
    "client-epochs epochs-per-round",
    MAX_STEPS: "max-steps steps num-steps local-steps train-steps steps-per-round "
    "client-steps iterations",
    f"{_ARGUMENTS}warmup-steps": "warmup warmup-steps warmup-ratio",
    f"{_ARGUMENTS}max-grad-norm": "max-grad-norm grad-clip clip-grad gradient-clipping clip-norm",
    f"{_ARGUMENTS}weight-decay": "weight-decay wd decay",
    f"{_ARGUMENTS}lr-scheduler-type": "lr-scheduler-type lr-scheduler scheduler",
    f"{_ARGUMENTS}bf16": "bf16 fp16 amp mixed-precision half",
    f"{_ARGUMENTS}torch-compile": "torch-compile compile",
    "strategy.name": "strategy aggregation aggregator algorithm rule",
    "strategy.proximal-mu": "mu prox-mu proximal-mu fedprox-mu",
    "strategy.fraction-train": "fraction fraction-fit fraction-train client-fraction sample-rate "
    "participation participation-rate",
    "strategy.fraction-evaluate": "fraction-evaluate fraction-eval eval-fraction",
    "strategy.min-sites": "min-sites min-clients min-available-clients min-nodes",
    "strategy.round-timeout-seconds": "timeout round-timeout",
    "communication.uplink-codec": "codec compression uplink-codec compress",
    "communication.downlink-codec": "downlink-codec",
    "data.num-partitions": "sites clients num-sites num-clients n-clients n-sites num-partitions "
    "num-supernodes num-nodes num-hospitals hospitals",
    "data.partitioner": "partitioner partitioning partition split distribution",
    "data.partition-by": "partition-by site-column group-by group-column client-column by",
    "data.dirichlet-alpha": "dirichlet dirichlet-alpha concentration",
    "data.held-out-fraction": "held-out held-out-fraction holdout hold-out test-size test-split "
    "validation-split val-split val-size eval-split test-fraction",
    "data.prompt-template": "template prompt-template chat-template prompt-format",
    "data.template-options": "chat-template-kwargs template-kwargs",
    "data.system-prompt": "system system-prompt system-message",
    "data.question-column": "question question-column prompt prompt-column input input-column "
    "instruction-column",
    "data.answer-column": "answer answer-column output response response-column completion target "
    "output-column target-column label-column",
    "static.dataset.config": "dataset-config config-name dataset-config-name subset data-config",
    "static.dataset.split": "dataset-split train-split data-split",
    "static.dataset.revision": "dataset-revision data-revision",
    "static.dataset.name": "data dataset dataset-name dataset-path data-path data-file train-file "
    "training-data",
}
"""Key → what people call it elsewhere, in kebab-case, without the section."""

KEY_OF_NAME = {name: key for key, names in _NAMES.items() for name in names.split()}

_WITH_SECTION = {
    "data.alpha": "data.dirichlet-alpha",
    "data.name": "static.dataset.name",
    "data.file": "static.dataset.name",
    "data.path": "static.dataset.name",
    "dataset.name": "static.dataset.name",
    "dataset.path": "static.dataset.name",
    "lora.name": "model.name",
    "strategy.learning-rate": "strategy.server-learning-rate",
    "strategy.lr": "strategy.server-learning-rate",
    "strategy.server-lr": "strategy.server-learning-rate",
}
"""Names whose meaning depends on the section before them."""

PER_ROUND = (
    *("sites-per-round", "clients-per-round", "num-clients-per-round", "nodes-per-round"),
    *("cohort", "cohort-size", "min-fit-clients", "min-train-nodes"),
)
"""Names for a number of sites a round, which is an option and not a key."""

NO_KEY = {
    **dict.fromkeys(
        ("device", "gpu", "gpus", "cuda", "use-gpu", "num-gpus", "device-map"),
        "A GPU is used if there is one; CUDA_VISIBLE_DEVICES selects it, and an empty one trains "
        "on the CPU.",
    ),
    **dict.fromkeys(
        ("attn", "attn-implementation", "use-flash-attention", "flash-attention"),
        "Attention runs on PyTorch's own kernels, FlashAttention among them; train.batching "
        "decides whether batches are padded.",
    ),
    **dict.fromkeys(
        ("run-name", "wandb-run-name"), "A run is named by its directory: run-directory."
    ),
    "enable-thinking": "It is an option of some chat templates: write "
    "data.template-options.enable_thinking = false.",
}
"""Names of what has no key, and what to do instead."""

_VALUES: dict[str, dict[str, Scalar]] = {
    "model.quantization": {
        **dict.fromkeys(("4", "4bit", "int4", "nf4", "fp4", "qlora", "bnb4bit", "true"), 4),
        **dict.fromkeys(("8", "8bit", "int8", "llmint8", "bnb8bit"), 8),
        **dict.fromkeys(("0", "none", "no", "off", "false", "full", "16bit", "32bit", ""), 0),
        **dict.fromkeys(("16", "32", "bf16", "fp16", "fp32"), 0),
    },
    "model.dtype": {
        **dict.fromkeys(("bf16", "torchbfloat16", "half", "fp16", "float16"), "bfloat16"),
        **dict.fromkeys(("fp32", "torchfloat32", "float", "full", "single"), "float32"),
    },
    "data.partitioner": {
        **dict.fromkeys(("random", "uniform", "homogeneous"), "iid"),
        **dict.fromkeys(("noniid", "labelskew", "heterogeneous"), "dirichlet"),
        **dict.fromkeys(("linear", "quantityskew", "sizeskew"), "size-skewed"),
        **dict.fromkeys(("bysite", "site", "column", "bycolumn", "naturalid", "group"), "natural"),
    },
    "data.prompt-template": {
        **dict.fromkeys(("llama3", "instruct", "tokenizer", "chattemplate"), "chat"),
        **dict.fromkeys(("flowertune", "default", "instruction"), "alpaca"),
    },
    "strategy.name": {
        **dict.fromkeys(("avg", "mean", "average", "averaging"), "fedavg"),
        "prox": "fedprox",
        "median": "fedmedian",
        **dict.fromkeys(("trimmedmean", "trimmedavg"), "fedtrimmedavg"),
        "adam": "fedadam",
        "yogi": "fedyogi",
        "adagrad": "fedadagrad",
        **dict.fromkeys(("momentum", "fedavgmomentum"), "fedavgm"),
        "flexlora": "product",
        **dict.fromkeys(("fair", "lorafair"), "lora-fair"),
        "lalora": "la-lora",
        "ffalora": "ffa",
    },
    "train.optimizer": {
        **dict.fromkeys(("adam", "adamw", "torch", "adamwhf", "adamwtorchfused"), "adamw_torch"),
        **dict.fromkeys(("adamw8", "8bit", "adamwbnb8bit", "adam8bit"), "adamw_8bit"),
        **dict.fromkeys(("paged", "pagedadamw", "pagedadamw32bit"), "paged_adamw_8bit"),
    },
    f"{_ARGUMENTS}lr-scheduler-type": {
        "warmup": "constant_with_warmup",
        "none": "constant",
    },
}
"""Key → what people write for one of its values, in lower case, letters and digits only."""

for _key in ("communication.uplink-codec", "communication.downlink-codec"):
    _VALUES[_key] = {
        **dict.fromkeys(("fp16", "float16", "bfloat16", "half"), "bf16"),
        **dict.fromkeys(("8bit", "8", "q8"), "int8"),
        **dict.fromkeys(("4bit", "4", "q4"), "int4"),
        **dict.fromkeys(("off", "no", "false", "identity"), "none"),
        **dict.fromkeys(("fp32", "full"), "float32"),
        **dict.fromkeys(("signsgd", "1bit"), "sign"),
        **dict.fromkeys(("sparse", "sparsification"), "topk"),
    }

_BITS_OF_NAME: dict[str, Scalar] = {"load-in-4bit": 4, "4bit": 4, "qlora": 4}
_BITS_OF_NAME |= {"load-in-8bit": 8, "8bit": 8}
_TRACKERS = ("wandb", "tensorboard", "mlflow", "trackio")


def spelled_here(key: str) -> str:
    """Return a key as it would be spelled here: kebab-case, without leading dashes."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", key.strip("- ")).replace("_", "-").lower()


def only_letters(text: str) -> str:
    """Return the letters and digits of a text, in lower case."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def last_part(key: str) -> str:
    """Return a key, spelled as here, without its sections."""
    return spelled_here(key).rpartition(".")[2]


def key_meant(key: str, keys: tuple[str, ...]) -> str:
    """Return the key that an unknown one means, or an empty string.

    Parameters
    ----------
    keys : tuple of str
        All keys and aliases. One that only differs in spelling wins, then a synonym, then the only
        key with the same last part.
    """
    spelled, last = spelled_here(key), last_part(key)
    if spelled in keys:
        return spelled
    if meant := _WITH_SECTION.get(spelled) or KEY_OF_NAME.get(last):
        return meant
    same = [one for one in keys if one.rpartition(".")[2] == last and last != "name"]
    return same[0] if len(same) == 1 else ""


def value_meant(key: str, value: Scalar, name: str = "") -> Scalar:
    """Return what a value means for a key: a number for its digits, 4 for `4bit`.

    Parameters
    ----------
    key : str
        The key that is meant.
    name : str
        What was typed in its place; `load-in-4bit = true` is 4 bits.
    """
    last = last_part(name)
    if key == "model.quantization" and last in _BITS_OF_NAME:
        return _BITS_OF_NAME[last] if value is True or str(value).lower() == "true" else 0
    if key == "train.report-to" and last.removeprefix("use-") in _TRACKERS:
        return (
            last.removeprefix("use-") if value is True or str(value).lower() == "true" else "none"
        )
    word = only_letters(str(value))
    if word in _VALUES.get(key, {}):
        return _VALUES[key][word]
    if not isinstance(value, str):
        return value
    if word in ("true", "yes", "on", "false", "no", "off"):
        return word in ("true", "yes", "on")
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() and re.fullmatch(r"[+-]?\d+", value) else number
