"""Memory of a visit and of the server in bytes, computed from shapes alone.

Each term is a formula with its source; together they estimate the peak of PyTorch's allocations.
The formulas count the tensors that the layers of transformers (5.24) save for the backward pass
when LoRA factors are trained over a frozen base with SDPA attention, which materialises no matrix
of tokens x tokens, and what fused kernels save in their place. tests/model/test_memory.py compares
them with what small models save. Allocator fragmentation is not included. docs/planning.md compares
totals with measured peaks.

N is the number of tokens in a batch, padding included; h, i, V the hidden, intermediate and
vocabulary sizes; q the width of all query heads together; r the adapter's rank; e the bytes per
element of a linear layer's output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from grandrounds.config.keys import Config
from grandrounds.model.architectures import Architecture, Linear, adapter_shapes
from grandrounds.wire.adapter import A, Ranks, count_parameters, factor_of, of_factors

MIB = 2**20

CUDA_CONTEXT_BYTES = 512 * MIB
"""Allowance for the CUDA context and library workspaces: a round figure, not measured. It differs
by GPU and driver."""

NF4_BYTES_PER_WEIGHT = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""4 bits, an 8-bit scale per 64 weights and a float32 per 256 scales, 4.127 bits in all: NF4 with
double quantisation (Dettmers et al., QLoRA, 2023, section 3)."""

Checkpointing = bool | int
"""Which layers recompute their activations in the backward pass: True for all, False for none, or
the number of first layers."""

ADAMW_STATES = 2
"""First and second moment."""

EIGHT_BIT_BLOCK = 256
"""Elements that share a float32 scale in bitsandbytes' 8-bit optimizer states (0.49)."""

EIGHT_BIT_MINIMUM = 4096
"""Tensors with fewer elements keep float32 states (`min_8bit_size` of bitsandbytes)."""

SUM_BYTES_PER_PARAMETER = 16
"""Running mean of the server's `weighted_mean`: two float64 sums."""


# --- One forward and backward pass ----------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """The number formats of a visit."""

    quantization: int
    """Bits of the base's linear weights: 4, 8, or 0 for none."""
    base_bytes: int
    """Bytes per weight that is not quantised: 2 (bfloat16) or 4 (float32)."""
    autocast: bool
    """Whether matrix products run in bfloat16 regardless of the weights' type."""
    grouped_heads: bool = False
    """Whether attention without a mask reads keys and values of grouped heads as they are: a GPU's
    kernels for two-byte types do, others have them repeated to all heads."""
    fused: frozenset[str] = frozenset()
    """What fused kernels compute, of `model.fused.PIECES`."""

    @property
    def product_bytes(self) -> int:
        """e. The linear layers of bitsandbytes return the type of their input, which is that of the
        residual stream."""
        return 2 if self.autocast and not self.quantization else self.base_bytes

    @property
    def logit_bytes(self) -> int:
        """Bytes per logit; the head is not quantised."""
        return 2 if self.autocast else self.base_bytes

    @property
    def adapter_input_bytes(self) -> int:
        """Bytes per element of the input to a float32 factor."""
        return 2 if self.autocast else 4


@dataclass(frozen=True)
class Batch:
    """The shape of one forward and backward pass."""

    examples: int
    tokens: int
    """Tokens per example, padding included."""
    padded: bool = True
    """Whether the batch has a padding mask; otherwise sequences are concatenated."""

    @property
    def positions(self) -> int:
        """N: examples x tokens."""
        return self.examples * self.tokens


