"""Every key of the configuration: its name, type, meaning and what it allows.

The defaults live in `[tool.flwr.app.config]` of pyproject.toml and nowhere else; the dataclasses
have none; `validation.parse` fills them. A field `peft_lora_r` of the section with the prefix
`model.lora.` is the key `model.lora.peft-lora-r`. The docstrings under the fields
are the source of docs/configuration.md.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from grandrounds.config.codecs import CODECS
from grandrounds.config.strategies import STRATEGIES
from grandrounds.config.values import OneOf, Range, Scalar, SomeOf, words_of

PLACES = ("run-directory", "resume-from", "consortium")
"""Keys that say where a run is, and on whose machines: no part of a recipe."""


@dataclass(frozen=True)
class FederationConfig:
    """The run as a whole."""

    prefix: ClassVar[str] = ""

    num_server_rounds: Annotated[int, Range(1)]
    """Rounds of training. The learning rate falls from its maximum to its minimum over them."""
    seed: Annotated[int, Range(0, 2**31 - 1)]
    """Every random number of a run comes from this: adapter initialisation, partitions, cohorts,
    held-out shares, and each visit through (seed, round, partition)."""
    run_directory: str
    """Where the server writes the run; empty: `runs/<date>-<time>-<model>`. Only the server reads
    it."""
    resume_from: str
    """A run directory to continue from its last finished round; only the server reads it."""
    consortium: str
    """Folder of the consortium on the server's machine. Its admissions say which of Flower's nodes
    each site is, and no other is taken for it; empty: a site is who it says. `grandrounds run
    --engine deployment` fills it in from the connection; only the server reads it."""


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    prefix: ClassVar[str] = "model."

    name: str
    """Hub name or local folder of the base model; `formulary` is the small one that is embedded."""
    quantization: Annotated[int, OneOf((0, 4, 8))]
    """Bits of the base weights: 4 (NF4 with double quantisation), 8 (LLM.int8) or 0 (none)."""
    dtype: Annotated[str, OneOf(("auto", "float32", "bfloat16"))]
    """Type of weights that are not quantised, and of the computation on 4-bit weights; `auto`:
    bfloat16 on a GPU that has it, else float32."""
    gradient_checkpointing: Annotated[bool | str, OneOf((True, False, "auto"))]
    """Compute activations again in the backward pass: less memory, about a third more time. `auto`:
    only where the plan of a site's memory does not fit into what is free."""


@dataclass(frozen=True)
class LoraConfig:
    """The adapter that is trained and travels."""

    prefix: ClassVar[str] = "model.lora."

    peft_lora_r: Annotated[int, Range(1, 1024)]
    """Rank of the adapter."""
    peft_lora_alpha: Annotated[float, Range(0, above=True)]
    """The adapter's product is scaled by alpha / rank."""
    target_modules: str
    """Names of the linear modules to adapt, with commas; `all-linear`: every one but the head;
    `auto`: what PEFT chooses for the architecture (`q_proj,v_proj` for Llama, Mistral and Qwen2),
    and `all-linear` for the embedded base."""
    dropout: Annotated[float, Range(0, 0.9)]
    """Dropout before the adapter in training."""
    peft_use_dora: Annotated[bool, OneOf((False,))]
    """DoRA. Only `false`: its magnitudes start from base weights, which the server never has."""


