"""Where a configuration comes from, and that published FlowerTune entries run unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.config.recipes import (
    defaults,
    differences,
    flatten,
    leaderboard_differences,
    load_recipe,
    parse_overrides,
    resolve,
    to_toml,
)
from grandrounds.config.values import Scalar
from grandrounds.errors import ConfigError
from tests.places import ROOT

TEMPLATE = """
[project]
name = "medical-entry"
dependencies = ["flwr[simulation]", "trl", "peft"]

[tool.flwr.app]
publisher = "somebody"

[tool.flwr.app.components]
serverapp = "entry.server_app:app"
clientapp = "entry.client_app:app"

[tool.flwr.app.config]
model.name = "mistralai/Mistral-7B-v0.3"
model.quantization = 4
model.gradient-checkpointing = true
model.lora.peft-lora-r = 32
model.lora.peft-lora-alpha = 64
train.save-every-round = 5
train.learning-rate-max = 5e-5
train.learning-rate-min = 1e-6
train.seq-length = 512
train.training-arguments.output-dir = ""
train.training-arguments.learning-rate = ""
train.training-arguments.per-device-train-batch-size = 16
train.training-arguments.gradient-accumulation-steps = 1
train.training-arguments.logging-steps = 10
train.training-arguments.num-train-epochs = 3
train.training-arguments.max-steps = 10
train.training-arguments.save-steps = 1000
train.training-arguments.save-total-limit = 10
train.training-arguments.gradient-checkpointing = true
train.training-arguments.lr-scheduler-type = "constant"
strategy.fraction-fit = 0.1
strategy.fraction-evaluate = 0.0
num-server-rounds = 200

[tool.flwr.app.config.static]
dataset.name = "medalpaca/medical_meadow_medical_flashcards"

[tool.flwr.federations]
default = "local-simulation"

[tool.flwr.federations.local-simulation]
options.num-supernodes = 20
options.backend.client-resources.num-cpus = 6
options.backend.client-resources.num-gpus = 1.0
"""


def changed(text: str, **replacements: str) -> str:
    """Return the template with the lines of some keys replaced; each key must be there once."""
    for key, line in replacements.items():
        name = key.replace("__", ".").replace("_", "-")
        lines = [old for old in text.splitlines() if old.startswith(f"{name} =")]
        assert len(lines) == 1, name
        text = text.replace(lines[0], line)
    return text


JSL = changed(
    TEMPLATE,
    model__name='model.name = "johnsnowlabs/JSL-MedLlama-3-8B-v2.0"',
    model__lora__peft_lora_r="model.lora.peft-lora-r = 8",
    model__lora__peft_lora_alpha="model.lora.peft-lora-alpha = 32",
    train__save_every_round="train.save-every-round = 4",
    train__learning_rate_max="train.learning-rate-max = 1e-5",
    train__training_arguments__max_steps="""train.training-arguments.max-steps = 6
train.training-arguments.warmup-steps = 2
train.training-arguments.max-grad-norm = 1.0
train.training-arguments.fp16 = false
train.training-arguments.bf16 = true
train.training-arguments.tf32 = true
train.training-arguments.optim = "paged_adamw_8bit\"""",
    train__training_arguments__logging_steps="train.training-arguments.logging-steps = 1",
    train__training_arguments__lr_scheduler_type=(
        'train.training-arguments.lr-scheduler-type = "constant_with_warmup"'
    ),
    strategy__fraction_fit="strategy.fraction-fit = 0.15",
    num_server_rounds="num-server-rounds = 20",
)

ALOE = changed(
    TEMPLATE,
    model__name="""model.name = "HPAI-BSC/Llama3.1-Aloe-Beta-8B"
model.lora.use-dora = false
task.name = "medical\"""",
    train__training_arguments__gradient_accumulation_steps=(
        "train.training-arguments.gradient-accumulation-steps = 2"
    ),
    strategy__fraction_fit="""strategy.fraction-train = 0.1
strategy.use-flexlora = false""",
    num_server_rounds="num-server-rounds = 10",
).replace(
    "medalpaca/medical_meadow_medical_flashcards", "flwrlabs/medical-meadow-medical-flashcards"
)

QWEN_DORA = changed(
    TEMPLATE,
    model__name="""model.name = "Qwen/Qwen3-0.6B"
model.lora.peft-use-dora = true""",
)


