"""Real processes on loopback: TLS, node keys, three sites with agents, and who is kept out."""

from __future__ import annotations

import grp
import importlib.metadata
import json
import os
import shlex
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import grandrounds
from grandrounds.cli import app
from grandrounds.data.formulary import base_path
from grandrounds.engines.deployment import (
    admissions,
    consortium_status,
    joining,
    keys,
    set_up,
    site_status,
)
from grandrounds.engines.deployment.server_checks import check_server
from grandrounds.server import admitted
from grandrounds.site.custody import audit, budget
from grandrounds.site.custody.state import opened
from grandrounds.site.private.accountant import epsilon_of
from grandrounds.site.private.mechanism import Mechanism
from tests.places import ROOT
from tests.real import (
    FORMULARY,
    Consortium,
    has,
    in_process,
    rounds_done,
    wait_for,
)
from tests.runs import adapter_bytes, metrics_of, read_json, summary_of

sys.path.append(str(ROOT / "benchmarks"))

import deployment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_three_sites_with_agents_learn_what_they_learn_in_process(tmp_path: Path) -> None:
    """TLS, node keys, one agent a site, four rounds: the same adapter as in process, bit for bit;
    the base is loaded once at each site; plain PEFT loads the adapter. Then a masked run, in which
    an agent and the SuperLink are killed while the sites answer for a sum: the exit code and one
    line say so, and how to go on. The resumption ends with the adapter of a rehearsal. Last, a
    private run until one site's budget ends, in which an agent and the SuperLink are killed, and
    whose resumption is a new run of Flower's, told in the metrics."""
    settings = {**FORMULARY, "num-server-rounds": 4, "strategy.connect-timeout-seconds": 120}
    settings["train.replay-examples"] = 0  # a site with a policy replays nothing
    in_process(settings, tmp_path / "plain")
    in_process({**settings, **MASKED}, tmp_path / "rehearsed")
    expected = adapter_bytes(tmp_path / "plain")
    few = {"policy__max_runs_per_day": 3, "secure__min_cohort": 3}
    with Consortium(tmp_path / "c", settings, **few) as consortium:
        consortium.share_roster()
        consortium.start_all()
        run = tmp_path / "c" / "run"
        assert_told_apart(deployment.timed_run(consortium, run, 4))
        said = consortium.log("run")
        files = list(consortium.home.glob("superlink.db*"))
        assert not any(b"NUMPY" in file.read_bytes() for file in files)  # no update is left

        cut = tmp_path / "c" / "cut"
        process = consortium.begin_run(cut, 1, **MASKED)
        wait_for(lambda: sums(consortium, 1) or process.poll() is not None, 240)
        consortium.kill("superlink")
        consortium.kill("agent1")
        assert consortium.finished(process) == 1
        of_the_cut = consortium.log("cut")
        consortium.start_agent(1)
        consortium.start_superlink()
        resumed = consortium.resume_run(cut)
        assert consortium.finished(resumed) == 0, consortium.log("cut-resumed")
        private = private_run(consortium)
    assert_private(consortium, private)
    assert "status             completed after 4 rounds" in said
    assert "unverified" not in said
    assert "each site's own, 3 sites" in said
    assert "site-0, site-1, site-2" in said  # as admitted
    assert "leaderboard" not in said
    assert "evaluate" not in said  # its questions would be about the formulary's drugs
    assert "--rounds 8 --engine deployment --connection trial" in said
    assert "each site's own, 3 sites" in (run / "peft_4" / "README.md").read_text()
    summary, plain = summary_of(run), summary_of(tmp_path / "plain")
    assert summary["base_loads"] == summary["processes"] == 3
    assert summary["failed_replies"] == 0
    totals = (read_json(folder / "plan.json")["totals"] for folder in (run, tmp_path / "plain"))
    three, one = (kinds.pop("formulary.down") for kinds in totals)
    assert three["tensor_bytes"] == 3 * one["tensor_bytes"]  # the exam, at each of the three
    more_mib = 2 * one["tensor_bytes"] / 2**20
    assert summary["communication_mib"] == summary["planned_mib"]
    assert summary["planned_mib"] == pytest.approx(plain["planned_mib"] + more_mib, abs=1e-9)
    learned, in_one_process = (
        s["formulary"]["private"]["tuned"]["correct"] / s["formulary"]["private"]["tuned"]["n"]
        for s in (summary, plain)
    )
    assert abs(learned - in_one_process) <= 0.03
    assert adapter_bytes(run) == expected
    base = AutoModelForCausalLM.from_pretrained(base_path())
    PeftModel.from_pretrained(base, run / "peft_4")
    for site in consortium.sites:
        visits = [e for e in audit.read(site.place("state")) if e["asked"] == "train"]
        assert [e["round"] for e in visits][:4] == [1, 2, 3, 4]
    assert len({line["flower-run"] for line in metrics_of(run)[1:]}) == 1

    assert "is lost" in of_the_cut
    assert f"run --resume {cut} --engine deployment --connection trial" in of_the_cut
    assert "Traceback" not in of_the_cut
    lines = metrics_of(cut)[1:]
    assert [(line["round"], line["masked-sum"]["attempts"]) for line in lines] == [(1, 1)]
    assert adapter_bytes(cut) == adapter_bytes(tmp_path / "rehearsed")
    for i in range(3):
        assert sums(consortium, 1, i) == [[0, 1, 2]]


