"""Every key of a run's configuration has a verdict, and each limit of a policy holds."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord

from grandrounds.config import recipes
from grandrounds.config.keys import FIELD_OF_KEY
from grandrounds.errors import ConfigError, PolicyError, ReplyError
from grandrounds.site.custody import policy
from grandrounds.site.custody.own_run import in_whole_steps
from grandrounds.site.custody.policy import AT_LEAST, AT_MOST, ONE_OF
from grandrounds.site.custody.site_file import Policy, Privacy, SiteFile
from grandrounds.site.custody.verdicts import VERDICTS
from grandrounds.wire.schedule import examples_of_a_visit, round_learning_rate_of
from tests.config.test_configs import ENTRIES, TEMPLATE
from tests.own_sites import make_site
from tests.places import ROOT

DEFAULT = {
    "policy__min_examples": 100,
    "policy__max_rank": 32,
    "policy__min_examples_per_visit": 32,
}
"""What `make_site` loosens, as in the template."""

TARGETS = ("q_proj", "v_proj")

STEPS = "train.training-arguments.max-steps"
BATCH = "train.training-arguments.per-device-train-batch-size"


@pytest.fixture
def site(tmp_path: Path) -> SiteFile:
    """A site under the policy of the template."""
    return make_site(tmp_path, {"formulary": ""}, **DEFAULT)


def refusals(
    site: SiteFile, settings: dict[str, Any], num_examples: int | None = None
) -> list[str]:
    """Return the reasons for which a site refuses a run; empty if it does not."""
    asked = policy.asked_of(recipes.resolve(settings), TARGETS, num_examples)
    return list(policy.objections(site, asked))


def test_every_key_of_a_run_has_a_verdict_and_no_other_has() -> None:
    assert set(VERDICTS) == set(FIELD_OF_KEY)
    for key, verdict in VERDICTS.items():
        kinds = ("bounded", "listed", "private", "own", "fixed", "approved", "harmless")
        assert verdict.kind in kinds, key
        assert bool(verdict.by) == (verdict.kind in ("bounded", "listed", "private")), key
        assert bool(verdict.why) != bool(verdict.by), key


def test_the_limits_that_verdicts_name_are_those_that_are_checked() -> None:
    named = {limit for v in VERDICTS.values() if v.kind != "private" for limit in v.by}
    private = {limit for v in VERDICTS.values() if v.kind == "private" for limit in v.by}
    assert private <= {field.name.replace("_", "-") for field in dataclasses.fields(Privacy)}
    checked = {*AT_LEAST, *AT_MOST, *ONE_OF, "sequence-length-step", "bases"}
    assert named == checked
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(Policy)}
    assert checked - fields == {"bases"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_of_the_repository_passes_the_default_policy(
    site: SiteFile, path: Path
) -> None:
    """But for the learning rate of private-consortium, which is the embedded base's: it says so."""
    found = refusals(site, recipes.load_recipe(path), 1000)
    if path.stem == "private-consortium":
        [refusal] = found
        assert refusal.startswith("max-learning-rate")
        assert "sites allow 1e-2" in path.read_text()
    else:
        assert found == []


def test_the_packaged_first_run_and_published_entries_pass_the_default_policy(
    site: SiteFile,
) -> None:
    for settings in ({}, *(TEMPLATE | entry for entry in ENTRIES.values())):
        assert refusals(site, settings, 1000) == []


OWN = "{{ question }}\nA: {{ answer }}"


def test_a_template_of_ones_own_is_allowed_by_its_hash_alone(tmp_path: Path) -> None:
    sha256 = hashlib.sha256(OWN.encode()).hexdigest()
    site = make_site(
        tmp_path, {"formulary": ""}, policy__prompt_templates=f"alpaca,llama2,{sha256}"
    )
    assert refusals(site, {"data.prompt-template": OWN}) == []
    assert refusals(site, recipes.parse_overrides(["data.prompt-template=llama2"])) == []
    [told] = refusals(site, {"data.prompt-template": OWN + " "})
    assert told.startswith("prompt-templates = 'alpaca,llama2,")
    other = hashlib.sha256(f"{OWN} ".encode()).hexdigest()
    assert told.endswith(f"requested '{other}'")
    policy.check_texts(site, {"data.prompt-template": OWN})
    with pytest.raises(PolicyError, match="control character"):
        policy.check_texts(site, {"data.prompt-template": f"\x1b{OWN}"})
    with pytest.raises(ConfigError, match=r"policy\.prompt-templates .*64 digits"):
        make_site(tmp_path / "b", {"formulary": ""}, policy__prompt_templates="alpaca,mine")