@dataclass(frozen=True)
class TrainConfig:
    """Training over the rounds."""

    prefix: ClassVar[str] = "train."

    save_every_round: Annotated[int, Range(1)]
    """A PEFT checkpoint every so many rounds, and one at the end."""
    learning_rate_max: Annotated[float, Range(0, 1, above=True)]
    """Learning rate before the first round; lr(r) = min + (max - min)(1 + cos(pi r / rounds)) / 2
    in round r = 1, 2, ... as FlowerTune counts."""
    learning_rate_min: Annotated[float, Range(0, 1)]
    """Learning rate of the last round."""
    seq_length: Annotated[int, Range(8)]
    """Most tokens of prompt and answer together; longer answers are cut at the end and counted."""
    dynamic_data_seed: bool
    """`true`: a visit continues in the site's shuffled examples where its last one ended. `false`:
    every visit begins at the same first examples, as the FlowerTune template does."""
    batching: Annotated[str, OneOf(("auto", "padding-free", "length-grouped", "padded"))]
    """`padding-free`: the examples of a batch lie one after another, each with its own attention;
    `length-grouped`: examples of similar length stand in one padded batch; `padded`: as they are
    drawn. `auto`: `padding-free` where the base's family is known and allows it, else
    `length-grouped`. The loss of a batch is the same in all."""
    response_only_logits: bool
    """Apply the head only where an answer token is predicted; for a base of an unknown family the
    logits of all tokens are computed. The loss is the same."""
    logits_chunk_tokens: Annotated[int, Range(0)]
    """With `response-only-logits`: most answer tokens whose logits are held at a time; 0: all."""
    optimizer: Annotated[str, OneOf(("adamw_torch", "adamw_8bit", "paged_adamw_8bit"))]
    """`adamw_torch`, or bitsandbytes' 8-bit AdamW, paged or not. It starts anew at each visit."""
    num_threads: Annotated[int, Range(0, 1024)]
    """CPU threads of PyTorch in a site's process; 0: one for a base under 5 million parameters,
    else as many as PyTorch takes. The same seed and the same number of threads give the same
    adapter in every engine."""
    report_to: Annotated[str, SomeOf(("none", "tensorboard", "wandb", "mlflow", "trackio"))]
    """Who is told of each round while it runs, with commas: the recipe and means over the cohort,
    nothing of single sites. Each must be installed. docs/export.md says where to look."""


@dataclass(frozen=True)
class TrainingArguments:
    """One visit to one site; names and meaning of Hugging Face's TrainingArguments."""

    prefix: ClassVar[str] = "train.training-arguments."

    output_dir: Annotated[str, OneOf(("",))]
    """Only empty: a site writes no files."""
    learning_rate: Annotated[str, OneOf(("",))]
    """Only empty: the round's rate comes from `train.learning-rate-max` and `-min`."""
    per_device_train_batch_size: Annotated[int, Range(1)]
    """Examples of one forward and backward pass."""
    gradient_accumulation_steps: Annotated[int, Range(1)]
    """Passes of one optimizer step; the loss is the mean over all their answer tokens."""
    num_train_epochs: Annotated[float, Range(0, 1_000_000, above=True)]
    """Epochs of one visit; counts only where `max-steps` is -1."""
    max_steps: Annotated[int, Range(-1)]
    """Optimizer steps of one visit; -1: as many as `num-train-epochs` takes."""
    warmup_steps: Annotated[int, Range(0)]
    """Steps over which the learning rate of a visit rises from 0; needs
    `lr-scheduler-type = "constant_with_warmup"`."""
    max_grad_norm: Annotated[float, Range(0)]
    """Gradients are scaled down to this L2 norm; 0 leaves them alone."""
    weight_decay: Annotated[float, Range(0, 1)]
    """Decoupled weight decay of AdamW."""
    lr_scheduler_type: Annotated[str, OneOf(("constant", "constant_with_warmup"))]
    """Learning rate inside a visit."""
    bf16: bool
    """Mixed precision in bfloat16 on a GPU that has it; elsewhere float32, as the summary says."""
    fp16: Annotated[bool, OneOf((False,))]
    """Only `false`: use bf16 or float32."""
    tf32: bool
    """TensorFloat-32 for float32 products on a GPU that has it."""
    gradient_checkpointing: Annotated[bool | str, OneOf((True, False, "auto", ""))]
    """Empty, or the same value as `model.gradient-checkpointing`."""
    torch_compile: bool
    """Compile the MLPs of the base: a minute at the first visit, for less memory traffic after."""
    logging_steps: Annotated[int, Range(1)]
    """Accepted, without effect: every visit's loss is recorded."""
    save_steps: Annotated[int, Range(1)]
    """Accepted, without effect: a site saves nothing, the server saves rounds."""
    save_total_limit: Annotated[int, Range(1)]
    """Accepted, without effect: every checkpoint is kept."""


