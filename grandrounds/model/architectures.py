"""Shapes of base models, read from config.json: no weights, no torch.

`architectures.json` holds the configurations of well-known bases by hub name; any other base of the
same families is read from a local folder or config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from grandrounds.config.bases import folder_of
from grandrounds.config.values import words_of
from grandrounds.data.formulary import FORMULARY, base_path
from grandrounds.errors import ModelError, nearest
from grandrounds.model.patterns import Table, number_at
from grandrounds.wire.adapter import Shapes

SEPARATE = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""Linear modules of a layer with separate projections, in the model's order."""

FUSED = ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
"""Linear modules of a layer with fused query-key-value and gate-up projections."""

QUERY_AND_VALUE = ("q_proj", "v_proj")

HEADS_AND_EMBEDDINGS = frozenset(
    (
        *("lm_head", "embed_out", "output", "embed_tokens", "embed_in", "wte", "wpe"),
        *("word_embeddings", "tok_embeddings"),
    )
)
"""Names of output heads and embeddings in transformers, which an adapter is not put on."""


@dataclass(frozen=True)
class Family:
    """What all models of one `model_type` share, as transformers builds them."""

    modules: tuple[str, ...] = SEPARATE
    """Paths of a layer's linear modules, in the model's order."""
    auto: tuple[str, ...] | None = QUERY_AND_VALUE
    """Default target modules of PEFT (0.19 to 0.21); None: it has none."""
    norms: int = 2
    """Norms per layer, over the hidden size."""
    head_norms: bool = False
    """Whether queries and keys are normalised, over the head size."""
    attention_matrix: bool = False
    """Whether attention is soft-capped and therefore materialises a matrix of tokens x tokens."""
    soft_capped_logits: bool = False
    """Whether the logits are soft-capped."""
    biased: tuple[str, ...] = ()
    """Linear modules that always have a bias."""
    bias_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Key of config.json → modules that have a bias if it is true."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that transformers assumes for keys missing from config.json."""


_QKV = ("q_proj", "k_proj", "v_proj")
_ATTENTION = (*_QKV, "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")

