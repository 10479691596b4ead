"""One base per process, adapters swapped in place, names and shapes known without weights."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grandrounds.config.recipes import resolve
from grandrounds.errors import ModelError
from grandrounds.model import headroom, machine
from grandrounds.model.base import (
    BaseSpec,
    base_config,
    base_fingerprint,
    base_loads,
    bits_of,
    device_and_dtype,
    load_base,
    load_tokenizer,
    quantization_config,
)
from grandrounds.model.lora import LoraSpec, adapter_layout, peft_config
from grandrounds.model.resident import Resident, adapter_change, resident_model, set_adapter
from grandrounds.model.targets import Targets
from grandrounds.server.directory import RunDirectory
from grandrounds.wire.adapter import initial_adapter

LORA = LoraSpec(4, 8.0, "q_proj,v_proj", 0.0)
TOKENS = torch.tensor([[5, 77, 130, 201, 9, 44]])


def base_of(path: Path, **changes: Any) -> BaseSpec:
    options = {"quantization": 0, "dtype": "float32"}
    return BaseSpec(str(path), **{**options, **changes})


@pytest.fixture
def resident(tiny_base: Path) -> Resident:
    """The tiny base with an adapter that changes nothing."""
    made = resident_model(base_of(tiny_base), LORA)
    set_adapter(made, initial_adapter(shapes_of(made), np.random.default_rng(0)))
    made.model.eval()
    return made


def shapes_of(resident: Resident) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in resident.parameters.items()}


def random_adapter(resident: Resident, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return {
        name: (0.3 * rng.normal(size=shape)).astype(np.float32)
        for name, shape in shapes_of(resident).items()
    }


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return out


# --- The base -------------------------------------------------------------------------------------


def test_the_base_is_loaded_once_over_many_calls_and_adapters(tiny_base: Path) -> None:
    resident_model(base_of(tiny_base), LORA)
    before = base_loads()
    first = resident_model(base_of(tiny_base), LORA)
    for lora in (LORA, LoraSpec(2, 4.0, "all-linear", 0.1), LoraSpec(4, 8.0, "o_proj", 0.0), LORA):
        resident = resident_model(base_of(tiny_base), lora)
        assert resident_model(base_of(tiny_base), lora) is resident
    assert base_loads() == before
    assert resident.lora_spec == first.lora_spec


def test_another_base_is_loaded(tiny_base: Path) -> None:
    resident_model(base_of(tiny_base), LORA)
    before = base_loads()
    resident_model(base_of(tiny_base, dtype="bfloat16"), LORA)
    assert base_loads() == before + 1
    resident_model(base_of(tiny_base), LORA)
    assert base_loads() == before + 2


def test_a_change_of_adapter_leaves_no_trace_of_the_one_before(tiny_base: Path) -> None:
    spec = base_of(tiny_base)
    plain = logits(AutoModelForCausalLM.from_pretrained(tiny_base).eval())
    resident = resident_model(spec, LORA)
    set_adapter(resident, random_adapter(resident, 1))
    other = resident_model(spec, LoraSpec(2, 4.0, "o_proj", 0.0))
    assert all(".o_proj." in name for name in other.parameters)
    set_adapter(other, initial_adapter(shapes_of(other), np.random.default_rng(0)))
    assert torch.equal(logits(other.model.eval()), plain)


def test_a_target_that_fails_leaves_a_model_that_works(tiny_base: Path) -> None:
    spec = base_of(tiny_base)
    resident_model(spec, LORA)
    with pytest.raises(ModelError):
        resident_model(spec, LoraSpec(4, 8.0, "qkv_proj", 0.0))
    again = resident_model(spec, LORA)
    plain = logits(again.model.eval())
    set_adapter(again, random_adapter(again, 2))
    changed = logits(again.model)
    resident_model(base_of(tiny_base, dtype="bfloat16"), LORA)  # no test inherits this one
    assert not torch.equal(changed, plain)


def test_only_the_adapter_is_trained(resident: Resident) -> None:
    trained = [p for p in resident.model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in resident.parameters.values()}
    assert {p.dtype for p in trained} == {torch.float32}


def test_a_bfloat16_base_has_a_float32_adapter(tiny_base: Path) -> None:
    resident = resident_model(base_of(tiny_base, dtype="bfloat16"), LORA)
    assert {p.dtype for p in resident.parameters.values()} == {torch.float32}
    frozen = {p.dtype for p in resident.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


def test_auto_is_float32_where_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert device_and_dtype("auto") == (torch.device("cpu"), torch.float32)
    assert device_and_dtype("bfloat16")[1] == torch.bfloat16


def test_a_model_that_is_not_there_is_told_in_one_line() -> None:
    for action in (
        lambda: resident_model(BaseSpec("nobody/nothing", 0, "float32"), LORA),
        lambda: adapter_layout("nobody/nothing", LORA),
        lambda: load_tokenizer("nobody/nothing"),
        lambda: base_fingerprint("nobody/nothing"),
    ):
        with pytest.raises(ModelError, match=r"'nobody/nothing' cannot be loaded") as caught:
            action()
        assert "\n" not in str(caught.value)
        assert "HF_HUB_OFFLINE" in str(caught.value)


def test_the_code_of_a_model_folder_is_never_run(tiny_base: Path, tmp_path: Path) -> None:
    """It ran after a y on standard input."""
    folder = shutil.copytree(tiny_base, tmp_path / "with code")
    (folder / "modeling.py").write_text("raise SystemExit('the code ran')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "of-its-own"}))
    with pytest.raises(ModelError, match=r"no such code is run here") as caught:
        base_config(str(folder))
    assert "\n" not in str(caught.value)
    assert "unset" not in str(caught.value)
    (folder / "config.json").write_text(json.dumps(config))  # a type that transformers knows
    assert load_base(BaseSpec(str(folder), 0, "float32")).config.model_type == "llama"


def test_a_pad_token_without_an_embedding_is_replaced(tiny_base: Path, tmp_path: Path) -> None:
    """The first padded batch ended with an IndexError."""
    folder = shutil.copytree(tiny_base, tmp_path / "padded")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<beyond>"})
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "vocab_size": tokenizer.pad_token_id})
    )
    assert load_tokenizer(str(folder)).pad_token == "<eos>"


@pytest.fixture(scope="module")
def sentencepiece_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with nothing but a tokenizer.model."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    folder = tmp_path_factory.mktemp("sentencepiece")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_base / name, folder)
    texts = [f"Patient {i} has {2 * i} cups of tea against fever, cough, rash." for i in range(99)]
    with (folder / "tokenizer.model").open("wb") as file:
        trainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=90, minloglevel=2
        )
    return folder


def test_a_tokenizer_model_alone_reads_as_sentencepiece_does(sentencepiece_base: Path) -> None:
    """transformers took it for another format, and advised to install tiktoken."""
    from sentencepiece import SentencePieceProcessor

    own = SentencePieceProcessor(model_file=str(sentencepiece_base / "tokenizer.model"))
    tokenizer = load_tokenizer(str(sentencepiece_base))
    text = "Patient 7 has a cough."
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == own.encode(text)
    assert tokenizer.eos_token_id == own.eos_id()


def test_a_tokenizer_model_without_sentencepiece_names_the_extra(
    sentencepiece_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("sentencepiece")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ModelError, match=r"pip install 'grandrounds\[sentencepiece\]'"):
        load_tokenizer(str(sentencepiece_base))


def test_weights_that_are_damaged_are_told_in_one_line(tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "damaged")
    torch.save({"w": Path("/")}, folder / "pytorch_model.bin")
    load_base(BaseSpec(str(folder), 0, "float32"))  # a pickle beside safetensors is not read
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match=r"The base model of .* cannot be loaded") as caught:
        load_base(BaseSpec(str(folder), 0, "float32"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"a pickle that holds more than tensors") as caught:
        load_base(BaseSpec(str(folder), 0, "float32"))
    assert "\n" not in str(caught.value)


def test_a_base_whose_files_lack_weights_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    """They were drawn at random, others on every load."""
    folder = shutil.copytree(tiny_base, tmp_path / "lacking")
    tensors = load_file(folder / "model.safetensors")
    dropped = [name for name in tensors if "up_proj" in name]
    for lacking in (dropped, ["lm_head.weight"]):
        kept = {name: tensor for name, tensor in tensors.items() if name not in lacking}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=f"lack {len(lacking)} of its") as caught:
            load_base(BaseSpec(str(folder), 0, "float32"))
        assert lacking[0] in str(caught.value)


def test_weights_of_another_shape_are_named(tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "misshapen")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head\.weight has the shape \[") as caught:
        load_base(BaseSpec(str(folder), 0, "float32"))
    assert "unset" not in str(caught.value)


def test_tied_weights_are_not_missed(tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "tied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = load_base(BaseSpec(str(folder), 0, "float32"))
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


def test_a_folder_without_a_model_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        adapter_layout(str(tmp_path), LORA)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_tells_bases_apart(tiny_base: Path, tmp_path: Path) -> None:
    import json
    import shutil

    assert base_fingerprint(str(tiny_base)) == base_fingerprint(str(tiny_base))
    moved = Path(shutil.copytree(tiny_base, tmp_path / "moved"))
    assert base_fingerprint(str(moved)) == base_fingerprint(str(tiny_base))
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert base_fingerprint(str(moved)) != base_fingerprint(str(tiny_base))


# --- Quantisation ---------------------------------------------------------------------------------


def test_four_bits_are_nf4_with_double_quantisation() -> None:
    config = quantization_config(4, torch.bfloat16)
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantization_config(4, torch.float32).bnb_4bit_compute_dtype == torch.float32


def test_eight_bits_are_llm_int8_and_no_bits_are_nothing() -> None:
    assert quantization_config(8, torch.float32).load_in_8bit
    assert quantization_config(0, torch.float32) is None


def test_a_four_bit_base_really_holds_nf4(tiny_base: Path) -> None:
    resident = resident_model(base_of(tiny_base, quantization=4), LORA)
    query = resident.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert type(query).__name__ == "Linear4bit"
    assert query.weight.quant_type == "nf4"
    assert query.weight.quant_state.nested
    assert {p.dtype for p in resident.parameters.values()} == {torch.float32}


def test_a_base_stored_in_four_bits_is_loaded_as_it_is(tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = str(tmp_path / "stored-4bit")
    load_base(base_of(tiny_base, quantization=4)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    assert bits_of(base_of(Path(folder))) == bits_of(base_of(Path(folder), quantization=4)) == 4
    stored = resident_model(base_of(Path(folder)), LORA)
    adapter = random_adapter(stored, 3)
    set_adapter(stored, adapter)
    found = logits(stored.model.eval())
    again = resident_model(base_of(tiny_base, quantization=4), LORA)
    set_adapter(again, adapter)
    assert torch.equal(found, logits(again.model.eval()))
    config = resolve({"model.name": folder})
    assert machine.precision(config).startswith("base 4-bit as it was published, computed in")
    assert headroom.device_precision(config).quantization == 4
    with pytest.raises(ModelError, match=r"are stored in 4 bits\. Set it to 4 or 0"):
        load_base(base_of(Path(folder), quantization=8))


@pytest.mark.parametrize("method", ["gptq", "awq", "mxfp4", "fp8"])
def test_a_base_stored_by_another_method_is_refused_before_it_is_loaded(
    tiny_base: Path, tmp_path: Path, method: str
) -> None:
    config = json.loads((tiny_base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for action in (
        lambda: adapter_layout(str(tmp_path), LORA),
        lambda: load_base(base_of(tmp_path)),
    ):
        with pytest.raises(ModelError, match=f"stored quantised by {method}") as caught:
            action()
        assert "\n" not in str(caught.value)


# --- Names, shapes and targets --------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear", "auto", " k_proj , down_proj "])
def test_the_layout_without_weights_is_that_of_the_real_model(
    tiny_base: Path, targets: str
) -> None:
    spec = LoraSpec(3, 6.0, targets, 0.0)
    shapes, _ = adapter_layout(str(tiny_base), spec)
    real = resident_model(base_of(tiny_base), spec)
    assert list(shapes.items()) == list(shapes_of(real).items())


def test_the_layout_loads_no_base(tiny_base: Path) -> None:
    before = base_loads()
    adapter_layout(str(tiny_base), LORA)
    assert base_loads() == before


def test_the_layout_has_the_names_that_peft_saves(tiny_base: Path) -> None:
    """Hidden 32; 4 heads of 8 for queries; 2 heads for values: 16, so v_proj is not square."""
    shapes, targets = adapter_layout(str(tiny_base), LORA)
    layer = "base_model.model.model.layers.1.self_attn"
    assert targets.modules == ("q_proj", "v_proj")
    assert len(shapes) == 8
    assert shapes[f"{layer}.q_proj.lora_A.weight"] == (4, 32)
    assert shapes[f"{layer}.q_proj.lora_B.weight"] == (32, 4)
    assert shapes[f"{layer}.v_proj.lora_A.weight"] == (4, 32)
    assert shapes[f"{layer}.v_proj.lora_B.weight"] == (16, 4)


def test_auto_is_pefts_choice_and_all_linear_leaves_out_the_head(tiny_base: Path) -> None:
    _, auto = adapter_layout(str(tiny_base), LoraSpec(4, 8.0, "auto", 0.0))
    assert set(auto.modules) == {"q_proj", "v_proj"}
    _, every = adapter_layout(str(tiny_base), LoraSpec(4, 8.0, "all-linear", 0.0))
    assert list(every.modules) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@pytest.mark.parametrize("targets", ["qkv_proj", "q_proj,qkv_proj", "lm_head", "q_prj"])
def test_a_target_that_matches_nothing_lists_the_linear_modules(
    tiny_base: Path, targets: str
) -> None:
    with pytest.raises(ModelError) as caught:
        adapter_layout(str(tiny_base), LoraSpec(4, 8.0, targets, 0.0))
    message = str(caught.value)
    assert repr(targets.rpartition(",")[2]) in message
    listed = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert f": {listed}." in message
    if targets == "q_prj":
        assert "Did you mean 'q_proj'?" in message


def test_targets_of_commas_only_are_refused(tiny_base: Path) -> None:
    with pytest.raises(ModelError, match="names no module"):
        adapter_layout(str(tiny_base), LoraSpec(4, 8.0, " , ,", 0.0))


# --- Adapters -------------------------------------------------------------------------------------


def test_an_initial_adapter_changes_nothing(tiny_base: Path, resident: Resident) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    assert torch.equal(logits(resident.model), logits(plain))


def test_an_initial_adapter_is_seeded_and_within_its_bound(resident: Resident) -> None:
    """Fan-in 32: A uniform in ±1/sqrt(32) = ±0.1768, of variance 1/(3 * 32)."""
    shapes = {"m.lora_A.weight": (400, 32), "m.lora_B.weight": (16, 400)}
    one, two, other = (initial_adapter(shapes, np.random.default_rng(s)) for s in (1, 1, 2))
    a = one["m.lora_A.weight"]
    assert np.array_equal(a, two["m.lora_A.weight"])
    assert not np.array_equal(a, other["m.lora_A.weight"])
    assert np.abs(a).max() <= np.float32(1 / np.sqrt(32))
    assert a.var() == pytest.approx(1 / 96, rel=0.05)
    assert not one["m.lora_B.weight"].any()
    assert {tensor.dtype for tensor in one.values()} == {np.dtype(np.float32)}


def test_swapped_adapters_change_the_logits_and_swap_back_bit_for_bit(resident: Resident) -> None:
    first, second = random_adapter(resident, 1), random_adapter(resident, 2)
    addresses = [p.data_ptr() for p in resident.parameters.values()]
    set_adapter(resident, first)
    before = logits(resident.model)
    set_adapter(resident, second)
    assert not torch.equal(logits(resident.model), before)
    set_adapter(resident, first)
    assert torch.equal(logits(resident.model), before)
    assert [p.data_ptr() for p in resident.parameters.values()] == addresses


def test_setting_an_adapter_takes_a_copy(resident: Resident) -> None:
    adapter = random_adapter(resident, 1)
    set_adapter(resident, adapter)
    before = logits(resident.model)
    for tensor in adapter.values():
        tensor[:] = 0
    assert torch.equal(logits(resident.model), before)


def test_the_change_is_after_minus_before(resident: Resident) -> None:
    received = random_adapter(resident, 1)
    set_adapter(resident, received)
    assert not any(change.any() for change in adapter_change(resident, received).values())
    with torch.no_grad():
        for parameter in resident.parameters.values():
            parameter.add_(0.5)
    for name, change in adapter_change(resident, received).items():
        assert change.dtype == np.float32
        assert np.array_equal(change, (received[name] + np.float32(0.5)) - received[name])


def test_a_checkpoint_loads_in_plain_peft_with_the_same_logits(
    resident: Resident, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = random_adapter(resident, 3)
    set_adapter(resident, adapter)
    config = peft_config(LORA, Targets(("q_proj", "v_proj")), str(tiny_base))
    directory = RunDirectory.create(tmp_path / "run", resolve())
    folder = directory.save_checkpoint(7, adapter, config, "a card")
    assert folder.name == "peft_7"
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    loaded = PeftModel.from_pretrained(plain, str(folder)).eval()
    assert torch.equal(logits(loaded), logits(resident.model))
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json", ".md"}
    described = json.loads((folder / "adapter_config.json").read_text())
    assert described["inference_mode"] is True
    assert described["target_modules"] == ["q_proj", "v_proj"]  # once in an order drawn by Python
    assert config.inference_mode is False