def entry(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "pyproject.toml"
    path.write_text(text)
    return resolve(load_recipe(path))


def test_the_flowertune_template_runs_unchanged(tmp_path: Path) -> None:
    config = entry(tmp_path, TEMPLATE)
    assert config.model.name == "mistralai/Mistral-7B-v0.3"
    assert config.model.quantization == 4
    assert config.model.gradient_checkpointing is True
    assert (config.lora.peft_lora_r, config.lora.peft_lora_alpha) == (32, 64)
    assert config.train.save_every_round == 5
    assert (config.train.learning_rate_max, config.train.learning_rate_min) == (5e-5, 1e-6)
    assert config.train.seq_length == 512
    assert config.arguments.max_steps == 10
    assert config.examples_per_step == 16
    assert config.arguments.lr_scheduler_type == "constant"
    assert config.federation.num_server_rounds == 200
    assert config.data.num_partitions == 20
    assert config.cohort_size == 2
    assert leaderboard_differences(config) == []


def test_what_the_flowertune_template_fixes_in_code_is_filled_in(tmp_path: Path) -> None:
    config = entry(tmp_path, TEMPLATE)
    assert config.strategy.name == "fedavg"
    assert config.strategy.proximal_mu == 0
    assert config.strategy.fraction_evaluate == 0
    assert config.lora.dropout == 0.075
    assert config.data.held_out_fraction == 0
    assert config.lora.target_modules == "auto"
    assert config.data.partitioner == "iid"
    assert config.data.prompt_template == "alpaca"


def test_what_an_entry_says_wins_over_the_template(tmp_path: Path) -> None:
    text = changed(
        TEMPLATE,
        model__lora__peft_lora_r="model.lora.peft-lora-r = 32\nmodel.lora.dropout = 0.2",
        strategy__fraction_evaluate="strategy.fraction-evaluate = 0.1",
    )
    config = entry(tmp_path, text)
    assert config.lora.dropout == 0.2
    assert config.strategy.fraction_evaluate == 0.1
    assert config.data.held_out_fraction == defaults()["data.held-out-fraction"]


def test_the_jsl_entry_runs_unchanged(tmp_path: Path) -> None:
    config = entry(tmp_path, JSL)
    assert config.model.name == "johnsnowlabs/JSL-MedLlama-3-8B-v2.0"
    assert (config.lora.peft_lora_r, config.lora.peft_lora_alpha) == (8, 32)
    assert (config.train.learning_rate_max, config.train.learning_rate_min) == (1e-5, 1e-6)
    assert (config.arguments.max_steps, config.arguments.warmup_steps) == (6, 2)
    assert config.arguments.lr_scheduler_type == "constant_with_warmup"
    assert config.arguments.max_grad_norm == 1
    assert config.train.optimizer == "paged_adamw_8bit"
    assert config.train.save_every_round == 4
    assert config.cohort_size == 3
    assert config.federation.num_server_rounds == 20


def test_the_aloe_entry_runs_unchanged(tmp_path: Path) -> None:
    config = entry(tmp_path, ALOE)
    assert config.lora.peft_use_dora is False
    assert config.cohort_size == 2
    assert config.examples_per_step == 32
    assert config.static.name == "flwrlabs/medical-meadow-medical-flashcards"
    assert leaderboard_differences(config) == []


def test_the_qwen_entry_with_dora_runs_unchanged(tmp_path: Path) -> None:
    assert entry(tmp_path, QWEN_DORA).lora.peft_use_dora


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('task.name = "code"', "only the medical task is supported"),
    ],
)
def test_a_foreign_key_that_means_something_else_is_refused(
    tmp_path: Path, line: str, reason: str
) -> None:
    text = changed(TEMPLATE, num_server_rounds=f"num-server-rounds = 200\n{line}")
    with pytest.raises(ConfigError, match=reason):
        entry(tmp_path, text)


def test_flexlora_is_the_rule_that_aggregates_products(tmp_path: Path) -> None:
    text = changed(
        TEMPLATE, num_server_rounds="num-server-rounds = 9\nstrategy.use-flexlora = true"
    )
    assert entry(tmp_path, text).strategy.name == "product"
    assert entry(tmp_path, text.replace("flexlora = true", "flexlora = false")).strategy.name == (
        "fedavg"
    )


def test_a_wrong_type_in_an_entry_is_refused_in_words(tmp_path: Path) -> None:
    text = changed(TEMPLATE, strategy__fraction_evaluate='strategy.fraction-evaluate = "some"')
    with pytest.raises(ConfigError, match=r"fraction-evaluate = 'some'"):
        entry(tmp_path, text)


def test_our_own_pyproject_is_read_without_the_overlay() -> None:
    recipe = load_recipe(ROOT / "pyproject.toml")
    assert recipe == defaults()


def test_a_written_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = resolve(
        {
            "train.learning-rate-max": 3e-5,
            "train.learning-rate-min": 1e-7,
            "data.dirichlet-alpha": 1e20,
            "train.dynamic-data-seed": False,
            "seed": 2**31 - 1,
        }
    )
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config.flat()))
    assert resolve(load_recipe(path)) == config


