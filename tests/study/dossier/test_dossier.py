"""What a dossier says, that each line leads to its file, and what its verification refutes."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import grandrounds as gr
from grandrounds.cli import app
from grandrounds.config import recipes
from grandrounds.engines.deployment import keys
from grandrounds.errors import DataError, GrandRoundsError, RunDirectoryError
from grandrounds.server.packages import PACKAGES, installed
from grandrounds.study.dossier.build import dossier_of
from grandrounds.study.dossier.lines import NOT_RECORDED, digest_of
from grandrounds.study.dossier.page import content_inside
from grandrounds.study.dossier.verify import verify
from grandrounds.study.dossier.written import write_dossier
from grandrounds.study.report.one_run import run_page
from grandrounds.study.report.read import read_run
from scripts.check_figures.dossier_rules import check_dossier
from tests.runs import Settings, copy_of, play
from tests.study.report.run_files import evaluation, write, write_run

PERSONAL = {
    "name": "local-tail",
    "sites": {"0": {"weight": 0.5, "personal": 1.0, "federated": 1.5}, "1": {}},
    "failed": {"2": "no reply within 5 s"},
    "mean": {"federated": 1.5, "personal": 1.0},
    "spread": {"federated": 0.0, "personal": 0.0},
    "worst": {"site": 0, "federated": 1.5, "personal": 1.0},
    "better": 1,
    "worse": 0,
}

GUARANTEE = {
    "mode": "enforced",
    "unit": "patient",
    "adjacency": "add or remove one unit",
    "epsilon": 3.25,
    "epsilon_by_site": {"0": 3.25, "1": None},
    "reserved_epsilon": 6.5,
    "delta": 1e-5,
    "noise_multiplier": 0.8,
    "sites_without_guarantee": [2],
    "budget_spent": [],
}

AUDIT = {
    "recipe-sha256": "ab" * 32,
    "claimed-epsilon": 3.25,
    "at-least-epsilon": 0.5,
    "membership": {
        "auc": 0.52,
        "auc-interval": [0.4, 0.6],
        "tpr-at-fpr": [{"fpr": 0.01, "tpr": 0.1}],
    },
    "extraction": {"in": {"matches": 1, "canaries": 10}},
}


def dossier(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["dossier", *map(str, arguments)])


def lines_of(run: Path) -> dict[str, str]:
    """Return section and item → value of a run's dossier."""
    return {f"{s.key}: {one.item}": one.value for s, one in dossier_of(run).lines()}