@dataclass(frozen=True)
class StrategyConfig:
    """Who takes part in a round, and how replies become the next adapter."""

    prefix: ClassVar[str] = "strategy."

    name: Annotated[str, OneOf(tuple(STRATEGIES))]
    """Aggregation rule; docs/aggregation.md says what each computes. `fedprox` averages like
    `fedavg`; the proximal term at the sites makes the difference."""
    proximal_mu: Annotated[float, Range(0)]
    """FedProx's mu: the loss gains mu/2 times the squared distance to the adapter received. Every
    rule but `fedavg` takes it."""
    fraction_train: Annotated[float, Range(0, 1, above=True)]
    """Share of the sites that trains in a round, rounded down."""
    cohorts: Annotated[str, OneOf(("balanced", "uniform"))]
    """`balanced`: all sites take part once, in random order, before any does again. `uniform`: each
    round draws anew, as FlowerTune does; some sites are then seldom heard."""
    fraction_evaluate: Annotated[float, Range(0, 1)]
    """Share of the sites that answers held-out loss, drawn once so that rounds compare; 0: none."""
    min_reply_fraction: Annotated[float, Range(0, 1, above=True)]
    """Share of a round's cohort, rounded up, that must reply well; fewer end the run as failed."""
    round_timeout_seconds: Annotated[float, Range(0, above=True)]
    """A round ends after this time with those who answered. In process it never cuts a visit."""
    min_sites: Annotated[int, Range(0)]
    """Sites with which a run begins after `connect-timeout-seconds`; those that come later take
    part from then on. 0: all of them."""
    connect_timeout_seconds: Annotated[float, Range(0, above=True)]
    """How long the server waits for all sites before the roll call."""
    weighting: Annotated[str, OneOf(("examples", "equal"))]
    """A reply counts by its site's number of training examples (at most what the site said at roll
    call), or all replies count alike."""
    max_rank: Annotated[int, Range(0, 4096)]
    """`flora`: highest rank of the stack, above which it is cut by SVD; 0: four times the rank."""
    site_ranks: str
    """`product`: ranks that sites 0, 1, 2, ... train, with commas, repeated over the sites, for
    example `16,8,4`; empty: all train the adapter's rank."""
    server_learning_rate: Annotated[float, Range(0)]
    """`fedavgm`, `fedadam`, `fedyogi`, `fedadagrad`: the server's step; 0: 1 for `fedavgm`, `tau`
    for the others."""
    server_momentum: Annotated[float, Range(0, 0.9999)]
    """`fedavgm`: momentum of the server's step."""
    beta_1: Annotated[float, Range(0, 0.9999)]
    """`fedadam`, `fedyogi`: decay of the first moment."""
    beta_2: Annotated[float, Range(0, 0.9999)]
    """`fedadam`, `fedyogi`: decay of the second moment."""
    tau: Annotated[float, Range(0, above=True)]
    """`fedadam`, `fedyogi`, `fedadagrad`: added to the root of the second moment."""
    num_malicious_nodes: Annotated[int, Range(0)]
    """`krum`, `multikrum`, `bulyan`: how many replies of a round may be hostile."""
    num_nodes_to_select: Annotated[int, Range(0)]
    """`multikrum`: how many replies are averaged; 0: all but `num-malicious-nodes`."""
    trimmed_share: Annotated[float, Range(0, 0.49)]
    """`fedtrimmedavg`: share of the values cut off at either end, coordinate by coordinate."""


@dataclass(frozen=True)
class CommunicationConfig:
    """How adapters are encoded on their way. docs/communication.md compares."""

    prefix: ClassVar[str] = "communication."

    uplink_codec: Annotated[str, OneOf(tuple(CODECS))]
    """Encoding of a site's change: `none` (float32, an array for each tensor); `float32` (the same
    in one array, which Flower moves several times faster); `bf16`; `int8`, `int4`, `int2`
    (stochastic rounding, a scale per block); `ternary` (minus, zero or plus); `sign` (one bit and a
    block's mean magnitude); `topk` (the largest values). What a codec loses comes at the next
    visit."""
    downlink_codec: Annotated[str, OneOf(tuple(CODECS))]
    """Encoding of what the server sends."""
    downlink: Annotated[str, OneOf(("complete", "incremental"))]
    """`complete`: every message holds the whole adapter, as its change since the start of the run.
    `incremental`: the change since what the site holds; the server keeps that for every site."""
    catch_up_codec: Annotated[str, OneOf(("bf16", "int8", "int4", "int2"))]
    """`incremental`: encoding for a site that holds nothing yet, or whose last reply was lost."""
    block_size: Annotated[int, OneOf((16, 32, 64, 128, 256, 512, 1024))]
    """Values that share a scale in `int8`, `int4`, `int2`, `ternary` and `sign`."""
    kept_share: Annotated[float, Range(0, 1, above=True)]
    """`topk`: share of the values that is sent."""
    entropy_coding: bool
    """Compress encoded messages by Zstandard where that makes them smaller. The plan's bytes are
    then the most there can be."""