@pytest.mark.parametrize(
    "name",
    ['a "quoted" one', "back\\slash", "Größe", "line\nbreak", "tab\tbed", "run 🩺", "del\x7fete"],
)
def test_a_written_text_reads_back_the_same(tmp_path: Path, name: str) -> None:
    config = resolve({"run-directory": name})
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config.flat()))
    assert resolve(load_recipe(path)) == config


def test_nested_tables_and_dotted_keys_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "nested.toml"
    path.write_text("[model.lora]\npeft-lora-r = 2\n[model]\nname = 'x'\n")
    assert load_recipe(path) == {"model.lora.peft-lora-r": 2, "model.name": "x"}


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read: No such file"):
        load_recipe(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("text", ["a = ", "[model", "a = 1\na = 2", "seed = 07"])
def test_malformed_toml_is_a_config_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML"):
        load_recipe(path)


def test_bytes_that_are_no_text_are_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(b'model.name = "\xff\xfe"')
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["tool = 1", "[tool]\nflwr = 'x'", "[tool.flwr]\napp = 3"])
def test_a_tool_that_is_no_table_is_a_config_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.toml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        resolve(load_recipe(path))


@pytest.mark.parametrize(
    "text", ['model.lora.target-modules = ["q_proj", "v_proj"]', "seed = 2026-01-01"]
)
def test_a_list_or_a_date_is_a_config_error_that_names_the_key(tmp_path: Path, text: str) -> None:
    path = tmp_path / "list.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"^{text.split(' =')[0]} = .*q_proj,v_proj"):
        load_recipe(path)


def test_overrides_are_toml_values_or_plain_texts() -> None:
    expected: dict[str, Scalar] = {
        "seed": 3,
        "train.learning-rate-max": 1e-3,
        "model.gradient-checkpointing": True,
        "model.name": "HuggingFaceTB/SmolLM2-135M",
        "run-directory": "a=b",
        "data.partition-by": "",
    }
    assert expected == parse_overrides(
        [
            "seed=3",
            "train.learning-rate-max = 1e-3",
            "model.gradient-checkpointing=true",
            "model.name=HuggingFaceTB/SmolLM2-135M",
            "run-directory=a=b",
            "data.partition-by=''",
        ]
    )


@pytest.mark.parametrize("assignment", ["seed", "=3", " = 3"])
def test_an_override_without_key_or_sign_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_overrides([assignment])


def test_later_layers_win() -> None:
    assert resolve({"seed": 1}, {"seed": 2}).federation.seed == 2


def test_flatten_joins_names_with_dots() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": "x"}) == {"a.b.c": 1, "d": "x"}


def test_differences_name_keys_with_both_values_but_no_directories() -> None:
    old = resolve({"run-directory": "one", "seed": 2, "model.lora.dropout": 0.0})
    new = resolve({"run-directory": "two", "seed": 1, "model.lora.dropout": 0.1})
    assert differences(old, new) == ["seed: 2 → 1", "model.lora.dropout: 0.0 → 0.1"]


def test_what_does_not_compare_with_the_leaderboard_is_listed() -> None:
    reasons = leaderboard_differences(
        resolve(
            {
                "data.num-partitions": 10,
                "data.partitioner": "size-skewed",
                "static.dataset.name": "cards.jsonl",
            }
        )
    )
    assert reasons == [
        "static.dataset.name is cards.jsonl",
        "10 partitions, not 20",
        "partitioner size-skewed, not iid",
        "5 % of each site's data held out",
    ]
    part = {"static.dataset.name": "org/cards", "static.dataset.split": "test"}
    assert "configuration and split are test, not the default and train" in leaderboard_differences(
        resolve(part)
    )


# --- Tables and dates -----------------------------------------------------------------------------

OPTIONS, DAY = "data.template-options", "data.template-date"
CHAT = {"data.prompt-template": "chat"}


