"""What PyTorch keeps for the backward pass when LoRA factors are trained over a frozen base.

The formulas count the tensors that transformers' layers (5.24) save, with SDPA attention, which
makes no matrix of tokens x tokens, and a batch that is padded or free of padding.
tests/test_activations.py counts what small models save and compares.

N is the tokens of a batch, padding included; h, i, V the hidden, intermediate and vocabulary sizes;
q the size of all heads together; e the bytes of a number in the type that products give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grandrounds.model.architectures import Architecture


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
        """Bytes of a number that a linear module gives: e.

        Those of bitsandbytes give the type that they get, which is the residual stream's.
        """
        return 2 if self.autocast and not self.quantization else self.base_bytes

    @property
    def logit_bytes(self) -> int:
        """Bytes of a number that the head gives, which is not quantised."""
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
    padded: bool = True
    """Whether there is a mask of padding; else sequences lie one after another."""

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
      4 N heads; the mask of a padded batch as a bias, examples x tokens^2 e. Without padding the
      outputs of the sequences are joined, which is one more matrix for an adapted module that
      reads it. Where attention is soft-capped (Gemma 2), the matrices of tokens x tokens: its
      capped scores, and probabilities in float32 and again in the type of the product.
    - MLP: act(gate) * up keeps gate, act(gate) and up: 3 N i e.
    - A frozen linear module keeps nothing but its weight; LLM.int8 keeps its input
      (`int8_input_bytes`).
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
        total += 4 * n * queries * e + 4 * n * a.num_heads
        total += n * batch.tokens * e if batch.padded else 0
    total += 3 * n * a.intermediate_size * e
    copied = dropout or precision.adapter_input_bytes != e or precision.autocast
    inputs_kept = set()
    for module in a.linears:
        source = _SOURCES.get(module.name, "first norm")
        if precision.quantization == 8 and (source != "attention" or not batch.padded):
            inputs_kept.add((source, module.inputs, e))
        if module.name not in targets:
            continue
        total += n * rank * precision.adapter_input_bytes
        if copied:
            total += n * module.inputs * precision.adapter_input_bytes
        elif source != "attention" or not batch.padded:  # attention keeps its output already
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


def int8_input_bytes(architecture: Architecture, batch: Batch, precision: Precision) -> int:
    """Return the bytes of the inputs that a layer's LLM.int8 modules keep; 0 for others.

    bitsandbytes (0.50) keeps them outside of what autograd saves, so that checkpointing, which
    works on that, does not free them: N (2 h + q + i) e for Llama.
    """
    if precision.quantization != 8:
        return 0
    inputs = {(_SOURCES.get(m.name, "first norm"), m.inputs) for m in architecture.linears}
    return sum(batch.positions * width * precision.product_bytes for _, width in inputs)


def loss_bytes(
    architecture: Architecture, batch: Batch, precision: Precision, chunk_tokens: int | None
) -> int:
    """Return the bytes of the logits and of their loss at the peak, every token an answer's.

    The head on every token gives N V numbers; they are copied to float32, and their log-softmax is
    kept: N V (e + 8), or N V e more where logits are soft-capped. In the backward pass gradients of
    the same sizes take their place.

    `loss.head_nll_sum` holds the logits of c tokens only, c V e, and in float32, c V 4 (which is
    the same matrix if e is 4); a soft cap's slope takes c V 4 more. Beside them the hidden states
    of the answers, their gradient, and the chunk's: (2 N + c) h e.

    Parameters
    ----------
    chunk_tokens : int or None
        Tokens whose logits are held at a time, 0 for all; None: the head is applied to every token.
    """
    n, v, e = batch.positions, architecture.vocabulary, precision.logit_bytes
    capped = architecture.family.soft_capped_logits
    if chunk_tokens is None:
        return n * v * (e + 8 + (e if capped else 0))
    held = min(n, chunk_tokens or n)
    logits = held * v * ((4 if e == 4 else e + 4) + (4 if capped else 0))
    return logits + (2 * n + held) * architecture.hidden_size * e


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
    layer), and LLM.int8 its modules' inputs all the same.
    """
    last_norm = 4 * batch.positions * (architecture.hidden_size + 1)
    if checkpointing:
        inputs = batch.positions * architecture.hidden_size * precision.base_bytes
        inputs += int8_input_bytes(architecture, batch, precision)
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