def changed(file: Path, **changes: Any) -> None:
    """Change keys of a JSON object."""
    write(file, {**json.loads(file.read_text()), **changes})


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A run with everything that a run directory can have."""
    run = write_run(tmp_path / "full")
    changed(run / "summary.json", personal=PERSONAL, privacy=GUARANTEE, failed_replies=1)
    write(run / "privacy-audit.json", AUDIT)
    write(run / "evaluation" / "evaluation.json", evaluation())
    write(run / PACKAGES, {"packages": installed()[:3]})
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["held-out-losses"] = {"0": 1.0 / (1 + line["round"]), "1": 1.25}
    lines[2]["refused"] = {"site 5": "its policy forbids the recipe"}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lost = {"status": "failed", "reason": "x", "after-round": 2, "communication-mib": 0.5}
    lost |= {"cohort": [1], "good": [], "seconds": 1.0, "totals": {}}
    (run / "unfinished.jsonl").write_text(json.dumps(lost) + "\n")
    return run


def resolved(run: Path, file: str, at: str) -> Any:
    """Follow a pointer by rules of its own; an error if it leads nowhere."""
    text = (run / file).read_text() if file.endswith((".json", ".jsonl")) else ""
    if file == "config.toml" and at:
        return at.endswith(" (not in the file)") or tomllib.loads((run / file).read_text())[at]
    if not at:
        return True
    number, _, pointer = at.removeprefix("line ").partition(" ") if at[0] == "l" else ("", "", at)
    if number == "*":
        found: Any = [json.loads(line) for line in text.splitlines()]
        pointer = f"/*{pointer}"
    else:
        found = json.loads(text.splitlines()[int(number) - 1] if number else text)
    for part in filter(None, pointer.split("/")):
        key = part.replace("~1", "/").replace("~0", "~")
        if key == "*":
            found = {k: v for entry in found for k, v in entry.items()}
        else:
            found = found[int(key)] if isinstance(found, list) else found[key]
    return found


# --- Every line and its file ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["finished", "flora", "plain", "full"])
def test_every_line_leads_to_its_place_in_a_file(name: str, tmp_path: Path, full: Path) -> None:
    run = full if name == "full" else copy_of(name, tmp_path)
    found = dossier_of(run)
    count = 0
    for _, one in found.lines():
        assert one.sources
        for source in one.sources:
            if one.value == NOT_RECORDED:
                continue
            count += 1
            there = hashlib.sha256((run / source.file).read_bytes()).hexdigest()
            assert source.sha256 == there == found.files[source.file][0]
            resolved(run, source.file, source.at)
        assert one.value != NOT_RECORDED or one.how
    assert count > 60


def test_what_a_line_says_is_what_the_files_say(full: Path) -> None:
    """Worked out by hand from run_files.py: round r draws sites 3r to 3r+2 of 6; site 1 fails in
    round 2, so that not every update was used, and bytes are told by kind only."""
    said = lines_of(full)
    for item, value in {
        "run: status": "completed",
        "run: rounds": "4 of 4",
        "base: name": "formulary",
        "data: site 3": "train-examples 73, held-out-examples 4",
        "left: site 0": "2 updates (rounds 2, 4); 5 losses (rounds 0 to 4)",
        "left: train, from the sites": "12 messages, 6,291,456 bytes of tensors",
        "left: in a round that did not finish, line 1": "0.50 MiB, after round 2",
        "approval: refused before round 2: site 5": "its policy forbids the recipe",
        "privacy: differential privacy": "enforced by the sites",
        "privacy: epsilon spent, most of any site": "3.25",
        "privacy: epsilon spent, by site": "site 0: 3.25, site 1: not told",
        "privacy: sites without a guarantee": "site 2",
        "privacy: audit: AUC of membership": "0.52 (95 % interval 0.40 to 0.60)",
        "privacy: audit: epsilon is at least (95 %)": "0.5",
        "evaluation: Formulary (fictional), private, likelihood, base": (
            "50 of 100, 50.0 % (40.0 to 60.0 %)"
        ),
        "losses: held-out loss, round 4": "0.4000 nats per answer token",
        "sites: worst site, held-out loss of round 4": "site 1, 1.2500 nats per answer token",
        "sites: site 0, held-out loss": "1.0000 in round 0 → 0.2000 in round 4",
        "personal: worst site, federated → personal": "site 0, 1.5000 → 1.0000",
        "personal: site 2 has none": "no reply within 5 s",
        "checkpoints: failed, line 3, site 1": "no reply within 5 s",
        "versions: server: bitsandbytes": "not installed",
    }.items():
        assert said[item] == value, item


def test_bytes_of_a_site_are_told_where_all_updates_were_used(tmp_path: Path) -> None:
    """8 updates of 110,592 bytes in all: 13,824 each, of which site 0 sent two."""
    said = lines_of(copy_of("finished", tmp_path))
    assert said["left: site 0"] == "2 updates (rounds 2, 4), 27,648 bytes; 5 losses (rounds 0 to 4)"
    assert said["evaluation: exam, private facts, base"] == "69 of 300, 23.0 % (18.6 to 28.1 %)"
    assert said["forgetting: facts that the base knew"] == "100.0 % → 100.0 %, 0.0 points"


def test_figures_of_preferences_are_told_in_their_unit(tmp_path: Path) -> None:
    run = write_run(tmp_path / "pairs", **{"train.objective": "dpo"}, static__dataset__name="x")
    file = run / "metrics.jsonl"
    told = {"margin": -0.25, "preference-accuracy": 0.75, "ranking-accuracy": 0.5}
    told |= {"held-out-loss": 0.625, "held-out-losses": {"0": 0.625}}
    lines = [json.loads(line) | told for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = lines_of(run)
    assert said["losses: held-out loss, round 4"] == "0.6250 nats per pair"
    assert said["losses: held-out pairs, preference-accuracy, round 4"] == "75.0 %"
    assert said["losses: held-out pairs, ranking-accuracy, round 0"] == "50.0 %"
    assert said["losses: held-out pairs, margin against the base, round 4"] == "-0.2500, mean"
    assert said["sites: worst site, held-out loss of round 4"] == "site 0, 0.6250 nats per pair"


@pytest.mark.parametrize(
    "changes",
    [{"strategy.name": "rolora"}, {"strategy.name": "hetlora", "strategy.rank-decay": 0.5}],
    ids=["A and B in turn", "pruned ranks"],
)
def test_bytes_of_a_site_are_not_told_where_updates_differ_in_size(
    tmp_path: Path, changes: Settings
) -> None:
    """12 messages of half a MiB in the ledger, all used: their mean is no update's size."""
    run = write_run(tmp_path / "differing", **changes)
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines[1:]:
        line["good"] = line["cohort"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "bytes" not in lines_of(run)["left: site 0"]
    equal = recipes.to_toml(recipes.resolve({"data.num-partitions": 6}).recipe())
    (run / "config.toml").write_text(equal)
    assert "bytes" in lines_of(run)["left: site 0"]


def test_a_site_that_is_called_like_another_line_is_told_with_its_number(tmp_path: Path) -> None:
    run = copy_of("finished", tmp_path)
    sites = json.loads((run / "sites.json").read_text())
    write(run / "sites.json", [{**sites[0], "name": "sites"}, *sites[1:]])
    said = lines_of(run)
    assert said["data: sites"] == str(len(sites))
    assert said["data: sites (site 0)"].startswith("rows ")
    assert said["left: sites"].startswith("2 updates (rounds 2, 4)")


def test_what_is_missing_says_what_would_record_it(tmp_path: Path) -> None:
    found = dossier_of(write_run(tmp_path / "bare"))
    missing = {one.item: one.how for _, one in found.lines() if one.value == NOT_RECORDED}
    assert missing["audit"] == "grandrounds privacy audit RUN_DIR"
    assert missing["answers to benchmarks"] == "grandrounds evaluate RUN_DIR"
    assert "what the base knew" in missing
    assert "installed packages" in missing
    assert "policy hashes" in missing
    states = {(a.item, a.state) for a in found.answers}
    assert ("performance with intervals", NOT_RECORDED) in states
    assert ("metrics, and how answers were scored", "answered") in states  # by the held-out loss
    assert ("Universality: evaluation at several sites", NOT_RECORDED) in states
    assert ("ethics approval and informed consent, or their waiver", "open") in states


def test_an_item_is_answered_only_by_a_recorded_line(tmp_path: Path) -> None:
    """Without a loss, an exam or an evaluation nothing answers for metrics."""
    run = write_run(tmp_path / "silent")
    file = run / "metrics.jsonl"
    lines = [json.loads(line) | {"held-out-loss": None} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    states = {a.item: a.state for a in dossier_of(run).answers}
    assert states["metrics, and how answers were scored"] == NOT_RECORDED
    assert states["name and version of the language model"] == "answered"


def test_real_sites_are_told_from_a_rehearsal_and_the_roster_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", secure_aggregation="masked32")
    sites = json.loads((run / "sites.json").read_text())
    assert lines_of(run)["approval: policy hashes"] == NOT_RECORDED
    own = [
        {**site, "base-content": "cd" * 32, "name": f"ward {site['partition-id']}"}
        for site in sites
    ]
    own[1]["policy-sha256"] = "ab" * 32
    write(run / "sites.json", own)
    agents = [keys.new_key() for _ in own]
    listed = [
        {"name": f"ward {i}", "partition-id": i, "agent-key": keys.public_text(key.public_key())}
        for i, key in enumerate(agents)
    ]
    content = {"consortium": "trial", "serial": 3, "sites": listed}
    write(run / "roster.json", {"content": content, "signature": "x"})
    said = lines_of(run)
    assert said["approval: sites in their own custody"].startswith("6 of 6: ward 0, ward 1")
    assert said["approval: roster of agent keys: serial"] == "3, of trial"
    assert said["approval: policy of ward 1"] == "ab" * 32
    assert "approval: policy hashes" not in said
    fingerprint = keys.fingerprint(agents[2].public_key())
    assert said["approval: agent key of ward 2"] == fingerprint
    assert "masked32" in said["privacy: masked sums"]
    assert said["base: SHA-256 of its files at the sites"] == "cd" * 32
    assert not any("bytes" in v for k, v in said.items() if k.startswith("left: ward"))


def test_losses_by_subgroup_are_told(full: Path) -> None:
    group = {"held-out-loss": 0.75, "held-out-examples": 24, "sites": [0, 1]}
    found = {"columns": ["sex"], "groups": {"sex = f": group}, "silent": [3], "failed": {"2": "x"}}
    changed(full / "summary.json", subgroups=found)
    said = lines_of(full)
    assert said["subgroups: sex = f"] == "0.7500 nats per answer token, 24 examples at 2 sites"
    assert said["subgroups: sites that told none"] == "site 3"
    assert said["subgroups: site 2 failed"] == "x"
    assert said["evaluation: how, likelihood"] == "no settings"
    states = {a.item: a.state for a in dossier_of(full).answers}
    assert states["Fairness: evaluation by groups of patients"] == "answered"


@pytest.mark.slow
def test_writing_a_dossier_loads_neither_pytorch_nor_flower(full: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from grandrounds.study.dossier.written import "
        f"write_dossier; write_dossier(Path({str(full)!r})); "
        "print([m for m in ('torch', 'flwr', 'cryptography') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_bill_of_materials_has_every_package(full: Path) -> None:
    content = dossier_of(full).as_dict()
    [first, *_] = content["sbom"]["components"]
    recorded = json.loads((full / PACKAGES).read_text())["packages"]
    assert content["sbom"]["bomFormat"] == "CycloneDX"
    assert [c["name"] for c in content["sbom"]["components"]] == [p["name"] for p in recorded]
    assert first["purl"].startswith(f"pkg:pypi/{first['name'].lower().replace('_', '-')}@")
    assert first["properties"][0]["value"] == recorded[0]["record-sha256"]


def test_no_folder_of_this_machine_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", static__dataset__name=str(tmp_path / "cards.jsonl"))
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().replace("no reply within 5 s", f"no file {tmp_path}/a/b.json"))
    text = json.dumps(dossier_of(run).as_dict())
    assert str(tmp_path) not in text
    assert "no file b.json" in text


# --- The page -------------------------------------------------------------------------------------

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028"


def test_no_text_of_a_run_becomes_markup_and_nothing_is_requested(full: Path) -> None:
    file = full / "metrics.jsonl"
    file.write_text(file.read_text().replace("no reply within 5 s", EVIL.replace("\u2028", "")))
    sites = json.loads((full / "sites.json").read_text())
    write(full / "sites.json", [{**site, "name": f"<b>{EVIL}"} for site in sites])
    page = write_dossier(full).file.read_text()
    assert page.count("<script") == 1
    assert "<img" not in page
    assert "<b>" not in page
    assert verify(full, full / "dossier.html").holds
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    [style] = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'")
    linked = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith(("#", "data:,")) for link in linked)
    assert not re.search(r'style="|@import|url\(', page)


def test_page_and_json_say_the_same_and_are_the_same_each_time(full: Path, tmp_path: Path) -> None:
    first = write_dossier(full)
    again = write_dossier(full, tmp_path / "again.html")
    assert first.file.read_bytes() == again.file.read_bytes()
    assert first.json_file.read_bytes() == again.json_file.read_bytes()
    page, content = first.file.read_text(), json.loads(first.json_file.read_text())
    assert json.loads(content_inside(page)) == content
    assert content["digest"] == digest_of(content) == first.digest
    assert page.count('<tr id="') == sum(len(s["lines"]) for s in content["sections"])


def test_the_fields_of_people_are_empty(full: Path) -> None:
    page = write_dossier(full).file.read_text()
    [people] = re.findall(r'<section id="people">(.*?)</section>', page, re.DOTALL)
    cells = re.findall(r"<td>(.*?)</td>", people)
    assert cells
    assert not any(cells)


# --- Verification ---------------------------------------------------------------------------------


def test_a_changed_file_is_refuted_with_the_line_that_it_changes(full: Path) -> None:
    assert dossier(full).exit_code == 0
    for name in ("dossier.html", "dossier.json"):
        verified = dossier(full, "--verify", full / name)
        assert verified.exit_code == 0, verified.output
        assert verified.stdout.startswith("verified: ")
    file = full / "metrics.jsonl"
    file.write_text(file.read_text().replace('"held-out-loss": 0.4', '"held-out-loss": 0.3'))
    for name in ("dossier.html", "dossier.json"):
        refuted = dossier(full, "--verify", full / name)
        assert refuted.exit_code == 1
        assert "file metrics.jsonl: SHA-256 was " in refuted.stdout
        assert (
            "line Held-out loss, held-out loss, round 4: was '0.4000 nats per answer token', "
            "is '0.3000 nats per answer token'"
        ) in refuted.stdout
        assert refuted.stderr.count("\n") == 1
        assert "is refuted: 2 differences" in refuted.stderr


def test_a_file_that_came_or_went_is_refuted(full: Path) -> None:
    write_dossier(full)
    (full / "privacy-audit.json").unlink()
    found = "\n".join(verify(full, full / "dossier.json").findings)
    assert "file privacy-audit.json: it is not there" in found
    assert "line Privacy, audit: claimed epsilon: was '3.25', is no longer there" in found
    assert "line Privacy, audit: was not there, is 'not recorded'" in found
    (full / "summary.json").unlink()
    findings = verify(full, full / "dossier.json").findings
    assert any(finding.startswith("run: ") and "in progress" in finding for finding in findings)


def test_changed_weights_are_refuted(full: Path) -> None:
    write_dossier(full)
    (full / "peft_4" / "adapter_model.safetensors").write_bytes(b"other")
    found = "\n".join(verify(full, full / "dossier.html").findings)
    assert "file peft_4/adapter_model.safetensors" in found
    assert "line Checkpoints and failures, peft_4" in found


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("1.2500 nats", "0.2500 nats", "page: the line at #sites-1 was edited"),
        (
            "<h1>",
            "<p>Approved by the ethics board</p><h1>",
            "page: it was edited outside its lines",
        ),
        (">bytes</th>", ">Bytes</th>", "page: it was edited outside its lines"),
    ],
)
def test_an_edited_page_is_refuted(full: Path, old: str, new: str, told: str) -> None:
    file = write_dossier(full).file
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    findings = verify(full, file).findings
    assert any(finding.startswith(told) for finding in findings), findings