MASKED = {
    "secure-aggregation": "masked32",
    "strategy.weighting": "equal",  # sites tell rounded numbers of examples
    "num-server-rounds": 1,
}


def sums(consortium: Consortium, number: int, site: int = 0) -> list[list[int]]:
    """Return the different sets of survivors for which a site has answered in a round."""
    folder = consortium.sites[site].place("state")
    return [
        list(survivors)
        for survivors in {
            tuple(line["survivors"])
            for line in audit.read(folder)
            if (line["asked"], line["outcome"], line["round"])
            == ("train.unmask", "answered", number)
        }
    ]


def assert_told_apart(rounds: list[dict[str, float]]) -> None:
    """What a round is made of, as benchmarks/deployment.py tells it from the processes' logs."""
    for parts in rounds:
        assert parts["round"] == pytest.approx(sum(parts.values()) - parts["round"])
    for name in ("visit", "polling", "transfer", "start"):
        assert sum(parts[name] for parts in rounds) > 0, name


MECHANISM = Mechanism(8.0, 0.1, 16 / 500, 500, steps=12, visits=4, delta=1e-5)
"""Of each visit to three sites that declare 500 units."""


def private_run(consortium: Consortium) -> Path:
    """Train privately on three sites, of which the last has a budget for two visits.

    An agent is killed between charge and reply, and the SuperLink in the round after the budget
    ended; the run is resumed.
    """
    for i, site in enumerate(consortium.sites):
        text = site.path.read_text()
        most = epsilon_of(MECHANISM, 2 if i == 2 else 4) * 1.0001
        values = {"require": "example", "declared-units": 500, "epsilon-of-run": most}
        for key, value in values.items():
            text = set_up.with_value(text, "privacy", key, value)
        site.path.write_text(text)
    run = consortium.folder / "private"
    asked = {
        "privacy.unit-guarantee": "example",
        "privacy.noise-multiplier": MECHANISM.noise_multiplier,
        "privacy.clipping-norm": MECHANISM.clipping_norm,
        "train.training-arguments.max-steps": MECHANISM.steps,
        "strategy.min-sites": 2,
    }
    process = consortium.begin_run(run, 4, **asked)
    state = consortium.sites[1].place("state") / "site.sqlite"

    def is_charged() -> bool:
        with closing(sqlite3.connect(state, timeout=5)) as table:
            found = table.execute("select count(*) from coins").fetchone()
        return bool(found[0]) or process.poll() is not None

    wait_for(is_charged, 240, "no visit was charged")
    consortium.kill("agent1")
    consortium.start_agent(1)
    wait_for(
        lambda: rounds_done(run) >= 2 or process.poll() is not None, 240, consortium.log("private")
    )
    consortium.kill("superlink")
    assert consortium.finished(process) == 1
    consortium.start_superlink()
    resumed = consortium.resume_run(run)
    assert consortium.finished(resumed) == 0, consortium.log("private-resumed")
    return run


def assert_private(consortium: Consortium, run: Path) -> None:
    """Check that each visit was charged once, and that the run went on without the third site."""
    charged = []
    for site in consortium.sites:
        with opened(site.place("state")) as state:
            [found] = budget.read(site, state).runs.values()
            lines = state.table.execute("select entry from budget").fetchall()
        visits = [json.loads(line) for (line,) in lines]
        rounds = [visit["round"] for visit in visits if visit["kind"] == "visit"]
        charged.append((rounds, found.visits_left))
    assert charged == [([1, 2, 3, 4], 0), ([1, 2, 3, 4], 0), ([1, 2], 0)]
    private = summary_of(run)["privacy"]
    assert private["mode"] == "enforced"
    assert "2" in private["budget_spent"]
    expected = {"0": 4, "1": 4, "2": 2}
    for site, visits in expected.items():
        assert private["epsilon_by_site"][site] == pytest.approx(epsilon_of(MECHANISM, visits))
    lines = metrics_of(run)
    assert [line["good"] for line in lines[1:]] == [[0, 1, 2], [0, 1, 2], [0, 1], [0, 1]]
    assert len({line["flower-run"] for line in lines[1:]}) == 2
    assert "trains no more: its privacy budget is spent" in consortium.log("private-resumed")


