"""Every key of the configuration: name, type, meaning and allowed values.

Defaults live in `[tool.flwr.app.config]` of pyproject.toml and nowhere else. The field
`peft_lora_r` of the section with the prefix `model.lora.` is the key `model.lora.peft-lora-r`.
docs/configuration.md is generated from the docstrings under the fields.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import typing
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, ClassVar

from grandrounds.config.automatic import EMBEDDED_DATA, FORMULARY_DATA, FORMULARY_SITES
from grandrounds.config.codecs import CODECS
from grandrounds.config.prompt import BUILT_IN, TemplateText, is_own
from grandrounds.config.schedules import Schedules
from grandrounds.config.strategies import PERSONALISATIONS, PRESETS, STRATEGIES
from grandrounds.config.values import (
    AUTO,
    Day,
    OneOf,
    Patterns,
    Range,
    Scalar,
    Sha256,
    SomeOf,
    Table,
    Weights,
    words_of,
)

TRAIN = "train"
"""The split that is read of a data set on the Hub if no other is named."""

PLACES = ("run-directory", "resume-from", "consortium")
"""Keys that say where a run lives rather than what it computes; recipes leave them out."""

PLACES_AND_TRACKERS = (*PLACES, "train.report-to")
"""Keys that may differ between two runs that compute the same."""


@dataclass(frozen=True)
class FederationConfig:
    """Length, seed and location of the run."""

    prefix: ClassVar[str] = ""

    num_server_rounds: Annotated[int, Range(1, 100_000)]
    """Training rounds. The learning rate decays over them from `train.learning-rate-max` to
    `train.learning-rate-min`. A resume may give another number, above the rounds played."""
    earlier_schedules: Annotated[str, Schedules()]
    """Rounds that followed the schedule of another number of rounds, as `last/number`: `2/2,4/6`
    for rounds 1 and 2 of 2, and 3 and 4 of 6. Written by a resume with another
    `num-server-rounds`."""
    seed: Annotated[int, Range(0, 2**31 - 1)]
    """Seed for all randomness: adapter initialisation, partitions, cohorts, held-out splits, and
    each visit through (seed, round, partition)."""
    run_directory: str
    """Run directory on the server. Empty: `runs/<date>-<time>-<model>`."""
    resume_from: str
    """Run directory on the server to resume after its last finished round; with a higher
    `num-server-rounds`, also a run that is completed."""
    consortium: str
    """Consortium folder on the server, whose admissions bind each partition id to one Flower node.
    Empty: any node may claim any partition id. `grandrounds run --engine deployment` takes it from
    the connection."""
    secure_aggregation: Annotated[str, OneOf(("none", "masked32", "masked16"))]
    """Secure aggregation (beta, unreviewed): updates travel under masks, in fixed point of 32 or 16
    bits, and the server learns their sum only. In process and in simulation a rehearsal, where one
    machine holds all keys. docs/masks.md."""

    @property
    def length(self) -> tuple[str, int]:
        """What the learning rate of a round follows: earlier schedules, and number of rounds."""
        return self.earlier_schedules, self.num_server_rounds


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    prefix: ClassVar[str] = "model."

    name: str
    """Base model: Hugging Face Hub name, local folder, or `formulary` (small, built in)."""
    revision: str
    """Commit, branch or tag of a base on the Hub; empty: its main branch. What was loaded is
    recorded as `base-commit` in sites.json. A deployed site has its own copy."""
    quantization: Annotated[int, OneOf((0, 4, 8))]
    """Bits per base weight: 4 (NF4 with double quantisation), 8 (LLM.int8) or 0 (not quantised)."""
    dtype: Annotated[str, OneOf(("auto", "float32", "bfloat16"))]
    """Data type of unquantised weights, and compute type for 4-bit weights. `auto`: bfloat16 on a
    GPU that supports it, else float32."""
    gradient_checkpointing: Annotated[bool | str, OneOf((True, False, "auto"))]
    """Recompute activations in the backward pass, which saves memory for about a third more time.
    `auto`: in as few layers as make a site's estimated peak memory fit into what is free."""

    @property
    def source(self) -> str:
        """What loads the base: its name, with `@` and the revision where one is set."""
        return f"{self.name}@{self.revision}" if self.revision else self.name