@dataclass(frozen=True)
class Workload:
    """What a visit computes with; the methods give the bytes that it takes."""

    architecture: Architecture
    targets: Sequence[str]
    """Names of the adapted modules."""
    rank: int
    """r, of the adapter on the base."""
    batch: Batch
    precision: Precision
    dropout_mask_bytes: int = 0
    """Bytes per element of a dropout mask: 1 on a GPU, 4 on a CPU; 0 without dropout."""
    own_ranks: Mapping[str, int] = field(default_factory=dict)
    """Name of a module → its rank where that is not r; the highest of all layers."""
    dora: bool = False
    """Whether each adapted module has DoRA's magnitudes."""

    @property
    def base_bytes(self) -> int:
        """The frozen base.

        Linear weights take 4.127 bits (NF4), 8 bits and a float32 scale per output (LLM.int8,
        Dettmers et al., 2022, section 2.1), or the base's type. Embedding, head, norms and biases
        are never quantised.
        """
        base, precision = self.architecture, self.precision
        linear = base.linear_parameters
        rest = base.parameters - linear
        if precision.quantization == 4:
            stored = round(linear * NF4_BYTES_PER_WEIGHT)
        elif precision.quantization == 8:
            stored = linear + 4 * base.num_layers * sum(m.outputs for m in base.linears)
        else:
            stored = linear * precision.base_bytes
        return stored + rest * precision.base_bytes

    @property
    def dequantized_bytes(self) -> int:
        """The largest linear weight, dequantised for its product; one module at a time."""
        if not self.precision.quantization:
            return 0
        largest = max(m.inputs * m.outputs for m in self.architecture.linears)
        return largest * self.precision.base_bytes

    def kept_bytes(self, layers: int) -> int:
        """Return the bytes of the first layers' linear weights, kept dequantised beside the base.

        Of the other layers the largest, one at a time, and for fused modules each layer's scales in
        float32, 4 bytes per 64 weights.
        """
        base, precision = self.architecture, self.precision
        of_layer = base.linear_parameters // base.num_layers
        total = of_layer * layers * precision.base_bytes
        if layers < base.num_layers:
            total += self.dequantized_bytes
            if precision.quantization == 4 and self._has_fused_lora:
                total += of_layer // 16 * (base.num_layers - layers)
        return total

    def checkpointed_layers(self, checkpointing: Checkpointing) -> int:
        """Return how many first layers recompute their activations."""
        layers = self.architecture.num_layers
        return layers if checkpointing is True else min(int(checkpointing), layers)

    def weight_copies_bytes(self, checkpointing: Checkpointing) -> int:
        """Return the bytes of bfloat16 copies of float32 weights.

        Autocast copies a frozen weight for each product and keeps the copy for the backward pass:
        those of the head and of all layers that are not checkpointed, or of one that is.
        """
        base, precision = self.architecture, self.precision
        if not precision.autocast or precision.base_bytes == 2:
            return 0
        linear = 0 if precision.quantization else base.linear_parameters
        layers = max(1, base.num_layers - self.checkpointed_layers(checkpointing))
        of_linear = linear * layers // base.num_layers
        return 2 * (of_linear + base.vocabulary * base.hidden_size)

    def layer_bytes(self, *, first: bool = False) -> int:
        """Return the bytes that one layer saves for the backward pass.

        - Norm: its input in float32 and the inverse root per token, 4 N (h + 1), two or four times
          a layer; Qwen3 also normalises queries and keys. Fused, the input as it is.
        - Attention: queries, keys and values repeated to all heads, and the output, 4 N q e, or
          2 N (q + k) e where heads stay grouped, k the width of the keys; its log-sum-exp,
          4 N heads; the mask of a padded batch as a bias, examples x tokens^2 e. Without padding
          the outputs of the sequences are concatenated, which adds one matrix where an adapted
          module reads them. Where attention is soft-capped (Gemma 2), the matrices of tokens x
          tokens: capped scores, and probabilities in float32 and in the product's type.
        - MLP: act(gate) * up saves gate, act(gate) and up: 3 N i e. Fused, 2 N i e.
        - A frozen linear module saves nothing but its weight; LLM.int8 saves its input
          (`int8_input_bytes`).
        - A factor A saves its input: shared by all modules that read it unless it is cast or
          dropped out, otherwise one each; fused, what was dropped out is computed again. B saves
          N r elements. Dropout saves its mask. DoRA scales the outputs of the module and of B, and
          saves both; with dropout the module's weight too.

        Parameters
        ----------
        first : bool
            Whether it is the first layer: nothing before its first factor needs a gradient.
        """
        a, batch, precision = self.architecture, self.batch, self.precision
        e, factor_input_bytes = precision.product_bytes, precision.adapter_input_bytes
        queries, keys = a.num_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        per_token = self._norm_bytes(a.hidden_size) * (a.family.norms - first)
        if a.family.head_norms:
            per_token += a.num_heads * self._norm_bytes(a.head_dim)
            per_token += a.num_key_value_heads * self._norm_bytes(a.head_dim)
        if a.family.attention_matrix:
            scores = batch.tokens * a.num_heads
            per_token += 3 * queries * e + scores * (e + 4 + (e if e != 4 else 0))
        else:
            grouped = precision.grouped_heads and not batch.padded
            per_token += 2 * (queries + (keys if grouped else queries)) * e + 4 * a.num_heads
            per_token += batch.tokens * e if batch.padded else 0
        per_token += (2 if "MLP" in precision.fused else 3) * a.intermediate_size * e
        is_fused = self._has_fused_lora
        # On other than 4-bit weights PEFT casts to float32, and autocast back.
        is_cast = factor_input_bytes != e or (precision.autocast and precision.quantization != 4)
        copied = not is_fused and (self.dropout_mask_bytes or is_cast)
        shared_inputs = set()
        for module in a.linears:
            source = _source(module)
            # The attention of a padded batch saves its output anyway.
            is_new = source != "attention" or not batch.padded
            if precision.quantization == 8 and is_new:
                shared_inputs.add((source, module.inputs))
            if module.name not in self.targets:
                continue
            per_token += self.own_ranks.get(module.name, self.rank) * factor_input_bytes
            if self.dora:
                result_bytes = factor_input_bytes if self.dropout_mask_bytes else e
                per_token += module.outputs * (result_bytes + factor_input_bytes)
            if copied:
                per_token += module.inputs * factor_input_bytes
            elif is_new:
                shared_inputs.add((source, module.inputs))
            if is_fused or not (first and source == "first norm"):
                per_token += module.inputs * self.dropout_mask_bytes
        saved = batch.positions * (per_token + e * sum(width for _, width in shared_inputs))
        return saved + self.dropped_out_weight_bytes

    @property
    def _has_fused_lora(self) -> bool:
        """Whether adapted modules are computed by `model.lora_linear`, by its own conditions."""
        precision = self.precision
        is_one_type = (
            precision.base_bytes == precision.product_bytes == precision.adapter_input_bytes
        )
        left_to_peft = self.dora or precision.quantization == 8
        return "LoRA" in precision.fused and is_one_type and not left_to_peft

    def _norm_bytes(self, width: int) -> int:
        """Return the bytes per token that a norm over `width` values saves."""
        return (self.precision.base_bytes if "norm" in self.precision.fused else 4) * width + 4

    def dora_bytes(self, checkpointing: Checkpointing) -> int:
        """Return the peak bytes of the norm of W + s B A in one module; 0 without DoRA.

        PEFT (0.19 to 0.21) puts the identity through A and B, 4 in^2, for B A, 4 in out, adds its
        multiple to W, 8 in out, and converts W to float32 first, 4 in out more where it is not.
        With checkpointing of all layers also the one that is recomputed.
        """
        if not self.dora:
            return 0
        copies = 3 if self.precision.base_bytes == 4 and not self.precision.quantization else 4
        adapted = [m for m in self.architecture.linears if m.name in self.targets]
        most = max(4 * m.inputs * (m.inputs + copies * m.outputs) for m in adapted)
        is_recomputed = self.checkpointed_layers(checkpointing) == self.architecture.num_layers
        return most + (self.layer_bytes() if is_recomputed else 0)

    @property
    def dropped_out_weight_bytes(self) -> int:
        """The weights that DoRA's dropout keeps for the backward pass of one layer.

        A dropped-out input needs a product of its own with W, converted to the type of the factors'
        products unless W is float32.
        """
        a, precision = self.architecture, self.precision
        exact = precision.base_bytes == 4 and not precision.quantization and not precision.autocast
        if not self.dora or not self.dropout_mask_bytes or exact:
            return 0
        weights = sum(m.inputs * m.outputs for m in a.linears if m.name in self.targets)
        return weights * precision.adapter_input_bytes

    @property
    def int8_input_bytes(self) -> int:
        """The inputs that one layer's LLM.int8 modules save: N (2 h + q + i) e for Llama.

        bitsandbytes (0.50) keeps them outside autograd's saved tensors, so checkpointing does not
        free them.
        """
        if self.precision.quantization != 8:
            return 0
        read = {(_source(m), m.inputs) for m in self.architecture.linears}
        width = sum(inputs for _, inputs in read)
        return self.batch.positions * width * self.precision.product_bytes

    def saved_bytes(self, checkpointing: Checkpointing) -> int:
        """Return the bytes saved for the backward pass by all layers and the last norm.

        A checkpointed layer saves only its input, N h in the type of the residual stream (Chen et
        al., Training deep nets with sublinear memory cost, 2016, section 4.1, one segment a layer),
        and LLM.int8 its modules' inputs as well.
        """
        n, h = self.batch.positions, self.architecture.hidden_size
        again = self.checkpointed_layers(checkpointing)
        whole = self.architecture.num_layers - again
        total = again * (n * h * self.precision.base_bytes + self.int8_input_bytes)
        if not again:
            total += self.layer_bytes(first=True)
            whole -= 1
        return total + whole * self.layer_bytes() + n * self._norm_bytes(h)

    def loss_bytes(self, chunk_tokens: int | None) -> int:
        """Return the peak bytes of logits and loss when every token belongs to an answer.

        The head on every token gives N V logits; they are copied to float32, and their log-softmax
        is saved: N V (e + 8), or N V e more where logits are soft-capped. In the backward pass
        gradients of the same sizes take their place.

        `loss.head_nll_sum` holds the logits of c tokens only, c V e, and in float32, c V 4 (the
        same matrix if e is 4); the slope of a soft cap takes c V 4 more. Beside them are the hidden
        states of the answers, their gradient, and the chunk's: (2 N + c) h e.

        Parameters
        ----------
        chunk_tokens : int or None
            Tokens per chunk of logits, 0 for one chunk; None: the head is applied to every token.
        """
        n, v, e = self.batch.positions, self.architecture.vocabulary, self.precision.logit_bytes
        capped = self.architecture.family.soft_capped_logits
        if chunk_tokens is None:
            return n * v * (e + 8 + (e if capped else 0))
        held = min(n, chunk_tokens or n)
        logits = held * v * ((4 if e == 4 else e + 4) + (4 if capped else 0))
        return logits + (2 * n + held) * self.architecture.hidden_size * e

    def backward_bytes(self, checkpointing: Checkpointing) -> int:
        """Return the peak bytes of gradients in one layer: 3 N i e in the MLP, or N i e where the
        fused one writes them over what it saved, and 2 N h e along the residual stream.

        With checkpointing of all layers also the layer that is recomputed. Of only some, the last
        layer is not, and those before are when it has been freed.
        """
        n, h = self.batch.positions, self.architecture.hidden_size
        # The input of an adapted down_proj is freed before its factors' gradients are allocated.
        of_mlp = 2 if "down_proj" in self.targets else 3
        if "MLP" in self.precision.fused:
            of_mlp = 1
        total = (
            n
            * (of_mlp * self.architecture.intermediate_size + 2 * h)
            * self.precision.product_bytes
        )
        if self.checkpointed_layers(checkpointing) == self.architecture.num_layers:
            total += self.layer_bytes() - n * self._norm_bytes(h)  # the last norm's is freed before
            if self.precision.base_bytes == 4 or "norm" in self.precision.fused:
                total -= self.precision.base_bytes * n * h  # a layer's input is its norm's
        return total


