"""GGUF files, written from the tests' random Llama with the library's own writer."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Order the rows of a query or key projection as llama.cpp's rotary embedding wants them."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, 2, rows // heads // 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    file: Path,
    base: Path,
    *,
    architecture: str = "llama",
    template: str | None = TEMPLATE,
    tensors: Mapping[str, np.ndarray[Any, Any] | None] | None = None,
    **values: int,
) -> Path:
    """Write a base as a GGUF file in float32.

    Parameters
    ----------
    tensors
        Name of a tensor → what replaces it; None leaves it out.
    values
        Integers that replace those under `<architecture>.<name>`.
    """
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer, config = AutoTokenizer.from_pretrained(base), model.config
    writer = gguf.GGUFWriter(file, architecture)
    counts = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        **values,
    }
    for key, count in counts.items():
        writer.add_uint32(f"{architecture}.{key}", count)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    vocabulary += [f"<unused{i}>" for i in range(config.vocab_size - len(vocabulary))]
    merges = tokenizer.backend_tokenizer.to_str()

    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if t.startswith("<") and t.endswith(">") else 1 for t in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(merges)["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if template:
        writer.add_chat_template(template)
    for name, weight in {**named_tensors(model), **(tensors or {})}.items():
        if weight is not None:
            writer.add_tensor(name, np.ascontiguousarray(weight, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def named_tensors(model: Any) -> dict[str, np.ndarray[Any, Any] | None]:
    """Return a Llama's weights under the names of a GGUF file."""
    found: dict[str, np.ndarray[Any, Any] | None] = {}
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        weight, path = tensor.float().numpy(), name.removesuffix(".weight")
        if path.startswith("model.layers."):
            layer, _, part = path.removeprefix("model.layers.").partition(".")
            kind = PARTS[part]
            weight = permuted(weight, heads[kind]) if kind in heads else weight
            found[f"blk.{layer}.{kind}.weight"] = weight
        else:
            outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
            found[f"{outer.get(path, 'output')}.weight"] = weight
    return found


def write_wheel(file: Path, gguf: Path) -> Path:
    """Write a wheel that contains a GGUF file and a licence, and depends on what does not exist."""
    name, version = file.name.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    members = {
        f"{name}/model.gguf": gguf.read_bytes(),
        f"{info}/LICENSE": b"Do as you like.\n",
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            "Requires-Dist: no-such-package-anywhere\n"
        ).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    members[f"{info}/RECORD"] = "".join(f"{member},,\n" for member in members).encode()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as wheel:
        for member, content in members.items():
            wheel.writestr(member, content)
    return file