@dataclass(frozen=True)
class LoraConfig:
    """The LoRA adapter that is trained and exchanged."""

    prefix: ClassVar[str] = "model.lora."

    peft_lora_r: Annotated[int, Range(1, 1024)]
    """LoRA rank."""
    peft_lora_alpha: Annotated[float, Range(0, above=True)]
    """LoRA alpha; the update BA is scaled by alpha / rank."""
    use_rslora: bool
    """Rank-stabilised LoRA (Kalajdzievski, 2023): BA is scaled by alpha / sqrt(rank)."""
    target_modules: str
    """Linear modules to adapt, comma-separated. `all-linear`: every linear layer except the output
    head. `auto`: PEFT's default for the architecture (`q_proj,v_proj` for Llama, Mistral and
    Qwen2), or `all-linear` for the built-in model. A name that ends in `?` is passed over where the
    base has no such module, as PEFT does with a list; entries' lists are read so."""
    rank_pattern: Annotated[str, Patterns(Range(1, 1024), whole=True)]
    """Ranks of single modules, as in PEFT: a table from names, or regular expressions of the ends
    of their paths, to ranks (`--set model.lora.rank-pattern.q_proj=4`). The first that matches
    holds; other modules have `peft-lora-r`. Empty: none."""
    alpha_pattern: Annotated[str, Patterns(Range(0, above=True), whole=False)]
    """Alphas of single modules, likewise. A module's rank does not change its alpha."""
    from_adapter: str
    """LoRA adapter from which training goes on, on the server: the folder of one, a run directory
    (its last adapter; `RUN/peft_8` for another), or `REPO@REVISION` on the Hub. Empty: training
    starts from an adapter drawn from the seed. See docs/continuing.md."""
    from_adapter_sha256: Annotated[str, Sha256()]
    """SHA-256 of that adapter's tensors, filled in and printed by `grandrounds run` and
    `grandrounds plan`; the adapter must have it. A deployed site compares what it receives."""
    dropout: Annotated[float, Range(0, 0.9)]
    """LoRA dropout probability during training."""
    peft_use_dora: bool
    """DoRA (Liu et al., 2024): a vector of magnitudes for each module, trained beside A and B. Two
    sites tell where they start, once: the norms of the base's weights, which the server never
    loads. Not with `ffa`, `rolora`, `product` and `flora`, nor in private or masked runs."""

    @property
    def is_continued(self) -> bool:
        """Whether training goes on from a saved adapter."""
        return bool(self.from_adapter or self.from_adapter_sha256)

    @property
    def ranks_by_pattern(self) -> dict[str, int]:
        """Expression of modules → their rank, in the order written."""
        return dict(json.loads(self.rank_pattern or "{}"))

    @property
    def alphas_by_pattern(self) -> dict[str, float]:
        """Expression of modules → their alpha, in the order written."""
        return dict(json.loads(self.alpha_pattern or "{}"))

    @property
    def highest_rank(self) -> int:
        """The highest rank that a module may have."""
        return max(self.peft_lora_r, *self.ranks_by_pattern.values(), 1)

    @property
    def scales(self) -> tuple[float, float]:
        """The least and the greatest factor of BA that a module may have, whatever matches."""
        ranks = (self.peft_lora_r, *self.ranks_by_pattern.values())
        alphas = (self.peft_lora_alpha, *self.alphas_by_pattern.values())
        least, greatest = min(alphas) / self._divisor(max(ranks)), max(alphas)
        return least, greatest / self._divisor(min(ranks))

    def _divisor(self, rank: int) -> float:
        return math.sqrt(rank) if self.use_rslora else rank