def test_a_table_is_one_value_however_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "chat.toml"
    path.write_text(
        'data.prompt-template = "chat"\ndata.template-date = 2026-07-26\n'
        "[data.template-options]\nenable_thinking = true\neffort = 'low'\n"
    )
    in_file = recipes.load_recipe(path)
    settings = recipes.from_options(path, ["data.template-options.enable_thinking=false"])
    config = recipes.resolve(settings)
    assert config.data.template_options == '{"effort": "low", "enable_thinking": false}'
    assert config.data.template_date == "2026-07-26"
    assert recipes.resolve(config.recipe()) == config
    whole = recipes.overlaid([in_file, {OPTIONS: '{"b":1}'}, {f"{OPTIONS}.a": 2}])
    assert whole[OPTIONS] == '{"a": 2, "b": 1}'
    in_line = recipes.parse_overrides(["data.template-options={a = 2, b = 1}", f"{DAY}=2026-07-26"])
    assert recipes.overlaid([in_line])[OPTIONS] == whole[OPTIONS]
    assert recipes.overlaid([in_line])[DAY] == "2026-07-26"
    assert recipes.overlaid([in_file, {OPTIONS: "{}"}])[OPTIONS] == ""


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({OPTIONS: "enable_thinking"}, "it must be a table of strings"),
        ({OPTIONS: '{"a": [1]}'}, "it must be a table of strings"),
        ({f"{OPTIONS}.enable-thinking": False}, "it must be a table of strings"),
        ({DAY: "26 Jul 2026"}, "it must be a date such as 2026-07-26"),
        ({DAY: "2026-02-30"}, "it must be a date such as 2026-07-26"),
    ],
)
def test_what_is_no_table_or_no_date_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        recipes.resolve({**CHAT, **values})


@pytest.mark.parametrize(
    "values", [{DAY: "2026-07-26"}, {f"{OPTIONS}.a": 1}, {"data.system-prompt": "Be brief."}]
)
def test_settings_of_the_chat_template_need_it(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r'has no effect without data\.prompt-template = "chat"'):
        recipes.resolve(values)
    recipes.resolve({**CHAT, **values})


def test_an_entry_may_set_revisions_and_options(tmp_path: Path) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(
        '[tool.flwr.app.config]\nmodel.name = "someone/model"\nmodel.revision = "v1"\n'
        '[tool.flwr.app.config.static]\ndataset.name = "someone/cards"\n'
        'dataset.revision = "v2"\n'
    )
    config = recipes.resolve(recipes.load_recipe(path))
    assert (config.model.source, config.static.source) == ("someone/model@v1", "someone/cards@v2")
    assert config.data.prompt_template == "alpaca"
    assert config.data.chat == ("", "", "")


RANKS = "model.lora.rank-pattern"


def test_a_table_of_ranks_keeps_its_order_however_it_is_written(tmp_path: Path) -> None:
    """Of several expressions that match, PEFT takes the first."""
    path = tmp_path / "own.toml"
    path.write_text(
        '[model.lora.rank-pattern]\nv_proj = 8\n".*0.*q_proj" = 2\nlayers.1.o_proj = 4\n'
    )
    settings = recipes.from_options(path, [f"{RANKS}.v_proj=6", f"{RANKS}.k_proj = 3"])
    config = recipes.resolve(settings)
    written = {"v_proj": 6, ".*0.*q_proj": 2, "layers.1.o_proj": 4, "k_proj": 3}
    assert list(config.lora.ranks_by_pattern.items()) == list(written.items())
    assert recipes.resolve(config.recipe()) == config
    assert recipes.resolve({RANKS: json.dumps(written, indent=1)}).lora == config.lora
    in_line = recipes.parse_overrides([f"{RANKS}={{v_proj = 6, a = 1}}"])
    assert recipes.overlaid([in_line])[RANKS] == '{"v_proj": 6, "a": 1}'
    assert config.lora.scales == (2.0, 16.0)
    assert recipes.resolve({}).lora.rank_pattern == ""


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({f"{RANKS}.q_proj": 0}, r"each with an integer \(at least 1, at most 1024\)"),
        ({f"{RANKS}.q_proj": 2.0}, "each with an integer"),
        ({f"{RANKS}.q_proj": True}, "each with an integer"),
        ({RANKS: "q_proj"}, r"such as \{q_proj = 4\}"),
        ({RANKS: '{"(q_proj": 4}'}, "regular expressions"),
        ({RANKS: '{"(.*a)*_proj": 4}'}, "an expression repeats characters only, no groups"),
        ({"model.lora.alpha-pattern.q_proj": 0}, r"each with a number \(more than 0\)"),
        ({"model.lora.rank_pattern.q_proj": 4}, r"Write model\.lora\.rank-pattern\.q_proj=4"),
        ({f"{RANKS}.q_proj": 4, "strategy.name": "flora"}, "flora stacks the adapters of all"),
        (
            {f"{RANKS}.q_proj": 4, "strategy.name": "product", "strategy.site-ranks": "8"},
            "strategy.site-ranks gives one rank to all modules",
        ),
    ],
)
def test_tables_of_ranks_that_cannot_be_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        recipes.resolve(values)


@pytest.mark.parametrize(
    "text",
    ['"train.devices" = 2\n[train]\ndevices = 3\n', 'train.devices = 2\n"train.devices" = 3\n'],
)
def test_a_key_that_is_set_twice_is_told(text: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"train.devices is set twice in one file"):
        load_recipe(file)
