"""What PyTorch keeps for the backward pass when LoRA factors are trained over a frozen base.

The formulas count the tensors that transformers' layers (5.23) save, with SDPA attention, which
makes no matrix of tokens x tokens, and a padded batch. tests/test_activations.py counts what small
models save and compares.

N is the tokens of a batch, padding included; h, i, V the hidden, intermediate and vocabulary sizes;
q the size of all heads together; e the bytes of a number in the type that products give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grandrounds.architectures import Architecture


@dataclass(frozen=True)
class Precision:
    """The types of a visit's computation."""

    quantization: int
    """Bits of the base's linear weights: 4, 8, or 0 for none."""
    base_bytes: int
    """Bytes of a weight that is not quantised: 2 (bfloat16) or 4 (float32)."""
    autocast: bool
    """Whether products are computed in bfloat16 whatever the weights are."""

    @property
    def product_bytes(self) -> int:
        """Bytes of a number that a linear module gives: e."""
        return 2 if self.autocast else self.base_bytes

    @property
    def adapter_input_bytes(self) -> int:
        """Bytes of a number that goes into a float32 factor."""
        return 2 if self.autocast else 4


@dataclass(frozen=True)
class Batch:
    """One forward and backward pass."""

    examples: int
    """Examples."""
    tokens: int
    """Tokens of each, padding included."""

    @property
    def positions(self) -> int:
        """N: examples x tokens."""
        return self.examples * self.tokens


def layer_bytes(
    architecture: Architecture,
    targets: Sequence[str],
    rank: int,
    batch: Batch,
    precision: Precision,
    *,
    dropout: bool,
    mask_bytes: int = 1,
    first: bool = False,
) -> int:
    """Return the bytes that one layer keeps for the backward pass.

    - Norm: its input in float32 and the inverse root of each token, 4 N (h + 1), two or four times
      a layer; Qwen3 norms queries and keys too.
    - Attention: queries, keys and values repeated to all heads, output: 4 N q e; its log-sum-exp
      4 N heads; the padding mask as a bias, examples x tokens^2 e. Where attention is soft-capped
      (Gemma 2), the matrices of tokens x tokens: its capped scores, and probabilities in float32
      and again in the type of the product.
    - MLP: act(gate) * up keeps gate, act(gate) and up: 3 N i e.
    - A frozen linear module keeps nothing but its weight; LLM.int8 keeps its input.
    - A factor A keeps its input: one for all modules that read it where it needs neither copy nor
      dropout, else one each; B keeps N r numbers. Dropout keeps its mask.

    Parameters
    ----------
    targets
        Names of the adapted modules.
    mask_bytes : int
        Bytes of a number of dropout's mask: 1 on a GPU, 4 on a CPU.
    first : bool
        Whether it is the first layer: nothing before its first factor needs a gradient.
    """
    a, n, e = architecture, batch.positions, precision.product_bytes
    family = a.family
    queries, keys = a.num_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    total = 4 * n * (a.hidden_size + 1) * (family.norms - first)
    if family.head_norms:
        total += 4 * n * (queries + keys + a.num_heads + a.num_key_value_heads)
    if family.attention_matrix:
        matrix = n * batch.tokens * a.num_heads
        total += 3 * n * queries * e + matrix * (e + 4 + (e if e != 4 else 0))
    else:
        total += 4 * n * queries * e + 4 * n * a.num_heads + n * batch.tokens * e
    total += 3 * n * a.intermediate_size * e
    copied = dropout or precision.adapter_input_bytes != e or precision.autocast
    inputs_kept = set()
    for module in a.linears:
        source = _SOURCES.get(module.name, "first norm")
        if precision.quantization == 8 and source != "attention":
            inputs_kept.add((source, module.inputs, e))
        if module.name not in targets:
            continue
        total += n * rank * precision.adapter_input_bytes
        if copied:
            total += n * module.inputs * precision.adapter_input_bytes
        elif source != "attention":  # its output is kept already
            inputs_kept.add((source, module.inputs, e))
        if dropout and not (first and source == "first norm"):
            total += n * module.inputs * mask_bytes
    return total + sum(n * width * size for _, width, size in inputs_kept)


_SOURCES = {
    "o_proj": "attention",
    "gate_proj": "second norm",
    "up_proj": "second norm",
    "gate_up_proj": "second norm",
    "down_proj": "product",
}
"""Linear module → where its input comes from; all others read the first norm."""


def loss_bytes(
    architecture: Architecture,
    batch: Batch,
    precision: Precision,
    response_only_share: float | None = None,
) -> int:
    """Return the bytes of the logits and of their loss at the peak.

    The head gives N V numbers; the answer's are copied to float32, whose log-softmax is kept:
    N V (e + 8) if every token is an answer's, N V e more where logits are soft-capped. In the
    backward pass gradients of the same sizes take their place.

    Parameters
    ----------
    response_only_share : float or None
        Share of the tokens that are answers, where the head is applied to those only; None: the
        head is applied to all.
    """
    share = 1.0 if response_only_share is None else response_only_share
    full = architecture.vocabulary * batch.positions
    capped = precision.product_bytes if architecture.family.soft_capped_logits else 0
    return round(share * full * (precision.product_bytes + capped + 8))


def saved_bytes(
    architecture: Architecture,
    targets: Sequence[str],
    rank: int,
    batch: Batch,
    precision: Precision,
    *,
    checkpointing: bool,
    dropout: bool,
    mask_bytes: int = 1,
) -> int:
    """Return the bytes of all layers, the last norm included, between forward and backward pass.

    With checkpointing each layer keeps its input alone, N h in the type of the residual stream
    (Chen et al., Training deep nets with sublinear memory cost, 2016, section 4.1, one segment a
    layer).
    """
    last_norm = 4 * batch.positions * (architecture.hidden_size + 1)
    if checkpointing:
        inputs = batch.positions * architecture.hidden_size * precision.base_bytes
        return architecture.num_layers * inputs + last_norm
    first, others = (
        layer_bytes(
            architecture,
            targets,
            rank,
            batch,
            precision,
            dropout=dropout,
            mask_bytes=mask_bytes,
            first=is_first,
        )
        for is_first in (True, False)
    )
    return first + (architecture.num_layers - 1) * others + last_norm
