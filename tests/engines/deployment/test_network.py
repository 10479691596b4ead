"""Three sites in network namespaces: links cut, processes killed, and every run ends finished.

Each test prints how many rounds were played again.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grandrounds.site.custody import audit
from tests.conftest import make_base, write_flashcards
from tests.real import (
    FORMULARY,
    Consortium,
    has,
    rounds_done,
    wait_for,
)
from tests.runs import metrics_of, summary_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def ip(*words: str) -> None:
    """Run the command `ip`."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stderr)


def can_make_namespaces() -> bool:
    if not has("ip") or os.getuid() != 0:
        return False
    name = f"gr{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name]).returncode == 0


needs_namespaces = pytest.mark.skipif(
    not can_make_namespaces(), reason="network namespaces are not permitted here (iproute2, root)"
)


class Network:
    """A bridge on this machine, and a namespace with a link to it for each site."""

    def __init__(self, count: int) -> None:
        self.key = secrets.token_hex(2)
        third = 64 + secrets.randbelow(128)
        self.prefix = f"10.{77 + secrets.randbelow(100)}.{third}"
        self.host = f"{self.prefix}.1"
        self.names = [f"gr{self.key}n{i}" for i in range(count)]
        self.links = [f"gr{self.key}v{i}" for i in range(count)]
        self.bridge = f"gr{self.key}b"

    def __enter__(self) -> Network:
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{self.host}/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        for i, (name, link) in enumerate(zip(self.names, self.links, strict=True)):
            ip("netns", "add", name)
            ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", link, "master", self.bridge, "up")
            ip("-n", name, "addr", "add", f"{self.prefix}.{10 + i}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)

    @property
    def inside(self) -> list[list[str]]:
        """The words before a command that runs it at a site."""
        return [["ip", "netns", "exec", name] for name in self.names]

    def cut(self, i: int) -> None:
        """Take a site's link down."""
        ip("link", "set", self.links[i], "down")

    def restore(self, i: int) -> None:
        """Bring it up again."""
        ip("link", "set", self.links[i], "up")

    def bytes_of(self, i: int) -> tuple[int, int]:
        """Return the bytes that went to a site and came from it, as its interface counts."""
        folder = Path("/sys/class/net") / self.links[i] / "statistics"
        sent, received = ((folder / f"{way}_bytes").read_text() for way in ("tx", "rx"))
        return int(sent), int(received)


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(3) as made:
        yield made


PATIENT: dict[str, Any] = {
    "strategy.min-reply-fraction": 0.5,
    "strategy.round-timeout-seconds": 25,
    "strategy.connect-timeout-seconds": 120,
}


def repeated(consortium: Consortium) -> int:
    """Return how many times a site was given a round that it had trained before."""
    again = 0
    for site in consortium.sites:
        rounds = [
            (entry["run"], entry["round"])
            for entry in audit.read(site.place("state"))
            if entry["asked"] == "train" and entry["outcome"] == "answered"
        ]
        again += len(rounds) - len(set(rounds))
    return again


@needs_namespaces
def test_links_and_processes_that_fail_in_mid_run_do_not_end_it(
    tmp_path: Path, network: Network, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one run of ten rounds: the link of site 2 is cut and restored, the SuperNode of site 1
    is killed and started again, the agent of site 0 is killed and started again. Every round ends
    with those who answered, and all three take part again afterwards."""
    settings = {**FORMULARY, **PATIENT}
    with Consortium(
        tmp_path / "c", settings, host=network.host, outside=network.inside
    ) as consortium:
        consortium.start_all()
        run = tmp_path / "c" / "run"
        process = consortium.begin_run(run, 10)

        def reaches(number: int) -> None:
            wait_for(
                lambda: rounds_done(run) >= number or process.poll() is not None,
                180,
                consortium.log("run"),
            )
            assert process.poll() is None, consortium.log("run")

        reaches(1)
        network.cut(2)
        time.sleep(4)
        network.restore(2)
        reaches(3)
        consortium.kill("node1")
        consortium.restart_supernode(1)
        back = rounds_done(run) + 1  # the round that is played now may have begun without it
        reaches(back + 1)
        consortium.kill("agent0")
        time.sleep(2)
        consortium.start_agent(0)
        assert consortium.finished(process, 300) == 0, consortium.log("run")
        again = repeated(consortium)
    lines = metrics_of(run)[1:]
    assert [line["round"] for line in lines] == list(range(1, 11))
    assert all(len(line["good"]) >= 2 for line in lines)
    assert lines[-1]["good"] == [0, 1, 2]
    summary = summary_of(run)
    assert summary["status"] == "completed"
    with capsys.disabled():
        failed = {line["round"]: line["failed"] for line in lines if line["failed"]}
        late = summary["late_replies"]
        print(f"\n  visits made again: {again}; failed: {failed}; late replies: {late}")


@needs_namespaces
def test_the_ledger_is_what_the_interfaces_carry(
    tmp_path: Path, network: Network, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter of 14 MB. What the link carries beyond the ledger is TLS, HTTP, acknowledgements
    and Flower's polling; the last is measured on the idle link and taken off."""
    base = make_base(tmp_path / "base", layers=4, hidden=256)
    cards = write_flashcards(tmp_path / "cards.jsonl", 120)
    settings = {
        **FORMULARY,
        **PATIENT,
        "strategy.round-timeout-seconds": 120,
        "model.name": str(base),
        "static.dataset.name": str(cards),
        "model.lora.target-modules": "all-linear",
        "model.lora.peft-lora-r": 208,
        "train.training-arguments.max-steps": 1,
        "train.training-arguments.per-device-train-batch-size": 4,
    }
    with Consortium(
        tmp_path / "c",
        settings,
        host=network.host,
        outside=network.inside,
        policy__max_rank=512,
    ) as consortium:
        consortium.start_all()
        time.sleep(3)
        idle_from, started = network.bytes_of(0), time.monotonic()
        time.sleep(9)
        idle = sum(network.bytes_of(0)) - sum(idle_from)
        idle_per_second = idle / (time.monotonic() - started)
        before, started = [network.bytes_of(i) for i in range(3)], time.monotonic()
        run = tmp_path / "c" / "run"
        assert consortium.finished(consortium.begin_run(run, 2)) == 0, consortium.log("run")
        seconds = time.monotonic() - started
        after = [network.bytes_of(i) for i in range(3)]
    ledger = json.loads((run / "ledger.json").read_text())["totals"]
    counted = sum(traffic["tensor_bytes"] for traffic in ledger.values())
    carried = sum(sum(a) - sum(b) for a, b in zip(after, before, strict=True))
    polling = 3 * idle_per_second * seconds
    assert counted / 12 > 13e6  # three sites, two rounds, both ways
    share = (carried - counted) / counted
    with capsys.disabled():
        print(
            f"\n  ledger {counted / 1e6:.1f} MB, interfaces {carried / 1e6:.1f} MB "
            f"({100 * share:.2f} % more), of which polling {polling / 1e6:.2f} MB"
        )
    assert 0 < share < 0.05