@dataclass(frozen=True)
class DefenceConfig:
    """What is done to single updates before any rule sees them."""

    prefix: ClassVar[str] = "defence."

    update_norm_bound: Annotated[float, Range(0)]
    """An update with a larger L2 norm is scaled down to it; 0: none is."""
    min_cosine: Annotated[float, Range(-1, 1)]
    """An update whose cosine to the mean direction of the others is lower is left out, and counts
    as a failed reply; -1: none is. The server then holds all replies of a round."""


@dataclass(frozen=True)
class DataConfig:
    """How the data become sites, and rows become text."""

    prefix: ClassVar[str] = "data."

    num_partitions: Annotated[int, Range(1)]
    """Number of sites."""
    partitioner: Annotated[str, OneOf(("iid", "dirichlet", "size-skewed", "natural"))]
    """How rows become sites: `iid`; `dirichlet` over the labels of `partition-by`; `size-skewed`
    (site i gets a share proportional to i + 1); `natural` (a site per value of `partition-by`)."""
    partition_by: str
    """Column for `dirichlet` and `natural`."""
    dirichlet_alpha: Annotated[float, Range(0, above=True)]
    """Concentration of `dirichlet`; small values give sites with few labels."""
    held_out_fraction: Annotated[float, Range(0, 0.9)]
    """Share of its rows that each site holds out by seed for held-out loss; 0: none, as FlowerTune.
    A site's held-out questions are none of its own training questions; another site may train on
    the same question."""
    prompt_template: Annotated[str, OneOf(("alpaca", "chat"))]
    """`alpaca`: FlowerTune's text. `chat`: the tokenizer's own chat template."""
    question_column: str
    """Column that holds the question."""
    answer_column: str
    """Column that holds the answer."""


@dataclass(frozen=True)
class StaticConfig:
    """What the FlowerTune leaderboard holds fixed."""

    prefix: ClassVar[str] = "static.dataset."

    name: str
    """Hub name of a data set, a local .json, .jsonl, .csv or .parquet file (.gz too), or
    `formulary`."""


@dataclass(frozen=True)
class Config:
    """A whole validated configuration; `flat()` gives it back as Flower's flat run config."""

    federation: FederationConfig
    model: ModelConfig
    lora: LoraConfig
    train: TrainConfig
    arguments: TrainingArguments
    strategy: StrategyConfig
    communication: CommunicationConfig
    defence: DefenceConfig
    data: DataConfig
    static: StaticConfig

    def flat(self) -> dict[str, Scalar]:
        """Return every key with its value, aliases resolved."""
        return {
            key: getattr(getattr(self, section), field)
            for key, (section, field) in FIELD_OF_KEY.items()
        }

    def recipe(self) -> dict[str, Scalar]:
        """Return every key with its value, but those that say where a run is."""
        return {**self.flat(), **dict.fromkeys(PLACES, "")}

    @property
    def cohort_size(self) -> int:
        """Sites that train in one round: fraction-train of the sites, rounded down."""
        return share_of(self.strategy.fraction_train, self.data.num_partitions)

    @property
    def max_rank(self) -> int:
        """Highest rank of `flora`'s stack."""
        return self.strategy.max_rank or 4 * self.lora.peft_lora_r

    @property
    def site_ranks(self) -> tuple[int, ...]:
        """Ranks that the sites train, repeated over them; empty: the adapter's."""
        return tuple(int(rank) for rank in words_of(self.strategy.site_ranks))

    @property
    def examples_per_step(self) -> int:
        """Examples of one optimizer step at one site."""
        a = self.arguments
        return a.per_device_train_batch_size * a.gradient_accumulation_steps


SECTIONS: dict[str, Any] = typing.get_type_hints(Config)
"""Name of the attribute of `Config` → dataclass of the section."""

FIELD_OF_KEY: dict[str, tuple[str, str]] = {
    section.prefix + field.name.replace("_", "-"): (name, field.name)
    for name, section in SECTIONS.items()
    for field in dataclasses.fields(section)
}
"""Kebab-case key → (section, field). The only place where the two spellings meet."""

ALIASES = {
    "strategy.fraction-fit": "strategy.fraction-train",
    "train.training-arguments.optim": "train.optimizer",
    "model.lora.use-dora": "model.lora.peft-use-dora",
}
"""Older or other entries' names of a key; empty when not used."""


def share_of(fraction: float, count: int) -> int:
    """Return `fraction` of `count` rounded down, safe from binary fractions (0.29 of 100 is 29)."""
    return math.floor(fraction * count + 1e-9)
