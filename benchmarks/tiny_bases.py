"""Tiny random bases of many architectures, each with a tokenizer and a chat template, in a folder.

Built from transformers' configurations: nothing is downloaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY = 300
"""Embeddings: 256 bytes, the special tokens, and some that no text uses."""

SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: Mapping[str, Any] = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "moe_k": 2,
}
LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LINEAR_ATTENTION: Mapping[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
STATE_SPACE: Mapping[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOKENS = ("<pad>", "<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
"""Special tokens, from ID 0."""


@dataclass(frozen=True)
class Tiny:
    """A tiny base of one architecture."""

    model_type: str
    """The key of transformers' `CONFIG_MAPPING`."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What its configuration needs beside the sizes."""
    part: Mapping[str, Any] | None = None
    """For a composite: the configuration of its vision tower."""
    query_norm: float = 1.0
    """Weights of the norm of queries; Gemma 4 learns them instead of scaling the scores."""
    in_float64: bool = True
    """Whether transformers can compute it in float64; else the plain model computes in float32."""
    is_random: bool = False
    """Whether the model itself draws in training mode: it is then compared in evaluation mode."""


DENSE = (
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi"),
    *("phi3", "olmo", "olmo2", "olmo3", "granite", "stablelm", "cohere", "cohere2", "glm", "glm4"),
    *("smollm3", "helium", "starcoder2", "nemotron", "persimmon", "arcee", "exaone4", "ernie4_5"),
    *("seed_oss", "hunyuan_v1_dense", "apertus", "vaultgemma", "gpt_neox", "gpt_bigcode", "bloom"),
    *("opt", "biogpt", "lfm2", "nanochat", "diffllama"),
)
"""Architectures that need no more than the sizes."""

BASES: dict[str, Tiny] = {name: Tiny(name) for name in DENSE} | {
    "gpt2": Tiny("gpt2"),
    "xglm": Tiny("xglm", in_float64=False),
    "gpt_neo": Tiny(
        "gpt_neo",
        {"num_layers": 2, "attention_types": [[["local", "global"], 1]], "window_size": 8},
    ),
    "gptj": Tiny("gptj", {"rotary_dim": 4}),
    "codegen": Tiny("codegen", {"rotary_dim": 4}),
    "mpt": Tiny("mpt"),
    "falcon": Tiny("falcon", {"alibi": False}),
    "falcon with ALiBi": Tiny("falcon", {"alibi": True}),
    "minicpm3": Tiny("minicpm3", {**LATENT, "q_lora_rank": 16}),
    "gemma4_text": Tiny(
        "gemma4_text",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "global_head_dim": 8,
            "num_kv_shared_layers": 0,
        },
        query_norm=8**-0.5,
    ),
    "qwen3_5_text": Tiny("qwen3_5_text", LINEAR_ATTENTION),
    "deepseek_v2": Tiny("deepseek_v2", {**EXPERTS, **LATENT, "topk_method": "greedy"}),
    "deepseek_v3": Tiny("deepseek_v3", {**EXPERTS, **LATENT}),
    "dots1": Tiny("dots1", EXPERTS),
    "ernie4_5_moe": Tiny("ernie4_5_moe", {**EXPERTS, "moe_num_experts": 4}),
    "flex_olmo": Tiny("flex_olmo", EXPERTS),
    "glm4_moe": Tiny("glm4_moe", EXPERTS),
    "gpt_oss": Tiny("gpt_oss", EXPERTS),
    "granitemoe": Tiny("granitemoe", EXPERTS),
    "hunyuan_v1_moe": Tiny("hunyuan_v1_moe", {**EXPERTS, "moe_topk": [2, 2]}),
    "jetmoe": Tiny("jetmoe", {**EXPERTS, "kv_channels": 8, "num_key_value_heads": 2}),
    "lfm2_moe": Tiny(
        "lfm2_moe",
        {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "llama4_text": Tiny(
        "llama4_text", {**EXPERTS, "intermediate_size_mlp": 48, "num_experts_per_tok": 1}
    ),
    "minimax": Tiny("minimax", EXPERTS),
    "mixtral": Tiny("mixtral", EXPERTS),
    "olmoe": Tiny("olmoe", EXPERTS),
    "phimoe": Tiny("phimoe", EXPERTS, is_random=True),
    "qwen2_moe": Tiny("qwen2_moe", EXPERTS),
    "qwen3_moe": Tiny("qwen3_moe", EXPERTS),
    "qwen3_next": Tiny("qwen3_next", {**EXPERTS, **LINEAR_ATTENTION}),
    "bamba": Tiny("bamba", {**STATE_SPACE, "attn_layer_indices": [1]}),
    "falcon_h1": Tiny("falcon_h1", STATE_SPACE),
    "jamba": Tiny(
        "jamba",
        {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
         "use_mamba_kernels": False},
    ),
    "mamba": Tiny("mamba", {"state_size": 8}),
    "mamba2": Tiny("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}),
    "rwkv": Tiny("rwkv"),
    "gemma3 (MedGemma)": Tiny(
        "gemma3",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "mm_tokens_per_image": 4,
            "boi_token_index": 290,
            "eoi_token_index": 291,
            "image_token_index": 292,
        },
        part={"model_type": "siglip_vision_model", **VISION},
    ),
    "gemma4": Tiny(
        "gemma4",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "global_head_dim": 8,
            "num_kv_shared_layers": 0,
            "image_token_id": 290,
            "boi_token_id": 291,
            "eoi_token_id": 292,
            "audio_token_id": 293,
            "video_token_id": 294,
            "audio_config": None,
        },
        part={**VISION, "num_key_value_heads": 4, "head_dim": 8, "global_head_dim": 8},
        query_norm=8**-0.5,
    ),
    "qwen3_5": Tiny(
        "qwen3_5",
        {
            **LINEAR_ATTENTION,
            "image_token_id": 290,
            "video_token_id": 291,
            "vision_start_token_id": 292,
            "vision_end_token_id": 293,
        },
        part={"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
              "out_hidden_size": 32, "patch_size": 14, "num_position_embeddings": 16},
    ),
    "llama4": Tiny(
        "llama4",
        {
            **EXPERTS,
            "intermediate_size_mlp": 48,
            "num_experts_per_tok": 1,
            "boi_token_index": 290,
            "eoi_token_index": 291,
            "image_token_index": 292,
        },
        part={**VISION, "vision_output_dim": 32, "projector_input_dim": 32,
              "projector_output_dim": 32, "pixel_shuffle_ratio": 0.5},
    ),
}  # fmt: skip
"""Name of a row → its base."""