@dataclass(frozen=True)
class TrainConfig:
    """Training across rounds."""

    prefix: ClassVar[str] = "train."

    objective: Annotated[str, OneOf(("sft", "dpo"))]
    """What training minimises. `sft`: cross-entropy on answers. `dpo`: the loss of direct
    preference optimisation (Rafailov et al., 2023), on preferences: a prompt, a chosen and a
    rejected answer. docs/preferences.md."""
    dpo_beta: Annotated[float, Range(0, 1000, above=True)]
    """`dpo`: beta, by which log-ratios to the reference are multiplied; a higher one stays nearer
    to it."""
    dpo_length_normalised: bool
    """`dpo`: take the mean log-probability of an answer's tokens, not their sum. Larger values of
    `dpo-beta` suit it, such as 5."""
    dpo_reference: Annotated[str, OneOf(("base", "received"))]
    """`dpo`: the reference model. `base`: the base without adapter, the same in all rounds.
    `received`: the base with the adapter as a visit receives it, which moves from round to round.
    Held-out figures are against `base` always."""
    save_every_round: Annotated[int, Range(1)]
    """Rounds between PEFT checkpoints; the last round is always saved."""
    learning_rate_max: Annotated[float, Range(0, 1, above=True)]
    """Upper end of the cosine schedule over rounds: lr(r) = min + (max - min)(1 + cos(pi r /
    rounds)) / 2 for r = 1, 2, ..., FlowerTune's counting."""
    learning_rate_min: Annotated[float, Range(0, 1)]
    """Learning rate of the last round."""
    seq_length: Annotated[int, Range(8)]
    """Maximum sequence length in tokens, prompt plus answer. Longer answers are truncated and
    counted."""
    dynamic_data_seed: bool
    """`true`: each visit continues through the site's shuffled examples where the previous one
    stopped. `false`: every visit starts from the same examples, as in the FlowerTune template. A
    deployed site chooses its examples itself, see docs/deployment.md."""
    batching: Annotated[str, OneOf(("auto", "padding-free", "length-grouped", "padded"))]
    """How a batch is laid out; the loss is the same in every mode. `padding-free`: sequences
    concatenated, attention kept within each. `length-grouped`: padded batches of similar lengths.
    `padded`: padded batches in sampling order. `auto`: `padding-free` if the architecture supports
    it, else `length-grouped`."""
    response_only_logits: bool
    """Compute logits only at positions that predict an answer token; the loss is the same. Unknown
    architectures always compute all logits."""
    logits_chunk_tokens: Annotated[int, Range(0)]
    """With `response-only-logits`: maximum number of answer tokens whose logits are held at once;
    0: no limit."""
    replay_examples: Annotated[int, Range(0, 64, auto=True)]
    """Examples replayed beside each batch, against forgetting: public prompts with the base's own
    answers, none of them in an exam (docs/forgetting.md). `auto`: 3 if base and data are the
    formulary and visits are not private, else 0. At most as many as a batch has. Sites with a
    policy of their own replay nothing."""
    optimizer: Annotated[str, OneOf(("adamw_torch", "adamw_8bit", "paged_adamw_8bit"))]
    """PyTorch's AdamW, or bitsandbytes' 8-bit AdamW, optionally paged. Its state is reset at each
    visit."""
    num_threads: Annotated[int, Range(0, 1024)]
    """PyTorch CPU threads per site process. 0: one for bases under 5 million parameters, else
    PyTorch's default, at most the CPUs of the process; a resumed run keeps the number of its roll
    call. Adapters are bit-for-bit reproducible in process and in simulation for equal seed, thread
    count and `cpu-matmul`."""
    cpu_matmul: Annotated[str, OneOf(("auto", "default", "onednn"))]
    """Library for float32 matrix products on a CPU: PyTorch's `default` (usually MKL on x86), or
    `onednn`, which is refused where it computes in reduced precision. `auto`: oneDNN if a probe of
    0.2 s at the roll call finds it as exact and at least a fifth faster, for bases of 5 million
    parameters or more; a resumed run keeps the choice. See docs/performance.md."""
    fused_kernels: Annotated[str, OneOf(("auto", "off"))]
    """`auto`: on a GPU, compute adapted modules by a function of their own, and norms, MLPs and
    RoPE by Liger's kernels where `liger-kernel` is installed, each where a comparison with float32
    finds it as exact. Rounding differs. `off`: PyTorch's operations; so are private visits. See
    docs/performance.md."""
    devices: Annotated[int, Range(1, 16)]
    """Devices of one machine that a visit trains on, a process and a copy of the base on each. A
    batch is divided into as many shares, whose gradients are added in order: a step keeps its
    examples, and on fewer devices the result is the same, bit for bit. Not in private runs. See
    docs/performance.md."""
    report_to: Annotated[str, SomeOf(("none", "tensorboard", "wandb", "mlflow", "trackio"))]
    """Experiment trackers to log each round to, comma-separated; each must be installed. They
    receive the recipe and cohort means, never per-site values. See docs/export.md."""


@dataclass(frozen=True)
class TrainingArguments:
    """Training within one visit to one site, with the names and meaning of Hugging Face's
    TrainingArguments."""

    prefix: ClassVar[str] = "train.training-arguments."

    output_dir: Annotated[str, OneOf(("",))]
    """Must be empty: sites write no files."""
    learning_rate: Annotated[str, OneOf(("",))]
    """Must be empty: set `train.learning-rate-max` and `train.learning-rate-min` instead."""
    per_device_train_batch_size: Annotated[int, Range(1)]
    """Examples per forward and backward pass."""
    gradient_accumulation_steps: Annotated[int, Range(1)]
    """Passes per optimizer step; the loss is averaged over all their answer tokens."""
    num_train_epochs: Annotated[float, Range(0, 1_000_000, above=True)]
    """Epochs per visit; used only if `max-steps` is -1."""
    max_steps: Annotated[int, Range(-1, auto=True)]
    """Optimizer steps per visit; -1: train for `num-train-epochs` instead. `auto`: 6 if
    `data.partitioner` divides the formulary by its sites, itself being `auto`; else 5."""
    warmup_steps: Annotated[int, Range(0)]
    """Linear warm-up steps at the start of each visit; requires an
    `lr-scheduler-type` other than `"constant"`."""
    max_grad_norm: Annotated[float, Range(0)]
    """Gradient clipping threshold (L2 norm); 0: no clipping."""
    weight_decay: Annotated[float, Range(0, 1)]
    """Decoupled weight decay of AdamW."""
    lr_scheduler_type: Annotated[
        str, OneOf(("constant", "constant_with_warmup", "linear", "cosine"))
    ]
    """Learning-rate schedule within a visit: constant, or falling to 0 (linear, cosine)."""
    bf16: bool
    """Mixed precision in bfloat16 on a GPU that supports it; elsewhere float32, which the summary
    reports."""
    fp16: Annotated[bool, OneOf((False,))]
    """Must be `false`: use `bf16`, or neither for float32."""
    tf32: bool
    """TensorFloat-32 for float32 matrix products on a GPU that supports it."""
    gradient_checkpointing: Annotated[bool | str, OneOf((True, False, "auto", ""))]
    """Empty, or equal to `model.gradient-checkpointing`."""
    torch_compile: bool
    """Compile the MLP blocks of the base model: the first visit waits for the compiler (20 s for 90
    million parameters on a CPU); later steps move less memory."""
    logging_steps: Annotated[int, Range(1)]
    """No effect: every visit reports its loss."""
    save_steps: Annotated[int, Range(1)]
    """No effect: sites save nothing; the server saves rounds."""
    save_total_limit: Annotated[int, Range(1)]
    """No effect: every checkpoint is kept."""