def test_who_is_not_admitted_is_kept_out_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unregistered key, a server that the site's authority does not vouch for, a key that was
    replaced and one that was revoked."""
    settings = {**FORMULARY, "data.num-partitions": 2}
    with Consortium(tmp_path / "c", settings) as consortium:
        consortium.start_superlink()
        consortium.register(0)
        consortium.start_supernode(1)
        stranger = consortium.running["node1"]
        assert stranger.wait(60) != 0
        assert "Failed to initialize the connection" in consortium.log("node1")
        other = set_up.init_consortium(tmp_path / "other", "other", "127.0.0.1", 1)
        (consortium.sites[0].path.parent / "ca.crt").write_bytes((other / "ca.crt").read_bytes())
        consortium.start_supernode(0)
        wait_for(
            lambda: "certificate" in consortium.log("node0").lower(), 60, consortium.log("node0")
        )
        nodes = consortium.flwr("supernode", "list", "trial")
        assert {node["status"] for node in nodes["nodes"]} == {"registered"}, nodes
        check = [sys.executable, "-m", "grandrounds", "site", "check", "--config"]
        for i, told in ((0, "is not valid ("), (1, "the server rejects this node")):
            done = subprocess.run(
                [*check, str(consortium.sites[i].path)],
                env=consortium.environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 1
            assert told in done.stdout

        monkeypatch.setenv("FLWR_HOME", consortium.environment["FLWR_HOME"])
        consortium.kill("node0")

        def known() -> set[int]:
            listed = consortium.flwr("supernode", "list", "trial")["nodes"]
            return {int(n["node-id"]) for n in listed if n["status"] != "unregistered"}

        def run(*words: object) -> None:
            done = CliRunner().invoke(app, [str(word) for word in ("consortium", *words)])
            assert done.exit_code == 0, done.output

        of = ("--connection", "trial", "--dir", consortium.home)
        [before] = known()
        request = joining.rotate_key(consortium.sites[0])
        key = keys.fingerprint(admissions.read_request(request).key)
        numbers = ("--partition-id", 0, "--num-partitions", 2, "--fingerprint", key)
        run("admit", request, *numbers, *of)
        [after] = known()
        assert after != before
        assert admitted.registered_nodes(consortium.home) == {0: after}
        run("revoke", "site-0", *of)
        assert known() == set()
        assert [e["node-id"] for e in admitted.revocations(consortium.home)] == [str(after)]


def test_without_an_agent_a_site_answers_too_and_says_what_it_costs(tmp_path: Path) -> None:
    """And the exit code of a second run tells that the site's policy forbids it."""
    settings = {**FORMULARY, "data.num-partitions": 1}
    with Consortium(tmp_path / "c", settings, policy__max_runs_per_day=2) as consortium:
        consortium.start_all(agents=False)
        run = tmp_path / "c" / "run"
        assert_told_apart(deployment.timed_run(consortium, run, 1))
        assert "the base model was loaded again for this message" in consortium.log("node0")
        [site] = consortium.sites
        wait_for(lambda: site_status.look(site)["supernode"]["connected"], 60)  # 30 s, settled
        [problem] = site_status.look(site)["problems"]
        assert problem.startswith("the agent does not listen")
        asked = [
            finding.level for finding in check_server(site) if finding.subject == "registration"
        ]
        assert asked == ["ok"]  # and once more, since it is connected
        of_all = consortium_status.look(consortium.home, None)
        assert of_all["problems"] == []
        assert [(m["status"], m["last-round"]) for m in of_all["members"]] == [("online", 1)]
        assert (of_all["last-run"]["round"], of_all["last-run"]["status"]) == (1, "completed")
        forbidden = tmp_path / "c" / "forbidden"
        process = consortium.begin_run(forbidden, 2, **{"model.lora.peft-lora-r": 128})
        assert consortium.finished(process) == 1
        said = consortium.log("forbidden")
        assert "max-rank = 64, requested 128" in said
        assert "Traceback" not in said
        assert "--resume" not in said
        assert not forbidden.exists()
    summary = summary_of(run)
    assert summary["base_loads"] == summary["processes"] == 2  # one visit, one exam
    outcomes = [e["outcome"] for e in audit.read(site.place("state"))]
    assert outcomes == ["answered"] * 3 + ["refused"]


NOBODY = 65534


