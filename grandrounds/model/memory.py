"""How much memory a site and the server need, from shapes alone.

Every term is a formula with its source; together they estimate the peak of PyTorch's allocations.
What a GPU's allocator wastes is not in here, and no total has been measured on a GPU yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from grandrounds.config.keys import Config
from grandrounds.model.activations import Batch, Precision, layer_bytes, loss_bytes, saved_bytes
from grandrounds.model.architectures import Architecture
from grandrounds.wire.adapter import Ranks, Shapes, at_rank, count_parameters, of_factors
from grandrounds.wire.traffic import MAGNITUDE

MIB = 2**20

CUDA_CONTEXT_BYTES = 512 * MIB
"""Allowance for the CUDA context and the libraries' workspaces: a round figure, not measured. It
differs by GPU and driver."""

NF4_BYTES_PER_WEIGHT = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""4 bits, a scale of 8 bits for 64 weights, and a float32 for 256 scales: QLoRA (Dettmers et al.,
2023), section 3, double quantisation: 4.127 bits."""

ADAMW_STATES = 2
"""First and second moment."""

EIGHT_BIT_BLOCK = 256
"""Numbers that share a float32 scale in bitsandbytes' 8-bit optimizer states (0.49)."""

EIGHT_BIT_MINIMUM = 4096
"""Tensors of fewer numbers keep float32 states (`min_8bit_size` of bitsandbytes)."""

SUM_BYTES_PER_PARAMETER = 16
"""The running mean of `aggregation.weighted_mean`: two float64 sums."""


# --- What does not depend on the batch ------------------------------------------------------------


def base_bytes(architecture: Architecture, precision: Precision) -> int:
    """Return the bytes of the frozen base.

    Linear weights take 4.127 bits (NF4), 8 bits and a float32 scale for each output (LLM.int8,
    Dettmers et al., 2022, section 2.1), or the base's type. Embedding, head, norms and biases are
    never quantised.
    """
    linear = architecture.linear_parameters
    rest = architecture.parameters - linear
    if precision.quantization == 4:
        stored = round(linear * NF4_BYTES_PER_WEIGHT)
    elif precision.quantization == 8:
        stored = linear + 4 * architecture.num_layers * sum(m.outputs for m in architecture.linears)
    else:
        stored = linear * precision.base_bytes
    return stored + rest * precision.base_bytes


def optimizer_bytes(tensors: Sequence[int], optimizer: str) -> int:
    """Return the bytes of AdamW's two moments.

    float32: 8 bytes for each number. 8-bit (Dettmers et al., 8-bit Optimizers, 2022, section 2):
    one byte a moment, and a float32 for each block of 256; a paged one counts in full.

    Parameters
    ----------
    tensors
        Numbers of each trained tensor.
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


def weight_copies_bytes(
    architecture: Architecture, precision: Precision, checkpointing: bool
) -> int:
    """Return the bytes of bfloat16 copies of float32 weights.

    Autocast makes a copy of a frozen weight for each product, and the backward pass needs it: all
    of them, or with checkpointing one layer's and the head's.
    """
    if not precision.autocast or precision.base_bytes == 2:
        return 0
    linear = 0 if precision.quantization else architecture.linear_parameters
    layers = architecture.num_layers if checkpointing else 1
    return 2 * (linear // layers + architecture.vocabulary * architecture.hidden_size)


def dequantized_bytes(architecture: Architecture, precision: Precision) -> int:
    """Return the bytes of the largest linear weight in the type of the product.

    A quantised weight is unpacked for its product and dropped: one module at a time.
    """
    if not precision.quantization:
        return 0
    return max(m.inputs * m.outputs for m in architecture.linears) * precision.base_bytes


# --- A site, and the server -----------------------------------------------------------------------


@dataclass(frozen=True)
class SiteMemory:
    """Bytes on a site's GPU at the peak of a visit."""

    cuda_context: int
    """`CUDA_CONTEXT_BYTES`."""
    base: int
    """The frozen base."""
    adapter: int
    """The adapter in float32, twice: as it is trained and as it was received; DoRA not counted."""
    gradient: int
    """The adapter's gradient, and FedProx's distance where there is one."""
    optimizer: int
    """AdamW's moments."""
    activations: int
    """Kept between forward and backward pass."""
    working: int
    """The larger of the loss, and of the gradients in one layer: 3 N i e in the MLP, 2 N h e along
    the residual stream; with checkpointing, of these and the layer that is computed again."""
    weight_copies: int
    """The largest linear weight, unpacked for its product; bfloat16 copies of float32 weights."""

    @property
    def total(self) -> int:
        """All of it: the estimate of the peak."""
        return sum(asdict(self).values())