def config_of(tiny: Tiny) -> Any:
    """Return transformers' configuration of a tiny base, without dropout."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[tiny.model_type]
    if tiny.part is None:
        return kind(**_known(kind, {**SIZES, **tiny.changes}))
    text_kind = kind.sub_configs["text_config"]
    known = set(_known(text_kind, tiny.changes))
    text = {**_known(text_kind, {**SIZES, **tiny.changes}), "model_type": text_kind.model_type}
    rest = {key: value for key, value in tiny.changes.items() if key not in known}
    return kind(text_config=text, vision_config=dict(tiny.part), **rest)


def _known(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a configuration class has, and no dropout."""
    names = set(getattr(kind, "__dataclass_fields__", {}))
    names |= set(inspect.signature(kind.__init__).parameters) | set(kind.attribute_map)
    undropped = {name: 0.0 for name in names if "drop" in name}
    return {**undropped, **{key: value for key, value in values.items() if key in names}}


def make_base(tiny: Tiny, folder: Path) -> None:
    """Save a base with random weights, a tokenizer of bytes and a chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    is_composite = tiny.part is not None
    kind = AutoModelForImageTextToText if is_composite else AutoModelForCausalLM
    model = kind.from_config(config_of(tiny))
    randomise(model, tiny.query_norm)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def randomise(model: Any, query_norm: float = 1.0) -> None:
    """Draw weights at which the logits depend on every module: unit variance through a product."""
    import torch

    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            if name == "weight" and isinstance(module, torch.nn.Embedding):
                torch.nn.init.normal_(tensor, std=0.5)
            elif tensor.dim() == 2 and isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(tensor, std=tensor.shape[1] ** -0.5)
            elif tensor.dim() == 2 and type(module).__name__ == "Conv1D":
                torch.nn.init.normal_(tensor, std=tensor.shape[0] ** -0.5)
            elif tensor.dim() == 3 and "expert" in type(module).__name__.lower():
                torch.nn.init.normal_(tensor, std=max(tensor.shape[1:]) ** -0.5)
            elif name == "weight" and "Router" in type(module).__name__:
                torch.nn.init.normal_(tensor, std=1.0)
            elif path.endswith(".q_norm"):
                torch.nn.init.constant_(tensor, query_norm)


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token per byte, so that a text has one reading."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    )