def mounts_are_permitted() -> bool:
    """Whether this test may bind folders in a mount namespace, and become another user."""
    if os.getuid() != 0 or not has("unshare", "setpriv", "mount"):
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may pass through; pytest's own are their owner's alone."""
    with tempfile.TemporaryDirectory(prefix="grandrounds-test-", dir="/var/tmp") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


def as_its_unit_does(place: Path, unit: Path) -> list[str]:
    """Return the words before a command that run it as a SuperNode's unit does, by the user nobody.

    With the unit's environment and, as its sandbox has it, a /tmp of its own and nothing else that
    can be written. This interpreter, its packages and this checkout may lie where nobody can look:
    they are bound into a folder of the command's own, with Flower's programs beside them.
    """
    python, packages, checkout = (place / name for name in ("python", "packages", "checkout"))
    bound = {
        python: Path(sys.base_prefix),
        packages: Path(sysconfig.get_path("purelib")),
        checkout: Path(grandrounds.__file__).parents[1],
    }
    for folder in (place, *bound, place / "bin"):
        folder.mkdir(mode=0o755, parents=True)
    executable = python / "bin" / Path(os.path.realpath(sys.executable)).name
    for entry in importlib.metadata.distribution("flwr").entry_points.select(
        group="console_scripts"
    ):
        script = place / "bin" / entry.name
        script.write_text(
            f"#!{executable}\nimport sys\nfrom {entry.module} import {entry.attr}\n"
            f"sys.exit({entry.attr}())\n"
        )
        script.chmod(0o755)
    lines = unit.read_text().splitlines()
    given = [line.partition("=")[2] for line in lines if line.startswith("Environment=")]
    values = [
        *(word for words in given for word in shlex.split(words)),
        f"PATH={place / 'bin'}:/usr/bin:/bin",
        f"PYTHONPATH={checkout}:{packages}",
        f"LD_LIBRARY_PATH={python / 'lib'}",
    ]
    mounts = [f"mount --bind {shlex.quote(str(a))} {b}" for b, a in bound.items()]
    mounts += ["mount -t tmpfs -o mode=1777 tmpfs /tmp", "mount -o remount,bind,ro /"]
    become = f"setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups --no-new-privs"
    shell = " && ".join([*mounts, "cd /tmp", f'exec {become} env -i {shlex.join(values)} "$@"'])
    return ["unshare", "-m", "sh", "-c", shell, "sh"]


@pytest.mark.skipif(not mounts_are_permitted(), reason="needs root and mount namespaces")
def test_a_site_as_it_is_deployed(public: Path) -> None:
    """The SuperNode's user, as whom the code of a run is executed, can read neither data nor state;
    where there is nginx, it comes through the gate."""
    settings = {**FORMULARY, "data.num-partitions": 1}
    group, gate = grp.getgrgid(NOBODY).gr_name, has("nginx")
    with Consortium(public / "c", settings, gate=gate, agent__socket_group=group) as consortium:
        (public / "c").chmod(0o711)
        [site] = consortium.sites
        folder = site.path.parent
        (folder / "cards.jsonl").chmod(0o600)
        consortium.start_superlink()
        consortium.register(0)
        if gate:
            consortium.start_gate()
            assert site.node.superlink == f"127.0.0.1:{consortium.port}"
        check = [sys.executable, "-m", "grandrounds", "site", "check", "--config", str(site.path)]
        checked = subprocess.run(check, env=consortium.environment, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
        assert {line.split()[0] for line in checked.stdout.splitlines()} == {"ok"}

        os.chown(folder / "node.key", NOBODY, NOBODY)
        before = as_its_unit_does(public / "unit", folder / "supernode.service")
        for name, can_read in (("ca.crt", True), ("cards.jsonl", False), ("site.toml", False)):
            reading = subprocess.run([*before, "cat", str(folder / name)], capture_output=True)
            assert (reading.returncode == 0) == can_read, reading.stderr
        consortium.start_agent(0, seeded=False)
        look = subprocess.run([*before, "ls", str(folder / "state")], capture_output=True)
        assert look.returncode != 0
        assert b"Permission denied" in look.stderr
        _, *words = consortium.supernode_command(0)
        consortium.start("node0", [*before, "flower-supernode", *words])
        run = public / "c" / "run"
        process = consortium.begin_run(run, 1, **{"strategy.fraction-evaluate": 1.0})
        assert consortium.finished(process) == 0, consortium.log("run") + consortium.log("node0")
        owner = consortium.running["node0"].pid
        assert Path(f"/proc/{owner}").stat().st_uid == NOBODY
    assert summary_of(run)["base_loads"] == 1
    before, after = (line["held-out-loss"] for line in metrics_of(run))
    assert 0 < after <= before == round(before, 2)  # as the site tells it: one round may not show