def test_a_hostile_template_that_a_site_lists_all_the_same_is_refused(tmp_path: Path) -> None:
    """Before its data are read, and before anything is rendered."""
    text = "{% for i in range(10**9) %}{{ question }}{% endfor %}{{ answer }}"
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    site = make_site(tmp_path, {"formulary": ""}, policy__prompt_templates=sha256)
    with pytest.raises(ConfigError, match="for is not allowed"):
        policy.check_recipe(site, recipes.resolve({"data.prompt-template": text}))


EXCEEDING: dict[str, tuple[dict[str, Any], str]] = {
    "max-rounds": ({"num-server-rounds": 1001}, "max-rounds = 1000, requested 1001"),
    "quantizations": ({"model.quantization": 4}, "quantizations = '0,8', requested '4'"),
    "dtypes": ({"model.dtype": "float32"}, "dtypes = 'auto', requested 'float32'"),
    "strategies": ({"strategy.name": "fedmedian"}, "strategies = 'fedexp', requested 'fedmedian'"),
    "personal-adapters": (
        {"personalisation.name": "shared-a"},
        "personal-adapters = 'none', requested 'shared-a'",
    ),
    "optimizers": (
        {"train.optimizer": "adamw_8bit"},
        "optimizers = 'adamw_torch', requested 'adamw_8bit'",
    ),
    "prompt-templates": (
        {"data.prompt-template": "chat"},
        "prompt-templates = 'alpaca', requested 'chat'",
    ),
    "target-modules": ({}, "target-modules = 'q_proj', requested v_proj"),
    "max-rank": ({"model.lora.peft-lora-r": 33}, "max-rank = 32, requested 33"),
    "max-rank of the stack": (
        {"strategy.name": "flora", "strategy.max-rank": 64, "strategy.proximal-mu": 0.0},
        "max-rank = 32, requested 80",
    ),
    "max-rank of a module": (
        {"model.lora.rank-pattern": '{"q_proj": 64}'},
        "max-rank = 32, requested 64",
    ),
    "min-lora-scale of a module": (
        {"model.lora.alpha-pattern": '{"q_proj": 0.16}'},
        "min-lora-scale = 0.1, requested 0.01",
    ),
    "max-lora-scale of a module": (
        {"model.lora.rank-pattern": '{"q_proj": 1}'},
        "max-lora-scale = 16, requested 32",
    ),
    "min-lora-scale": (
        {"model.lora.peft-lora-alpha": 1.6e-12},
        "min-lora-scale = 0.1, requested 1e-13",
    ),
    "max-lora-scale": (
        {"model.lora.peft-lora-alpha": 1e6},
        "max-lora-scale = 16, requested 62500",
    ),
    "min-learning-rate": (
        {"train.learning-rate-min": 0.0},
        "min-learning-rate = 1e-08, requested 0 (set train.learning-rate-min above 0",
    ),
    "min-learning-rate in a warm-up": (
        {
            "train.training-arguments.warmup-steps": 10**12,
            "train.training-arguments.max-steps": -1,
        },
        "min-learning-rate = 1e-08, requested 1e-16",
    ),
    "max-learning-rate": (
        {"train.learning-rate-max": 0.5},
        "max-learning-rate = 0.01, requested 0.5",
    ),
    "max-server-learning-rate": (
        {"strategy.name": "fedadam", "strategy.server-learning-rate": 5.0},
        "max-server-learning-rate = 1, requested 5",
    ),
    "max-weight-decay": (
        {"train.training-arguments.weight-decay": 0.9},
        "max-weight-decay = 0.5, requested 0.9",
    ),
    "max-proximal-mu": (
        {"strategy.proximal-mu": 1e9},
        "max-proximal-mu = 10, requested 1000000000",
    ),
    "min-clipping-norm": (
        {"train.training-arguments.max-grad-norm": 1e-12},
        "min-clipping-norm = 0.01, requested 1e-12",
    ),
    "max-prompt-characters": (
        {"data.prompt-template": "chat", "data.system-prompt": "x" * 1001},
        "max-prompt-characters = 1000, requested 1001",
    ),
    "min-sequence-length": (
        {"train.seq-length": 64},
        "min-sequence-length = 128, requested 64",
    ),
    "max-sequence-length": (
        {"train.seq-length": 8192, BATCH: 8},
        "max-sequence-length = 4096, requested 8192",
    ),
    "sequence-length-step": (
        {"train.seq-length": 511},
        "sequence-length-step = 64, requested 511",
    ),
    "min-logits-chunk-tokens": (
        {"train.logits-chunk-tokens": 1},
        "min-logits-chunk-tokens = 64, requested 1",
    ),
    "max-batch": ({BATCH: 65}, "max-batch = 64, requested 65"),
    "max-tokens-per-batch": (
        {BATCH: 64, "train.seq-length": 2048},
        "max-tokens-per-batch = 65536, requested 131072",
    ),
    "min-examples-per-step": ({BATCH: 1, STEPS: 40}, "min-examples-per-step = 4, requested 1"),
    "max-steps-per-visit": ({STEPS: 101}, "max-steps-per-visit = 100, requested 101"),
    "min-examples-per-visit": ({STEPS: 1}, "min-examples-per-visit = 32, requested 16"),
    "max-examples-per-visit": (
        {BATCH: 64, STEPS: 100, "train.training-arguments.gradient-accumulation-steps": 2},
        "max-examples-per-visit = 10000, requested 12800",
    ),
}
NARROWED = {
    "quantizations": "0,8",
    "dtypes": "auto",
    "strategies": "fedexp",
    "personal-adapters": "none",
    "optimizers": "adamw_torch",
    "prompt-templates": "alpaca",
    "target-modules": "q_proj",
}
"""Lists of the policy whose default allows everything."""