def test_an_edited_json_is_refuted_also_with_a_new_digest(full: Path) -> None:
    file = write_dossier(full).json_file
    text = file.read_text()
    file.write_text(text.replace("1.2500 nats", "0.2500 nats", 1))
    findings = verify(full, file).findings
    assert findings[0].startswith("dossier: it was edited")
    content = json.loads(file.read_text())
    content["digest"] = digest_of(content)
    write(file, content)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    [finding] = verify(full, file).findings
    assert finding.startswith("line Sites one by one, worst site")
    file.write_text(text.replace("{", '{"title": "x", ', 1))  # a key twice, of which one is read
    assert verify(full, file).findings == [
        "dossier: its JSON was edited, or written anew by something else"
    ]


@pytest.mark.parametrize("text", ["", "{}", "[]", "<html></html>", '{"format": "x"}', "\0"])
def test_what_is_no_dossier_is_told_in_one_line(full: Path, text: str, tmp_path: Path) -> None:
    file = tmp_path / "other.html"
    file.write_text(text)
    result = dossier(full, "--verify", file)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "is not a dossier that grandrounds wrote" in result.stderr


def test_other_rules_find_the_same_figures_and_an_edited_one(full: Path, tmp_path: Path) -> None:
    """scripts/check_figures shares nothing with the package."""
    for run in (full, copy_of("finished", tmp_path)):
        file = write_dossier(run).json_file
        sheet = check_dossier(run)
        assert sheet.findings == []
        assert sum(sheet.checked.values()) > 80
        text = file.read_text()
        for old, new in (("0.4000 nats", "0.4100 nats"), ('"/rounds"', '"/raunds"')):
            if old in text:
                file.write_text(text.replace(old, new))
                assert check_dossier(run).findings