def _site_memory(
    architecture: Architecture,
    targets: Sequence[str],
    tensors: Sequence[int],
    trained: Sequence[int],
    rank: int,
    batch: Batch,
    precision: Precision,
    *,
    optimizer: str,
    checkpointing: bool,
    dropout: bool,
    proximal: bool,
    chunk_tokens: int | None = None,
) -> SiteMemory:
    """Return the peak memory of a visit, for batches of full length.

    Parameters
    ----------
    tensors, trained
        Numbers of each tensor of the adapter, and of those that are trained.
    proximal : bool
        Whether there is a proximal term, whose gradient is formed apart.
    chunk_tokens : int or None
        As in `loss_bytes`.
    """
    kept = saved_bytes(
        architecture,
        targets,
        rank,
        batch,
        precision,
        checkpointing=checkpointing,
        dropout=dropout,
    )
    n, h, e = batch.positions, architecture.hidden_size, precision.product_bytes
    # The input of an adapted down_proj is let go before the gradients of its factors are there.
    of_mlp = 2 if "down_proj" in targets else 3
    backward = n * (of_mlp * architecture.intermediate_size + 2 * h) * e
    if checkpointing:
        # An input of the step before waits for Python's garbage collector.
        kept += n * h * precision.base_bytes
        backward += layer_bytes(architecture, targets, rank, batch, precision, dropout=dropout)
        backward -= 4 * n * (h + 1)  # the last norm's is let go before
        backward -= 4 * n * h if precision.base_bytes == 4 else 0  # a layer's input is its norm's
    return SiteMemory(
        cuda_context=CUDA_CONTEXT_BYTES,
        base=base_bytes(architecture, precision),
        adapter=4 * (sum(tensors) + sum(trained)),
        gradient=4 * sum(trained) * (2 if proximal else 1),
        optimizer=optimizer_bytes(trained, optimizer),
        activations=kept,
        working=max(loss_bytes(architecture, batch, precision, chunk_tokens), backward),
        weight_copies=dequantized_bytes(architecture, precision)
        + weight_copies_bytes(architecture, precision, checkpointing),
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

    The adapter, the next one, a reply as it arrives and decoded (4 bytes a number each); then two
    float64 sums, or all replies of the round where the rule or the defence keeps them; the factors
    kept to measure the product error, about one adapter; what each site holds, where only changes
    since then are sent. Python and its libraries are not counted.

    Parameters
    ----------
    parameters : int
        Numbers of the adapter.
    cohort : int
        Replies of a round.
    sites_remembered : int
        Sites whose adapter the server remembers.
    """
    adapter = 4 * parameters
    total = 4 * adapter
    total += cohort * adapter if keeps_replies else SUM_BYTES_PER_PARAMETER * parameters
    return total + (adapter if measures_product else 0) + sites_remembered * adapter


def precision_of(config: Config) -> Precision:
    """Return the types of a visit on a GPU that has bfloat16."""
    base_bytes = 4 if config.model.dtype == "float32" else 2
    return Precision(config.model.quantization, base_bytes, config.arguments.bf16)


def site_memory(
    config: Config,
    base: Architecture,
    targets: list[str],
    shapes: Shapes,
    precision: Precision,
    *,
    checkpointing: bool,
) -> SiteMemory:
    """Return a site's memory in some precision, for batches of full length."""
    ranks = Ranks.of(config)
    factors = {n: s for n, s in shapes.items() if not n.endswith(MAGNITUDE)}
    placed = at_rank(factors, ranks.resident)
    trained = max(
        (of_factors(placed, ranks.strategy.trained(number)) for number in (1, 2)),
        key=count_parameters,
    )
    return _site_memory(
        base,
        targets,
        [math.prod(s) for s in placed.values()],
        [math.prod(s) for s in trained.values()],
        ranks.resident,
        Batch(
            config.arguments.per_device_train_batch_size,
            config.train.seq_length,
            padded=base.family.attention_matrix
            or config.train.batching not in ("auto", "padding-free"),
        ),
        precision,
        optimizer=config.train.optimizer,
        checkpointing=checkpointing,
        dropout=config.lora.dropout > 0,
        proximal=config.strategy.proximal_mu > 0,
        chunk_tokens=config.train.logits_chunk_tokens
        if config.train.response_only_logits
        else None,
    )