_SOURCES = {
    "o_proj": "attention",
    "gate_proj": "second norm",
    "up_proj": "second norm",
    "gate_up_proj": "second norm",
    "down_proj": "product",
}


def _source(module: Linear) -> str:
    """Return which output of the layer a linear module reads."""
    return _SOURCES.get(module.name, "first norm")


# --- A site, and the server -----------------------------------------------------------------------


@dataclass(frozen=True)
class SiteMemory:
    """Bytes on a site's GPU at the peak of a visit; with several devices, on rank 0's, which holds
    most: only it has an optimizer, and all have a base and a share of the batch."""

    cuda_context: int
    """`CUDA_CONTEXT_BYTES`."""
    base: int
    """The frozen base."""
    adapter: int
    """The adapter in float32, twice: as trained and as received."""
    gradient: int
    """The adapter's gradient, and that of FedProx's proximal term where there is one; with several
    devices also the one that another has sent. In a private visit a gradient for each unit of a
    microbatch instead, and their sum in float64."""
    optimizer: int
    """AdamW's moments."""
    activations: int
    """Tensors saved for the backward pass."""
    working: int
    """The largest of `Workload.loss_bytes`, `Workload.backward_bytes` and `Workload.dora_bytes`."""
    weight_copies: int
    """Dequantised linear weights: those that are kept, and the largest of the others; bfloat16
    copies of float32 weights."""

    @property
    def total(self) -> int:
        """The estimated peak."""
        return sum(asdict(self).values())