# --- Bad input ------------------------------------------------------------------------------------


def refused(*arguments: object) -> str:
    """Return the message of a call that is refused in one line."""
    result = dossier(*arguments)
    assert result.exit_code in (1, 2), result.output
    assert result.stderr.startswith("grandrounds: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_a_run_in_progress_is_refused_in_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "going", status=None)
    assert "has no summary.json: the run is in progress, or was killed" in refused(run)
    assert not (run / "dossier.html").exists()


def test_a_failed_run_has_a_dossier(tmp_path: Path) -> None:
    run = write_run(tmp_path / "failed", rounds=2, planned=4, status="failed", reason="no site")
    said = lines_of(run)
    assert (said["run: status"], said["run: rounds"]) == ("failed", "2 of 4")
    assert said["run: reason"] == "no site"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ledger.json", None, "ledger.json is missing"),
        ("sites.json", "[{}]", "sites.json (an entry is not a site)"),
        ("metrics.jsonl", "{x}\n", "is damaged"),
        (
            "ledger.json",
            '{"communication_mib": "a", "totals": {}}',
            "ledger.json /communication_mib",
        ),
        ("summary.json", '{"status": 5, "rounds": 4}', "summary.json /status is '5', not a string"),
        ("packages.json", "{", "cannot be read as JSON"),
        ("packages.json", '{"packages": [{"name": 1}]}', "packages.json /packages/0/name"),
        ("privacy-audit.json", "[]", "privacy-audit.json"),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(
    full: Path, name: str, content: str | None, words: str
) -> None:
    (full / name).unlink()
    if content is not None:
        (full / name).write_text(content)
    assert words in refused(full)


EDITED: list[Any] = [None, "x", 5, [], {}, {"0": 5}, [{}], -1, {"a": {"b": None}}, 1.5, True]


@pytest.mark.slow
def test_no_edited_value_ends_in_a_traceback(full: Path) -> None:
    """One random value of one file is replaced by something else, 300 times."""
    draw = random.Random(0)
    names = ["summary.json", "sites.json", "ledger.json", "plan.json", "metrics.jsonl"]
    names += ["privacy-audit.json", "evaluation/evaluation.json", "environment.json", PACKAGES]
    whole = {name: (full / name).read_text() for name in names}
    told = []
    for _ in range(300):
        name = draw.choice(names)
        lines = whole[name].splitlines() if name.endswith("l") else [whole[name]]
        place = draw.randrange(len(lines))
        content = json.loads(lines[place])
        at = content
        while True:
            key: Any = draw.choice(list(at) if isinstance(at, dict) else range(len(at)))
            if not isinstance(at[key], dict | list) or not at[key] or draw.random() < 0.3:
                break
            at = at[key]
        at[key] = draw.choice(EDITED)
        lines[place] = json.dumps(content)
        (full / name).write_text("".join(f"{line}\n" for line in lines))
        try:
            dossier_of(full)
        except GrandRoundsError as error:
            told.append(str(error))
        (full / name).write_text(whole[name])
    assert len(told) > 50
    assert not any("\n" in text for text in told)


@pytest.mark.parametrize(
    ("personal", "words"),
    [
        ({"name": "local-tail"}, "KeyError 'sites'"),
        ({**PERSONAL, "worst": {}}, "KeyError 'federated'"),
        ({**PERSONAL, "better": "one"}, "a figure is no number"),
        ({**PERSONAL, "failed": {"2": 5}}, "a reason or the name is no text"),
        ([], "TypeError"),
    ],
)
def test_an_edited_entry_on_personal_adapters_is_told(
    full: Path, personal: Any, words: str
) -> None:
    """The report leaves it out and says so; the dossier is refused."""
    changed(full / "summary.json", personal=personal)
    [unread] = read_run(full).unread
    assert unread.startswith("summary.json, personal (not what a run writes: ")
    assert words in unread
    page = run_page(read_run(full))
    assert page.story[0] == f"Not readable: {unread}."
    assert not any(section.key == "personal" and section for section in page.sections)
    report = CliRunner().invoke(app, ["report", str(full)])
    assert report.exit_code == 0
    assert "not readable: summary.json, personal" in report.output
    assert "summary.json, personal" in refused(full)


def test_a_file_that_is_no_dossier_is_not_overwritten(full: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.html"
    own.write_text("mine")
    assert "is not a dossier of grandrounds, so it is not overwritten" in refused(
        full, "--out", own
    )
    assert own.read_text() == "mine"
    (tmp_path / "beside.json").write_text("{}")
    assert "beside.json exists" in refused(full, "--out", tmp_path / "beside.html")
    assert not (tmp_path / "beside.html").exists()


def test_options_that_exclude_each_other_are_told(full: Path, tmp_path: Path) -> None:
    assert "leave out --out" in refused(full, "--json", "--out", tmp_path / "a.html")
    assert "--verify writes nothing" in refused(full, "--verify", full, "--json")
    assert "is a folder" in refused(full, "--out", tmp_path)
    assert "the JSON is written beside it" in refused(full, "--out", tmp_path / "a.json")
    assert "has no config.toml" in refused(tmp_path)


def test_json_is_printed_and_nothing_is_written(full: Path) -> None:
    before = sorted(full.iterdir())
    printed = dossier(full, "--json")
    assert json.loads(printed.stdout)["digest"] == dossier_of(full).as_dict()["digest"]
    assert sorted(full.iterdir()) == before


def test_a_consortium_is_its_only_run(full: Path, tmp_path: Path) -> None:
    folder = tmp_path / "consortium"
    folder.mkdir()
    write(folder / "consortium.json", {"name": "trial", "superlink": "127.0.0.1:8001"})
    assert "Run directories in it: none" in refused(folder)
    shutil.copytree(full, folder / "run")
    assert dossier(folder).exit_code == 0
    assert verify(folder, folder / "run" / "dossier.html").holds
    shutil.copytree(full, folder / "second")
    assert "a dossier is of one run" in refused(folder)
    write(folder / "last-run.json", {"directory": str(folder / "second")})
    assert dossier(folder).exit_code == 0
    assert (folder / "second" / "dossier.html").is_file()


# --- The Python API, and a run from beginning to end ----------------------------------------------


def test_the_function_returns_what_was_written(full: Path, tmp_path: Path) -> None:
    filed = gr.dossier(full, out=tmp_path / "a.html")
    assert filed.path == tmp_path / "a.html"
    assert filed.content == json.loads((tmp_path / "a.json").read_text())
    assert filed.verify().holds
    assert filed.tables()[0].title == "Run"
    assert "summary.json /status" in filed._repr_html_()
    filed.path.write_text("x")
    with pytest.raises(DataError):
        filed.verify()
    with pytest.raises(RunDirectoryError):
        gr.dossier(tmp_path)


@pytest.mark.slow
def test_a_run_has_a_dossier_that_is_verified_then_refuted(settings: Settings) -> None:
    run = play(settings, **{"num-server-rounds": 2})
    written = dossier(run)
    assert written.exit_code == 0, written.output
    said = lines_of(run)
    torch = next(package for package in installed() if package["name"] == "torch")
    value = f"{torch['version']}, RECORD {torch['record-sha256']}"
    assert said["packages: torch"] == value
    assert said["run: rounds"] == "2 of 2"
    assert dossier(run, "--verify", run / "dossier.html").exit_code == 0
    file = run / "ledger.json"
    ledger = json.loads(file.read_text())
    ledger["totals"]["train.up"]["messages"] += 1
    write(file, ledger)
    refuted = dossier(run, "--verify", run / "dossier.html")
    assert refuted.exit_code == 1
    assert "line What left each site, train, from the sites: was '4 messages" in refuted.stdout