FAMILIES: dict[str, Family] = {
    "llama": Family(bias_keys={"attention_bias": _ATTENTION, "mlp_bias": _MLP}),
    "mistral": Family(defaults={"num_key_value_heads": 8}),
    "qwen2": Family(biased=_QKV, defaults={"num_key_value_heads": 32}),
    "qwen3": Family(
        head_norms=True,
        bias_keys={"attention_bias": _ATTENTION},
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
    "gemma2": Family(
        norms=4,
        attention_matrix=True,
        soft_capped_logits=True,
        bias_keys={"attention_bias": _ATTENTION},
        defaults={"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
    ),
    "phi3": Family(modules=FUSED, auto=None),
    "internlm3": Family(
        auto=None,
        bias_keys={
            "attention_bias": _ATTENTION,
            "mlp_bias": _MLP,
            "qkv_bias": _QKV,
            "bias": ("o_proj", *_MLP),
        },
        defaults={"num_key_value_heads": 2, "head_dim": 128},
    ),
}
"""`model_type` of config.json → family."""


@dataclass(frozen=True)
class Linear:
    """One linear module of a layer."""

    path: str
    """Path within the layer, such as `self_attn.q_proj`."""
    inputs: int
    outputs: int
    bias: bool

    @property
    def name(self) -> str:
        """Last part of the path, as used in target modules."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Architecture:
    """The shapes of a base model."""

    name: str
    """The name it was looked up by: of the hub, of a base on this machine, or a folder."""
    known_as: str
    """The entry of architectures.json, or the config.json, that the shapes come from."""
    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    """Attention heads."""
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    """Width of the MLP."""
    vocabulary: int
    """Vocabulary size."""
    tied_head: bool
    """Whether the output head shares the embedding's weights."""
    linears: tuple[Linear, ...]
    """Linear modules of one layer in the model's order, without the head."""

    @property
    def family(self) -> Family:
        """The family of its `model_type`."""
        return FAMILIES[self.model_type]

    @property
    def linear_parameters(self) -> int:
        """Parameters of all linear weights, without biases and the head."""
        return self.num_layers * sum(m.inputs * m.outputs for m in self.linears)

    @property
    def parameters(self) -> int:
        """Parameters of the whole base; a tied head counts once."""
        embeddings = self.vocabulary * self.hidden_size * (1 if self.tied_head else 2)
        of_layer = self.family.norms * self.hidden_size
        of_layer += 2 * self.head_dim if self.family.head_norms else 0
        of_layer += sum(m.outputs for m in self.linears if m.bias)
        norms_and_biases = self.num_layers * of_layer + self.hidden_size
        return embeddings + self.linear_parameters + norms_and_biases


# --- Look-up -------------------------------------------------------------------------------------


@cache
def _library() -> dict[str, dict[str, Any]]:
    text = Path(__file__).with_name("architectures.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def known_names() -> list[str]:
    """Return the names in architectures.json, aliases after each base's own name."""
    return [name for key, entry in _library().items() for name in (key, *entry["also"])]


def find_architecture(name: str) -> Architecture:
    """Return the shapes of a base by its name, a local folder, config.json or `formulary`.

    Hub names are looked up in architectures.json, ignoring case; nothing is downloaded.

    Raises
    ------
    ModelError
        If the name matches none of these, or the config.json cannot be used.
    """
    if name == FORMULARY:
        return _from_file(name, base_path() / "config.json")
    if folder := folder_of(name):
        return _from_file(name, folder / "config.json")
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_file(name, path / "config.json")
    if path.is_file():
        return _from_file(name, path)
    for key, entry in _library().items():
        if name.lower() in (known.lower() for known in (key, *entry["also"])):
            return from_config(name, entry, key)
    raise ModelError(
        f"The shapes of {name!r} are unknown without its configuration."
        f"{nearest(name, known_names())} Give a local folder with its config.json, or the base "
        f"that it was tuned from as --architecture, one of: {', '.join(_library())}."
    )


def _from_file(name: str, path: Path) -> Architecture:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object; a model's config.json is needed.")
    return from_config(name, content, str(path))


def from_config(name: str, config: Mapping[str, Any], source: str) -> Architecture:
    """Return the shapes that a config.json describes.

    Parameters
    ----------
    name : str
        Name of the base.
    config
        Content of config.json.
    source : str
        Its origin, quoted in errors.

    Raises
    ------
    ModelError
        If the family is unknown, or a size is missing or not a positive integer.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(
            f"{source}: model_type = {model_type!r} is unsupported; the shapes are known for "
            f"{', '.join(FAMILIES)}."
        )
    family = FAMILIES[model_type]
    given = {**family.defaults, **{k: v for k, v in config.items() if v is not None}}
    hidden = _size(given, "hidden_size", source)
    heads = _size(given, "num_attention_heads", source)
    key_value_heads = _size({"num_key_value_heads": heads, **given}, "num_key_value_heads", source)
    head_dim = _size({"head_dim": hidden // heads, **given}, "head_dim", source)
    inner = _size(given, "intermediate_size", source)
    queries, keys = heads * head_dim, key_value_heads * head_dim
    shapes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "qkv_proj": (hidden, queries + 2 * keys),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "gate_up_proj": (hidden, 2 * inner),
        "down_proj": (inner, hidden),
    }
    biased = set(family.biased)
    biased.update(m for key, names in family.bias_keys.items() if given.get(key) for m in names)
    last = {path: path.rpartition(".")[2] for path in family.modules}
    return Architecture(
        name=name,
        known_as=source,
        model_type=model_type,
        hidden_size=hidden,
        num_layers=_size(given, "num_hidden_layers", source),
        num_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        vocabulary=_size(given, "vocab_size", source),
        tied_head=bool(given.get("tie_word_embeddings", False)),
        linears=tuple(Linear(p, *shapes[m], m in biased) for p, m in last.items()),
    )


def _size(config: Mapping[str, Any], key: str, source: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ModelError(
            f"{source}: {key} = {value!r} must be an integer of at least 1. "
            "Is this the config.json of a text model?"
        )
    return value


# --- The adapter on it ----------------------------------------------------------------------------


def target_modules(architecture: Architecture, wanted: str) -> list[str]:
    """Return the names of the modules that a run adapts.

    Parameters
    ----------
    wanted : str
        `model.lora.target-modules`: comma-separated names, `all-linear` or `auto`.

    Raises
    ------
    ModelError
        If a name matches no linear module, or PEFT has no default for the family.
    """
    linear = sorted(m.name for m in architecture.linears)
    return choose_targets(
        wanted, linear, architecture.name, architecture.model_type, architecture.family.auto
    )


def choose_targets(
    wanted: str, linear: list[str], name: str, model_type: str, auto: Sequence[str] | None
) -> list[str]:
    """Return the modules that `auto`, `all-linear` or comma-separated names stand for.

    A name that ends in `?` is passed over if it matches nothing, as in PEFT, unless all are.

    Parameters
    ----------
    linear
        Linear modules of the base `name`, without the head.
    auto
        PEFT's default for the base's `model_type`; None: it has none.

    Raises
    ------
    ModelError
        If a name matches none of them, no name is given, or there is no default.
    """
    if wanted == "all-linear" or (wanted == "auto" and name == FORMULARY):
        return linear
    if wanted == "auto" and auto is None:
        raise ModelError(
            f'model.lora.target-modules = "auto": PEFT has no default for {model_type!r}. '
            f"Name some of its linear modules: {', '.join(linear)}."
        )
    targets = []
    for word in auto if wanted == "auto" and auto else words_of(wanted):
        target = word.removesuffix("?")
        if target in linear:
            targets.append(target)
        elif target in HEADS_AND_EMBEDDINGS:
            raise ModelError(
                f"model.lora.target-modules names {target!r}, an output head or an embedding; "
                f"these are not adapted here. Leave it out. Linear modules of {name!r}: "
                f"{', '.join(linear)}."
            )
        elif target == word:
            raise ModelError(
                f"model.lora.target-modules names {target!r}, which matches no linear module of "
                f"{name!r}.{nearest(target, linear)} Its linear modules: {', '.join(linear)}."
            )
    if not targets:
        raise ModelError(
            f"model.lora.target-modules = {wanted.replace('?', '')!r} names no module of {name!r}. "
            f"Its linear modules: {', '.join(linear)}."
        )
    return targets


def unmatched(wanted: str, targets: Sequence[str]) -> list[str]:
    """Return the names with a `?` in `model.lora.target-modules` that are none of the targets."""
    names = [word.removesuffix("?") for word in words_of(wanted) if word.endswith("?")]
    return [name for name in names if name not in targets]


def adapter_shapes(
    architecture: Architecture,
    targets: Sequence[str],
    rank: int,
    *,
    rank_pattern: Table[int] = (),
    dora: bool = False,
) -> Shapes:
    """Return the adapter's tensor shapes by the names under which PEFT saves them, in its order.

    Parameters
    ----------
    rank_pattern
        Ranks of the modules that an expression matches.
    dora : bool
        Whether each module also has DoRA's magnitudes, one per output (Liu et al., DoRA, 2024,
        equation 5).
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(architecture.num_layers):
        for module in architecture.linears:
            if module.name not in targets:
                continue
            path = f"model.layers.{layer}.{module.path}"
            stem, own = f"base_model.model.{path}", number_at(rank_pattern, path, rank)
            shapes[f"{stem}.lora_A.weight"] = (own, module.inputs)
            shapes[f"{stem}.lora_B.weight"] = (module.outputs, own)
            if dora:
                shapes[f"{stem}.lora_magnitude_vector"] = (module.outputs,)
    return shapes