def gradient_bytes(config: Config) -> int:
    """Return the bytes per trained value of the gradients that are held beside activations.

    Autograd's is held in float32, and so are the proximal term's and one that is received. A
    private visit has none of its own then, but one for each unit of the microbatch, and a sum in
    float64.
    """
    if config.is_private:
        return 4 * config.arguments.per_device_train_batch_size + 8
    received = 4 if config.train.devices > 1 else 0
    return (8 if config.strategy.proximal_mu > 0 else 4) + received


def optimizer_bytes(tensors: Sequence[int], optimizer: str) -> int:
    """Return the bytes of AdamW's two moments.

    float32: 8 bytes per element. 8-bit (Dettmers et al., 8-bit Optimizers, 2022, section 2): one
    byte per moment and a float32 per block of 256; a paged optimizer counts in full.

    Parameters
    ----------
    tensors
        Number of elements of each trained tensor.
    optimizer : str
        A value of `train.optimizer`.
    """
    if optimizer == "adamw_torch":
        return ADAMW_STATES * 4 * sum(tensors)
    return sum(
        ADAMW_STATES
        * (count + 4 * -(-count // EIGHT_BIT_BLOCK) if count >= EIGHT_BIT_MINIMUM else 4 * count)
        for count in tensors
    )


def precision_of(config: Config) -> Precision:
    """Return the precision of a visit on a GPU with bfloat16, without fused kernels."""
    base_bytes, autocast = 4 if config.model.dtype == "float32" else 2, config.arguments.bf16
    grouped = autocast or base_bytes == 2
    return Precision(config.model.quantization, base_bytes, autocast, grouped)


def share_size(config: Config) -> int:
    """Return the most sequences of full length in one pass: a batch, or a share of it.

    A preference has two, its answers, each after the prompt.
    """
    answers = 2 if config.is_on_pairs else 1
    return answers * -(-config.arguments.per_device_train_batch_size // config.train.devices)


def workload_of(
    config: Config, base: Architecture, targets: Sequence[str], precision: Precision
) -> Workload:
    """Return the workload of a pass in a visit: a batch of full length, or a share of one."""
    padding_free = config.train.batching in ("auto", "padding-free")
    rank, table = Ranks.of(config).resident, tuple(config.lora.ranks_by_pattern.items())
    own_ranks = dict[str, int]()
    if table:
        for name, shape in adapter_shapes(base, targets, rank, rank_pattern=table).items():
            if factor_of(name) == "A":
                module = name.removesuffix(A).rpartition(".")[2]
                own_ranks[module] = max(shape[0], own_ranks.get(module, 0))
    return Workload(
        architecture=base,
        targets=targets,
        rank=rank,
        batch=Batch(
            share_size(config),
            config.train.seq_length,
            padded=base.family.attention_matrix or not padding_free,
        ),
        precision=precision,
        dropout_mask_bytes=1 if config.lora.dropout > 0 else 0,
        own_ranks=own_ranks,
        dora=config.lora.peft_use_dora,
    )


def site_memory(
    config: Config,
    base: Architecture,
    targets: Sequence[str],
    precision: Precision,
    *,
    checkpointing: Checkpointing,
    kept_layers: int = 0,
) -> SiteMemory:
    """Return the peak memory of a visit at the given precision, for batches of full length.

    Parameters
    ----------
    kept_layers : int
        First layers whose 4-bit weights are kept dequantised.
    """
    train = config.train
    asks = Ranks.of(config).strategy
    workload = workload_of(config, base, targets, precision)
    table = tuple(config.lora.ranks_by_pattern.items())
    dora = config.lora.peft_use_dora
    shapes = adapter_shapes(base, targets, workload.rank, rank_pattern=table, dora=dora)
    trained = max(
        (of_factors(shapes, asks.trained(number)) for number in (1, 2)), key=count_parameters
    )
    activations = workload.saved_bytes(checkpointing)
    if workload.checkpointed_layers(checkpointing):
        # An input of the previous step waits for Python's garbage collector.
        activations += workload.batch.positions * base.hidden_size * precision.base_bytes
    loss = workload.loss_bytes(train.logits_chunk_tokens if train.response_only_logits else None)
    return SiteMemory(
        cuda_context=CUDA_CONTEXT_BYTES,
        base=workload.base_bytes,
        adapter=4 * (count_parameters(shapes) + count_parameters(trained)),
        gradient=count_parameters(trained) * gradient_bytes(config),
        optimizer=optimizer_bytes([math.prod(s) for s in trained.values()], train.optimizer),
        activations=activations,
        working=max(
            loss, workload.backward_bytes(checkpointing), workload.dora_bytes(checkpointing)
        ),
        weight_copies=workload.kept_bytes(kept_layers)
        + workload.weight_copies_bytes(checkpointing),
    )


def server_bytes(
    parameters: int,
    *,
    cohort: int,
    keeps_replies: bool,
    measures_product: bool,
    sites_remembered: int = 0,
) -> int:
    """Return the bytes of adapter tensors that the server holds at the peak of a round.

    The current adapter, the next one, and one client update as received and decoded (4 bytes per
    element each); then two float64 sums, or all updates of the round where the aggregation rule or
    the defence keeps them; the factors kept to measure the product error, about one adapter; and
    each site's adapter where only changes are sent. Python and its libraries are not counted.

    Parameters
    ----------
    parameters : int
        Elements of the adapter.
    cohort : int
        Client updates in a round.
    sites_remembered : int
        Sites whose adapter the server remembers.
    """
    adapter = 4 * parameters
    total = 4 * adapter
    total += cohort * adapter if keeps_replies else SUM_BYTES_PER_PARAMETER * parameters
    return total + (adapter if measures_product else 0) + sites_remembered * adapter