USUAL_OUTER_RATE = 0.7
"""Server learning rate of `strategy.outer-nesterov`: that of DiLoCo's experiments."""


@dataclass(frozen=True)
class StrategyConfig:
    """Site selection and aggregation."""

    prefix: ClassVar[str] = "strategy."

    name: Annotated[str, OneOf(tuple(STRATEGIES))]
    """Aggregation rule; see docs/aggregation.md. `fedprox` averages like `fedavg` and adds a
    proximal term to local training."""
    proximal_mu: Annotated[float, Range(0)]
    """FedProx coefficient mu: adds mu/2 times the squared L2 distance to the received adapter to
    the training loss. Available with every rule except `fedavg`."""
    fraction_train: Annotated[float, Range(0, 1, above=True)]
    """Fraction of sites selected for training in each round, rounded down, but at least one site.
    `--sites-per-round` sets it as a number of sites."""
    cohorts: Annotated[str, OneOf(("balanced", "uniform"))]
    """`balanced`: every site is selected once, in random order, before any is selected again.
    `uniform`: each round samples independently, as in FlowerTune, so some sites are rarely
    selected."""
    fraction_evaluate: Annotated[float, Range(0, 1)]
    """Fraction of sites that report held-out loss, rounded down, but at least one site; the sample
    is fixed so that rounds are comparable. 0: none."""
    min_reply_fraction: Annotated[float, Range(0, 1, above=True)]
    """Minimum fraction of the cohort, rounded up, that must return a valid update; with fewer the
    run fails."""
    round_timeout_seconds: Annotated[float, Range(0, above=True)]
    """Time limit for a round in seconds; the round ends with the updates received so far. Has no
    effect on a visit in the in-process engine."""
    min_sites: Annotated[int, Range(0)]
    """Minimum number of connected sites for starting a run after `connect-timeout-seconds`; later
    sites join the rounds that follow. 0: all sites."""
    connect_timeout_seconds: Annotated[float, Range(0, above=True)]
    """Time in seconds to wait for all sites to connect, and at least as long for their first
    answer, the introduction at the roll call."""
    weighting: Annotated[str, OneOf(("examples", "equal"))]
    """`examples`: weight updates by the number of training examples, capped at the number in the
    site's admission, else at the one given at its first roll call, and by `largest-weight`.
    `equal`: weight all updates equally, as `fedmedian`, `fedtrimmedavg`, `krum`, `bulyan` and
    `nnm` always do."""
    largest_weight: Annotated[float, Range(0)]
    """Maximum weight of an update, as a multiple of its cohort's median weight; 0: no limit. At 2,
    one site of seven has at most 25 % of the total, whatever it claims."""
    max_rank: Annotated[int, Range(0, 4096)]
    """`flora`: maximum rank of the stacked adapter, which is truncated by SVD beyond it; 0: four
    times the rank."""
    site_ranks: str
    """`product`, `hetlora`: training ranks of sites 0, 1, 2, ..., comma-separated and repeated
    cyclically, for example `16,8,4`. Empty: the rank of the adapter."""
    rank_decay: Annotated[float, Range(0, 1, above=True)]
    """`hetlora`: share of its ranks that a site keeps when it prunes the last ones, rounded down;
    1: no site prunes. The byte counts of the plan are then upper bounds."""
    rank_penalty: Annotated[float, Range(0)]
    """`hetlora` with `rank-decay` below 1: weight of the norms of the ranks that a site would prune
    next, in its training loss."""
    ridge: Annotated[float, Range(0, 100)]
    """`lora-fair`: ridge of the correction of B, relative to the mean eigenvalue of the mean A's
    Gram matrix; larger values keep B nearer to the mean. 0: least squares."""
    outer_nesterov: bool
    """Follow the mean of the updates with Nesterov's momentum at the server, as DiLoCo does
    (`server-learning-rate`, `server-momentum`): `fedavg`, `fedprox`, `ffa`, `rolora`, `la-lora`."""
    server_learning_rate: Annotated[float, Range(0)]
    """`fedavgm`, `fedadam`, `fedyogi`, `fedadagrad`, `outer-nesterov`: server learning rate; 0: 1
    for `fedavgm`, 0.7 for `outer-nesterov`, `tau` for the others."""
    server_momentum: Annotated[float, Range(0, 0.9999)]
    """`fedavgm`, `outer-nesterov`: server momentum."""
    beta_1: Annotated[float, Range(0, 0.9999)]
    """`fedadam`, `fedyogi`: decay rate of the first moment."""
    beta_2: Annotated[float, Range(0, 0.9999)]
    """`fedadam`, `fedyogi`: decay rate of the second moment."""
    tau: Annotated[float, Range(0, above=True)]
    """`fedadam`, `fedyogi`, `fedadagrad`: adaptivity constant added to the root of the second
    moment."""
    num_malicious_nodes: Annotated[int, Range(0)]
    """`krum`, `multikrum`, `bulyan`, `nnm`: number of malicious updates to tolerate in a round; 0
    defends against none."""
    num_nodes_to_select: Annotated[int, Range(0)]
    """`multikrum`: number of updates to average; 0: all but `num-malicious-nodes`."""
    trimmed_share: Annotated[float, Range(0, 0.49)]
    """`fedtrimmedavg`: fraction of values trimmed at each end, per coordinate; rounded down to
    whole updates."""

    @property
    def prunes(self) -> bool:
        """Whether sites may prune ranks during the run."""
        return "rank-decay" in STRATEGIES[self.name].keys and self.rank_decay < 1

    @property
    def needed_replies(self) -> int:
        """Smallest number of updates with which the rule does what its paper says.

        krum: n >= 2 f + 3 (Blanchard et al., 2017, proposition 4.2). multikrum: also n >= m + f,
        so that all selected updates can be honest. bulyan: n >= 4 f + 3 (El Mhamdi et al., 2018,
        section 4). nnm: n >= 2 f + 1 (Allouah et al., 2023). fedtrimmedavg: enough for one to be
        trimmed at each end.
        """
        hostile = self.num_malicious_nodes
        if self.name == "krum":
            return 2 * hostile + 3
        if self.name == "multikrum":
            return max(2 * hostile + 3, self.num_nodes_to_select + hostile)
        if self.name == "bulyan":
            return 4 * hostile + 3
        if self.name == "nnm":
            return 2 * hostile + 1
        if self.name == "fedtrimmedavg" and self.trimmed_share > 0:
            near = max(1, math.ceil(1 / self.trimmed_share) - 1)
            return next(n for n in itertools.count(near) if int(self.trimmed_share * n))
        return 1

    @property
    def fewest_replies(self) -> int:
        """Smallest number of updates with which a round goes on; see `for_replies`."""
        return min(3, self.needed_replies)

    def for_replies(self, count: int) -> StrategyConfig:
        """Return the settings of the rule in a round to which `count` updates came.

        With fewer than the rule needs, it expects fewer hostile ones among them, as many as its
        bound allows. Hostile sites that send no usable update gain nothing by it: if j of
        n >= 2 f + 3 sites send none, n - j >= 2 (f - j) + 3, and for bulyan the same with 4.
        """
        if self.name == "fedtrimmedavg" and 3 <= count < self.needed_replies:
            return dataclasses.replace(self, trimmed_share=(1 + 1e-9) / count)  # one at each end
        if self.name not in ("krum", "multikrum", "bulyan", "nnm") or count < 3:
            return self
        most = (count - 1) // 2 if self.name == "nnm" else (count - 3) // 2
        hostile = min(self.num_malicious_nodes, (count - 3) // 4 if self.name == "bulyan" else most)
        selected = min(self.num_nodes_to_select, count - hostile)
        return dataclasses.replace(self, num_malicious_nodes=hostile, num_nodes_to_select=selected)

    @property
    def server_step(self) -> float:
        """Learning rate of an adaptive rule at the server, or of momentum; 0 for other rules."""
        if self.outer_nesterov:
            return self.server_learning_rate or USUAL_OUTER_RATE
        keys = STRATEGIES[self.name].keys
        if "server-learning-rate" not in keys:
            return 0.0
        return self.server_learning_rate or (self.tau if "tau" in keys else 1.0)


@dataclass(frozen=True)
class CommunicationConfig:
    """Encoding of adapters in transit; docs/communication.md compares the codecs."""

    prefix: ClassVar[str] = "communication."

    uplink_codec: Annotated[str, OneOf(tuple(CODECS))]
    """Codec for a site's update: `none` (float32, one array per tensor); `float32` (the same in a
    single array, which Flower transfers several times faster); `bf16`; `int8`, `int4`, `int2`
    (stochastic rounding, one scale per block); `ternary` (-1, 0 or 1 times a scale); `sign` (one
    bit per value, times the block's mean magnitude); `topk` (largest values only). Compression
    error is fed back into the site's next update."""
    downlink_codec: Annotated[str, OneOf(tuple(CODECS))]
    """Codec for what the server sends."""
    downlink: Annotated[str, OneOf(("complete", "incremental"))]
    """`complete`: send the whole adapter, as its change since the start of the run. `incremental`:
    send the change since the version that the site holds; the server stores it for every site."""
    catch_up_codec: Annotated[str, OneOf(("bf16", "int8", "int4", "int2"))]
    """`incremental`: codec for a site that holds no adapter yet or whose last update was lost."""
    block_size: Annotated[int, OneOf((16, 32, 64, 128, 256, 512, 1024))]
    """Values per scale in `int8`, `int4`, `int2`, `ternary` and `sign`."""
    kept_share: Annotated[float, Range(0, 1, above=True)]
    """`topk`: fraction of values sent."""
    entropy_coding: bool
    """Compress encoded messages with Zstandard where that makes them smaller. The byte counts of
    the plan are then upper bounds."""


@dataclass(frozen=True)
class DefenceConfig:
    """Checks on individual updates before aggregation."""

    prefix: ClassVar[str] = "defence."

    update_norm_bound: Annotated[float, Range(0)]
    """Maximum L2 norm of an update; larger updates are scaled down to it. 0: no bound. Under
    `fedexp` the server's step is up to k / 2 times the mean of k updates (docs/aggregation.md)."""
    largest_norm: Annotated[float, Range(0)]
    """Maximum L2 norm of an update, as a multiple of the median norm of the updates of the last
    rounds, in the first round of its own; larger updates are scaled down to it. 0: no such bound.
    The updates of the first round wait in a temporary file of the server."""
    min_cosine: Annotated[float, Range(-1, 1)]
    """Minimum cosine similarity of an update to the mean direction of the others; a lower one is
    rejected and counts as a failed update. -1: accept all. Any other value makes the server hold
    all updates of a round in memory."""
    largest_spread: Annotated[float, Range(0)]
    """Maximum variance of a round's updates in one direction, as a multiple of that in the median
    direction; while it is exceeded, the update farthest in that direction is rejected and counts as
    failed, up to fewer than a third of the cohort. 0: no such screen. The server holds all updates
    of a round in memory. See docs/aggregation.md."""
    preset: Annotated[str, OneOf(("none", *PRESETS))]
    """`robust`: against hostile sites, up to two in seven; sets `largest-spread`, `min-cosine` and
    `strategy.largest-weight`. docs/aggregation.md says what was measured, and what it does not
    stop."""

    @property
    def screens(self) -> bool:
        """Whether updates are compared with one another, and some may be rejected."""
        return self.min_cosine > -1 or self.largest_spread > 0


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of what a visit trains; see docs/privacy.md."""

    prefix: ClassVar[str] = "privacy."

    unit_guarantee: Annotated[str, OneOf(("none", "example"))]
    """`example`: visits train by DP-SGD, and hide whether any one unit took part: a record, or all
    records of a patient. A site's own policy may require it, and decides the rest. `none`: no
    guarantee."""
    target_epsilon: Annotated[float, Range(0, 100)]
    """ε of a whole run for each site; the noise follows from it. 0: `noise-multiplier` is given."""
    noise_multiplier: Annotated[float, Range(0, 1e4)]
    """Standard deviation of the noise in units of the clipping norm. 0: from `target-epsilon`."""
    delta: Annotated[float, Range(0, 0.1, above=True)]
    """Probability with which the guarantee may fail; below 1 / (10 x declared units). A site's
    policy may set a lower one."""
    clipping_norm: Annotated[float, Range(0, 1e6, above=True)]
    """L2 norm to which the gradient of each unit is clipped, over all trained tensors."""
    sampling_rate: Annotated[float, Range(0, 1)]
    """Probability with which a step draws a unit. 0: an expected batch of
    `per-device-train-batch-size` x `gradient-accumulation-steps` units."""
    declared_units: Annotated[int, Range(0)]
    """Units of each site, as declared in public; never counted. A site with a policy of its own
    declares them there. Needed where the run names the data."""
    unit_column: str
    """Column that names a record's patient; empty: each record is a unit. For data that the run
    itself names; a site with a policy of its own names the column there."""
    max_records_of_unit: Annotated[int, Range(1)]
    """Records of one unit that train at most."""
    report_train_loss: bool
    """Whether visits tell their mean training loss, with noise of its own within the same ε: the
    noise on gradients grows by 2 %. A site's policy must allow it too."""


@dataclass(frozen=True)
class PersonalisationConfig:
    """An adapter of its own for each site; see docs/personal.md."""

    prefix: ClassVar[str] = "personalisation."

    name: Annotated[str, OneOf(PERSONALISATIONS)]
    """How each site gets an adapter of its own after the last round. `local-tail`: it trains the
    federated one further on its own examples. `interpolate`: it trains one on its own examples
    alone, and takes a convex combination with the federated one. `shared-a`: A is
    shared and aggregated, B stays at the site. `dual`: a shared and a private adapter are trained
    together, and only the shared one travels. `none`: all sites have the same adapter."""
    steps: Annotated[int, Range(1, 100_000)]
    """Optimizer steps of a site's own training after the last round."""
    learning_rate: Annotated[float, Range(0, 1, above=True)]
    """Learning rate of the first of these steps; it falls linearly towards 0."""
    proximal_mu: Annotated[float, Range(0)]
    """Coefficient of a term that keeps these steps near the federated adapter: mu/2 times the
    squared L2 distance to it, as in Ditto (Li et al., 2021). Not with `interpolate`."""
    weights: Annotated[str, Weights()]
    """Weights of the site's own training among which it chooses, from 0 (the federated adapter) to
    1, comma-separated: by the loss of every second held-out example, and only the others are
    reported. A single weight is not chosen, and all held-out examples are reported."""


@dataclass(frozen=True)
class DataConfig:
    """Partitioning of the data, and the prompt."""

    prefix: ClassVar[str] = "data."

    num_partitions: Annotated[int, Range(1)]
    """Number of sites."""
    partitioner: Annotated[str, OneOf((AUTO, "iid", "dirichlet", "size-skewed", "natural"))]
    """How rows are split into sites: `iid`; `dirichlet` over the labels in `partition-by`;
    `size-skewed` (the share of site i is proportional to i + 1); `natural` (one site per value of
    `partition-by`). `auto`: `natural` by `site` for the formulary at its twenty sites, each of
    which knows drugs that no other knows; `iid` for all other data. A run records which it was."""
    partition_by: str
    """Column used by `dirichlet` and `natural`."""
    dirichlet_alpha: Annotated[float, Range(0, above=True)]
    """Concentration parameter of `dirichlet`; smaller values give each site fewer labels."""
    held_out_fraction: Annotated[float, Range(0, 0.9)]
    """Fraction of each site's rows held out for evaluation; 0: none, as in FlowerTune. A held-out
    question never occurs in the same site's training data, but may occur in another site's."""
    prompt_template: Annotated[str, TemplateText(BUILT_IN)]
    """`alpaca`: the FlowerTune prompt. `chat`: the tokenizer's own chat template, with its end
    of turn. `text`: no prompt, for plain text. A template of one's own is named by its file
    (`.jinja`, `.j2`, `.txt`, or a path), or is packaged: `alpaca-indented`, `chatml`, `llama2`; a
    recipe holds its text. See docs/data.md."""
    template_date: Annotated[str, Day()]
    """`chat`: the day that the template prints, if it prints one. Empty: the day on which the run
    starts, written into its recipe, so that it is resumed on the same text."""
    template_options: Annotated[str, Table()]
    """`chat`: values of the template's own options, such as `enable_thinking`; a table, set whole
    or by key (`--set data.template-options.enable_thinking=false`)."""
    system_prompt: str
    """`chat`, and templates of one's own that read `system`: system message before every question.
    Empty: what the template says without one."""
    train_on: Annotated[str, OneOf(("answers", "last"))]
    """What is learned of a conversation: all `answers` of the assistant, or the `last`."""
    subgroup_columns: str
    """Columns, comma-separated, by whose values the held-out loss is told after the last round, for
    subgroups of at least 10 held-out examples at a site. A site with a policy tells only columns
    that `tell.subgroup-columns` of its site.toml names too."""
    question_column: str
    """Column holding the question; empty: the answer column holds plain text. Several,
    comma-separated, are joined by a space: `instruction,input` for Alpaca's format. A column of
    turns (role and content) holds conversations. With the usual names, `input` and `output`, the
    columns of other forms are found:
    `messages`, `conversations`, `prompt` and `completion`, `instruction` and `output`."""
    answer_column: str
    """Column holding the answer, or plain text; for `train.objective = "dpo"` the chosen one. With
    the usual names of both columns, `prompt` and `chosen` are found."""
    rejected_column: str
    """`train.objective = "dpo"`: column holding the rejected answer."""

    @property
    def chat(self) -> tuple[str, str, str]:
        """What is set in the chat template: date, options as JSON, and system prompt."""
        if self.prompt_template != "chat":
            return "", "", ""
        return self.template_date, self.template_options, self.system_prompt

    @property
    def prompt(self) -> str:
        """What renders prompts: `prompt_template`, with the system prompt in one's own."""
        if not is_own(self.prompt_template) or not self.system_prompt:
            return self.prompt_template
        said = json.dumps(self.system_prompt, ensure_ascii=False)
        return f"{{% set system = {said} %}}\n{self.prompt_template}"


@dataclass(frozen=True)
class StaticConfig:
    """The data set; FlowerTune's leaderboard prescribes it."""

    prefix: ClassVar[str] = "static.dataset."

    name: str
    """Training data: Hugging Face Hub name; local .json, .jsonl, .csv, .tsv, .parquet or .txt file
    (.gz too), a folder of such files or a pattern (`cards/*.jsonl`); or data that are built in:
    `formulary`, `formulary-preferences` (docs/preferences.md) or `common-and-rare`
    (docs/privacy.md)."""
    config: str
    """Configuration of a data set on the Hub; empty: its only or default one."""
    split: str
    """Split of a data set on the Hub, or a part of it (`train[:1000]`)."""
    revision: str
    """Commit, branch or tag of a data set on the Hub; empty: its main branch. What was loaded is
    recorded as `data-commit` in sites.json."""

    @property
    def source(self) -> str:
        """What loads the data: their name, and what is set of configuration, split and revision."""
        config = f":{self.config}" if self.config else ""
        split = f"[{self.split}]" if self.split != TRAIN else ""
        return f"{self.name}{config}{split}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Config:
    """A validated configuration; `flat()` returns it as Flower's run config."""

    federation: FederationConfig
    model: ModelConfig
    lora: LoraConfig
    train: TrainConfig
    arguments: TrainingArguments
    strategy: StrategyConfig
    communication: CommunicationConfig
    defence: DefenceConfig
    privacy: PrivacyConfig
    personalisation: PersonalisationConfig
    data: DataConfig
    static: StaticConfig

    def flat(self) -> dict[str, Scalar]:
        """Return every key with its value, aliases resolved."""
        return {
            key: getattr(getattr(self, section), field)
            for key, (section, field) in FIELD_OF_KEY.items()
        }

    def recipe(self) -> dict[str, Scalar]:
        """Return every key with its value, with `PLACES` left empty."""
        return {**self.flat(), **dict.fromkeys(PLACES, "")}

    @property
    def is_on_formulary(self) -> bool:
        """Whether the data are the formulary's private facts, as answers or as preferences."""
        return self.static.name in FORMULARY_DATA

    @property
    def is_on_pairs(self) -> bool:
        """Whether training is on preferences, pairs of answers."""
        return self.train.objective == "dpo"

    @property
    def loss_unit(self) -> str:
        """The unit of training and held-out loss, in words."""
        return "nats per pair" if self.is_on_pairs else "nats per answer token"

    @property
    def is_formulary_by_site(self) -> bool:
        """Whether the sites are the formulary's own, each with the facts that only it knows."""
        data = self.data
        how = (data.partitioner, data.partition_by, data.num_partitions)
        return self.is_on_formulary and how == ("natural", "site", FORMULARY_SITES)

    @property
    def is_embedded_by_site(self) -> bool:
        """Whether the sites are those of built-in data, each with as many rows."""
        data = self.data
        how = (data.partitioner, data.partition_by)
        return self.static.name in EMBEDDED_DATA and how == ("natural", "site")

    @property
    def is_private(self) -> bool:
        """Whether visits train by DP-SGD."""
        return self.privacy.unit_guarantee != "none"

    @property
    def is_personal(self) -> bool:
        """Whether each site gets an adapter of its own."""
        return self.personalisation.name != "none"

    @property
    def keeps_a_part(self) -> bool:
        """Whether each site trains in its visits a part of the adapter that stays there."""
        return self.personalisation.name in ("shared-a", "dual")

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of a site's own training among which it chooses, in ascending order."""
        return tuple(sorted({float(word) for word in words_of(self.personalisation.weights)}))

    @property
    def subgroup_columns(self) -> tuple[str, ...]:
        """Columns by whose values the held-out loss is told."""
        return tuple(words_of(self.data.subgroup_columns))

    @property
    def is_masked(self) -> bool:
        """Whether the server receives masked sums of updates."""
        return self.federation.secure_aggregation != "none"

    @property
    def codec_up(self) -> str:
        """The codec of updates: the masks', or `communication.uplink-codec`."""
        masks = self.federation.secure_aggregation
        return masks if self.is_masked else self.communication.uplink_codec

    @property
    def cohort_size(self) -> int:
        """Number of sites that train in a round."""
        return share_of(self.strategy.fraction_train, self.data.num_partitions)

    @property
    def max_rank(self) -> int:
        """Maximum rank of FLoRA's stacked adapter."""
        return self.strategy.max_rank or 4 * self.lora.peft_lora_r

    @property
    def site_ranks(self) -> tuple[int, ...]:
        """Training ranks, repeated cyclically over the sites; empty: the adapter's rank."""
        return tuple(int(rank) for rank in words_of(self.strategy.site_ranks))

    @property
    def examples_per_step(self) -> int:
        """Examples per optimizer step at one site."""
        a = self.arguments
        return a.per_device_train_batch_size * a.gradient_accumulation_steps


SECTIONS: dict[str, Any] = typing.get_type_hints(Config)
"""Attribute of `Config` → dataclass of the section."""

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
"""Name used by other FlowerTune entries → key; empty if unused."""


DAYS = ("data.template-date",)
"""Keys that hold a date."""

PATTERNS = ("model.lora.rank-pattern", "model.lora.alpha-pattern")
"""Tables whose order counts: of several expressions that match, the first holds."""

TABLES = ("data.template-options", *PATTERNS)
"""Keys that hold a table, as JSON: Flower's run config has no key that is not declared."""


def table_of(key: str) -> str:
    """Return the key of the table that a dotted key belongs to; any other key as it is."""
    return next((table for table in TABLES if key.startswith(f"{table}.")), key)


def table_meant(key: str) -> str:
    """Return a key of a table with the table's name as it is spelled here; empty for any other."""
    spelled = key.replace("_", "-")
    found = next((table for table in TABLES if spelled.startswith(f"{table}.")), "")
    return f"{found}{key[len(found) :]}" if found else ""


def rounded_up(share: float, count: int) -> int:
    """Return `share` of `count`, rounded up, of the decimal as written: 0.07 of 100 is 7."""
    return math.ceil(Fraction(repr(share)) * count)


def share_of(fraction: float, count: int) -> int:
    """Return `fraction` of `count`, rounded down despite binary fractions (0.29 of 100 is 29).

    A fraction above 0 is at least one.
    """
    return max(1, math.floor(fraction * count + 1e-9)) if fraction > 0 else 0
