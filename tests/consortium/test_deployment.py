"""Real processes on loopback: TLS, node keys, three sites with agents, and who is kept out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from grandrounds.consortium import audit, set_up
from grandrounds.formulary import base_path
from tests.consortium.real import (
    FORMULARY,
    Consortium,
    in_process,
    metrics_of,
    summary_of,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_three_sites_with_agents_learn_what_they_learn_in_process(tmp_path: Path) -> None:
    """TLS, node keys, one agent a site, six rounds: the same adapter as in process, bit for bit, so
    the private facts are learned as well; the base is loaded once at each site; plain PEFT loads
    the adapter."""
    settings = {**FORMULARY, "num-server-rounds": 6, "strategy.fraction-evaluate": 0.34}
    in_process(settings, tmp_path / "plain")
    with Consortium(tmp_path / "c", settings) as consortium:
        consortium.start_all()
        run = tmp_path / "c" / "run"
        process = consortium.begin_run(run, 6)
        assert consortium.finished(process) == 0, consortium.log("run")
        said = consortium.log("run")
    assert "status             completed after 6 rounds" in said
    summary, plain = summary_of(run), summary_of(tmp_path / "plain")
    assert summary["base_loads"] == summary["processes"] == 3
    assert summary["failed_replies"] == 0
    assert summary["communication_mib"] == summary["planned_mib"] == plain["communication_mib"]
    learned, expected = (
        s["formulary"]["private"]["tuned"]["correct"] / s["formulary"]["private"]["tuned"]["n"]
        for s in (summary, plain)
    )
    assert abs(learned - expected) <= 0.03
    adapters = [r / "peft_6" / "adapter_model.safetensors" for r in (run, tmp_path / "plain")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    base = AutoModelForCausalLM.from_pretrained(base_path())
    PeftModel.from_pretrained(base, run / "peft_6")
    for site in consortium.sites:
        visits = [e for e in audit.read(site.place("state")) if e["asked"] == "train"]
        assert [e["round"] for e in visits] == [1, 2, 3, 4, 5, 6]
    assert len({line["flower-run"] for line in metrics_of(run)[1:]}) == 1


def test_who_is_not_admitted_is_kept_out_and_says_why(tmp_path: Path) -> None:
    """An unregistered key, and a server that the site's authority does not vouch for."""
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
        for i, told in ((0, "is not accepted"), (1, "the server does not take this node")):
            done = subprocess.run(
                [*check, str(consortium.sites[i].path)],
                env=consortium.environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 1
            assert told in done.stdout


def test_without_an_agent_a_site_answers_too_and_says_what_it_costs(tmp_path: Path) -> None:
    settings = {**FORMULARY, "data.num-partitions": 1}
    with Consortium(tmp_path / "c", settings) as consortium:
        consortium.start_all(agents=False)
        run = tmp_path / "c" / "run"
        process = consortium.begin_run(run, 2)
        assert consortium.finished(process) == 0, consortium.log("run")
        assert "the base model was loaded again for this message" in consortium.log("node0")
        [site] = consortium.sites
    summary = summary_of(run)
    assert summary["base_loads"] == summary["processes"] == 3  # two visits, one exam
    outcomes = [e["outcome"] for e in audit.read(site.place("state"))]
    assert outcomes == ["answered"] * 4


def test_the_exit_code_tells_that_a_site_forbade_the_run(tmp_path: Path) -> None:
    settings = {**FORMULARY, "data.num-partitions": 1}
    with Consortium(tmp_path / "c", settings, policy__max_rank=2) as consortium:
        consortium.start_all()
        run = tmp_path / "c" / "run"
        process = consortium.begin_run(run, 2)
        assert consortium.finished(process) == 1
        said = consortium.log("run")
        assert "max-rank = 2, it asks for 16" in said
        assert "Traceback" not in said
    assert not run.exists()


def nobody_can_run_python() -> bool:
    """Whether the user nobody can start this interpreter and read its packages."""
    if os.getuid() != 0:
        return False
    if (child := os.fork()) == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        paths = [os.path.realpath(sys.executable), *filter(None, sys.path)]
        os._exit(0 if all(os.access(p, os.R_OK) for p in paths if "/" in p) else 1)
    return os.waitpid(child, 0)[1] == 0