@pytest.mark.parametrize("case", EXCEEDING)
def test_what_exceeds_a_limit_is_refused_by_it_alone(
    site: SiteFile, tmp_path: Path, case: str
) -> None:
    settings, reason = EXCEEDING[case]
    limit = case.partition(" ")[0]
    if limit in NARROWED:
        narrowed = {f"policy__{limit.replace('-', '_')}": NARROWED[limit]}
        site = make_site(tmp_path / "narrow", {"formulary": ""}, **DEFAULT, **narrowed)
    [found] = refusals(site, settings)
    assert found.startswith(reason)


def test_every_limit_is_tried_above() -> None:
    tried = {case.partition(" ")[0] for case in EXCEEDING}
    assert tried == {*AT_LEAST, *AT_MOST, *ONE_OF, "sequence-length-step"}


def test_a_refusal_names_all_reasons_at_once(site: SiteFile) -> None:
    settings = {
        "train.seq-length": 40,
        BATCH: 1,
        STEPS: 1,
        "train.learning-rate-min": 0.0,
        "model.lora.peft-lora-alpha": 1.6e-12,
    }
    asked = policy.asked_of(recipes.resolve(settings), TARGETS, 50)
    with pytest.raises(PolicyError) as refused:
        policy.check_run(site, asked, 50)
    for key in (
        *("min-sequence-length", "sequence-length-step", "min-examples-per-step"),
        *("min-examples-per-visit", "min-learning-rate", "min-lora-scale", "min-examples = 100"),
    ):
        assert key in str(refused.value)


def test_a_refusal_does_not_tell_how_many_examples_the_site_has(site: SiteFile) -> None:
    epochs = {STEPS: -1, "train.training-arguments.num-train-epochs": 1.0, BATCH: 3}
    asked = policy.asked_of(recipes.resolve(epochs), TARGETS, 12345)
    with pytest.raises(PolicyError) as refused:
        policy.check_run(site, asked, 77)
    assert "max-examples-per-visit = 10000, requested more" in str(refused.value)
    assert "max-steps-per-visit = 100, requested more" in str(refused.value)
    assert "min-examples = 100, the site has fewer" in str(refused.value)
    assert not {"12345", "4115", "77"} & set(str(refused.value).replace(";", " ").split())


