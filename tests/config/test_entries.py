"""What published FlowerTune entries write in their pyproject.toml, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config.entries import IN_CODE
from grandrounds.config.keys import Config
from grandrounds.config.recipes import from_options, load_recipe, notes, resolve
from grandrounds.errors import ConfigError

LEAST = """
model.name = "org/base"
static.dataset.name = "org/cards"
"""
"""The keys without which an entry says nothing."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pyproject.toml"


def written(file: Path, lines: str, rest: str = "") -> Path:
    file.write_text(f'[project]\nname = "entry"\n[tool.flwr.app.config]\n{lines}\n{rest}')
    return file


def resolved(file: Path, lines: str) -> Config:
    return resolve(load_recipe(written(file, lines)))


@pytest.mark.parametrize("key", ["model.name", "static.dataset.name"])
def test_an_entry_without_its_base_or_data_is_refused(file: Path, key: str) -> None:
    """30 of 258 published versions; each trained the packaged base or data and said completed."""
    rest = "".join(line + "\n" for line in LEAST.splitlines() if not line.startswith(key))
    with pytest.raises(ConfigError, match=f"{key} is empty"):
        resolved(file, rest)
    given = from_options(written(file, rest), None, model="a/b", data="c/d")
    assert resolve(given).model.name == "a/b"


def test_what_an_entry_leaves_out_is_the_templates_and_said(file: Path) -> None:
    """The packaged values are 24 rounds, rank 16 and 4 of 20 sites."""
    config = resolved(file, LEAST)
    assert config.federation.num_server_rounds == 200
    assert (config.lora.peft_lora_r, config.lora.peft_lora_alpha) == (32, 64)
    assert config.strategy.fraction_train == 0.1
    assert (config.arguments.max_steps, config.train.learning_rate_max) == (10, 5e-5)
    assert config.model.quantization == 4
    flat = config.flat()
    assert {key: flat[key] for key in IN_CODE} == IN_CODE
    said, formats = notes(load_recipe(file), file)
    assert "template's values are used: model.quantization = 4," in said
    assert "data.num-partitions = 20" in said
    assert "does not set bf16 and tf32" in formats
    settings = from_options(file, ["num-server-rounds=3"])
    assert "num-server-rounds" not in notes(settings, file)[0]


def test_hyphens_and_underscores_are_the_same(file: Path) -> None:
    config = resolved(
        file,
        LEAST + 'strategy.name = "fedprox"\nstrategy.proximal_mu = 0.5\n'
        "train.training_arguments.max_steps = 7\nmodel.lora.peft_lora_r = 4\n"
        'model.lora.peft_lora_target_modules = "q_proj"\n',
    )
    assert (config.strategy.proximal_mu, config.arguments.max_steps) == (0.5, 7)
    assert (config.lora.peft_lora_r, config.lora.target_modules) == (4, "q_proj")
    with pytest.raises(ConfigError, match=r"max-steps = 6 and \S+max_steps = 7 are the same key"):
        resolved(
            file,
            LEAST + "train.training-arguments.max-steps = 6\n"
            "train.training-arguments.max_steps = 7\n",
        )


@pytest.mark.parametrize("key", ["strategy.use-flexlora", "use-flexlora", "use_flexlora"])
@pytest.mark.parametrize(
    ("value", "rule"),
    [("true", "product"), ("1", "product"), ('"on"', "product"), ("0", "fedavg")],
)
def test_flexlora_is_read_in_its_three_spellings(
    file: Path, key: str, value: str, rule: str
) -> None:
    assert resolved(file, f"{LEAST}{key} = {value}").strategy.name == rule


@pytest.mark.parametrize(
    ("value", "targets"), [('"all"', "all-linear"), ('["q_proj", "v_proj"]', "q_proj,v_proj")]
)
def test_targets_may_be_all_or_a_list(file: Path, value: str, targets: str) -> None:
    config = resolved(file, f"{LEAST}model.lora.peft_lora_target_modules = {value}")
    assert config.lora.target_modules == targets


def test_the_command_line_wins_over_an_alias_in_the_file(file: Path) -> None:
    """216 of 224 entries set fraction-fit; with --set fraction-train they were contradictions."""
    path = written(file, f"{LEAST}strategy.fraction-fit = 0.1")
    assert resolve(load_recipe(path)).strategy.fraction_train == 0.1
    given = resolve(from_options(path, ["strategy.fraction-train=0.3"]))
    assert given.strategy.fraction_train == 0.3
    between = resolve(load_recipe(path), {"strategy.fraction-train": 0.3})  # as site approve does
    assert between.strategy.fraction_train == 0.3
    path = written(file, f"{LEAST}strategy.fraction-train = 0.1")
    assert resolve(from_options(path, ["strategy.fraction-fit=0.3"])).strategy.fraction_train == 0.3


def test_a_constant_schedule_has_no_warm_up(file: Path) -> None:
    arguments = "train.training-arguments."
    lines = f'{LEAST}{arguments}warmup-steps = 2\n{arguments}lr-scheduler-type = "constant"\n'
    assert resolved(file, lines).arguments.warmup_steps == 0
    assert any("warmup-steps = 2 has no effect" in note for note in notes(load_recipe(file), file))


def test_the_sites_of_the_default_federation_are_read(file: Path) -> None:
    federation = '[tool.flwr.federations]\ndefault = "a"\n[tool.flwr.federations.a]\n'
    path = written(file, LEAST, f"{federation}options.num-supernodes = 7\n")
    assert resolve(load_recipe(path)).data.num_partitions == 7
    assert "num-partitions" not in notes(load_recipe(path), path)[0]


def test_another_projects_pyproject_is_told_as_one(file: Path) -> None:
    file.write_text('[project]\nname = "something"\nversion = "1"\n')
    with pytest.raises(ConfigError, match=r"without \[tool.flwr.app.config\], so no FlowerTune"):
        load_recipe(file)


def test_a_plan_of_an_entry_says_what_it_took_from_the_template(file: Path) -> None:
    path = written(file, LEAST.replace("org/base", "mistralai/Mistral-7B-v0.3"))
    done = CliRunner().invoke(app, ["plan", str(path), "--plain"])
    assert done.exit_code == 0, done.output
    assert "template's values are used" in " ".join(done.output.split())