def test_keys_that_the_site_does_not_know_are_refused_together(site: SiteFile) -> None:
    policy.check_keys(site, recipes.resolve({}).flat())
    with pytest.raises(
        PolicyError, match=r"the site does not know 'a\.new-key', 'train\.seq-lenght'"
    ):
        policy.check_keys(site, ["train.seq-lenght", "a.new-key", "seed"])


def test_a_message_may_instruct_only_the_learning_rate_of_the_schedule(site: SiteFile) -> None:
    config = recipes.resolve({"num-server-rounds": 10})

    def check(number: object, rate: object, kind: str = "train") -> None:
        said = ConfigRecord({"round": number, "learning-rate": rate})  # type: ignore[dict-item]
        policy.check_instruction(site, config, kind, said)

    for number in range(1, 11):
        check(number, round_learning_rate_of(config, number))
    check(10, 0.0, "evaluate")
    with pytest.raises(PolicyError, match="round 11 of a run of 10 rounds"):
        check(11, 0.0, "evaluate")
    with pytest.raises(PolicyError, match=r"learning rate of round 3 is 0\.002\d+ .* requested 0"):
        check(3, 0.0)
    with pytest.raises(PolicyError, match="round 11 of a run of 10 rounds"):
        check(11, 1e-4)
    with pytest.raises(ReplyError, match="learning-rate is 'x'"):
        check(3, "x")


def test_a_visit_of_epochs_takes_no_shorter_last_step(site: SiteFile) -> None:
    """129 examples in batches of 16 would end with a step of a single one."""
    epochs = recipes.resolve({STEPS: -1, "train.training-arguments.num-train-epochs": 1.0})
    exact = dataclasses.replace(site, tell=dataclasses.replace(site.tell, figures="exact"))
    assert examples_of_a_visit(epochs, 129) == 129
    for count, taken in ((128, 128), (129, 128), (3, 16)):
        visiting = in_whole_steps(exact, epochs, {"train-examples": count})
        assert examples_of_a_visit(visiting, count) == taken
    steps = recipes.resolve({STEPS: 6})
    assert in_whole_steps(site, steps, {}) is steps


def test_the_epochs_that_a_site_refuses_do_not_count_its_examples(site: SiteFile) -> None:
    """13 roll calls, each halving what was left, told the exact number of training examples, and
    with another sequence length how many of them it cuts."""
    refused = []
    for rows, unlearnable in ((450, 0), (450, 40), (461, 3), (520, 0)):
        report = {"rows": rows, "empty-rows": 0, "duplicate-rows": 0}
        report["train-examples"] = rows - rows // 20 - unlearnable
        answers = []
        for epochs in range(50, 150):
            epoch = {STEPS: -1, BATCH: 4, "train.training-arguments.num-train-epochs": epochs / 100}
            config = recipes.resolve(epoch)
            visiting = in_whole_steps(site, config, report)
            asked = policy.asked_of(visiting, TARGETS, report["train-examples"])
            answers.append(list(policy.objections(site, asked)))
        refused.append(answers)
    assert refused[0][:10] != refused[0][-10:]
    assert all(answers == refused[0] for answers in refused)


@pytest.mark.parametrize("key", ["data.partition-by", "model.name", "run-directory"])
@pytest.mark.parametrize("text", ["x" * 4097, "\x1b[2J", "a\nb", "\ud800"])
def test_a_text_that_fills_the_log_or_writes_to_a_terminal_is_refused(
    site: SiteFile, key: str, text: str
) -> None:
    """A roll call with 350,000 times q_proj as target modules was answered, with 0.5 MB in the
    audit log."""
    policy.check_texts(site, recipes.resolve({key: "Blutdruck bei Säuglingen"}).flat())
    with pytest.raises(PolicyError, match=f"forbids this run: {key} ") as refused:
        policy.check_texts(site, recipes.resolve({}).flat() | {key: text})
    assert len(str(refused.value)) < 200
