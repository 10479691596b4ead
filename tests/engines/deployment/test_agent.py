"""The agent behind a real socket: who may speak to it, what it answers, what it holds."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import re
import socket
import ssl
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MessageType, RecordDict

from grandrounds import client_app
from grandrounds.config import recipes
from grandrounds.engines.deployment import agent as agents
from grandrounds.engines.deployment import connections, listening, node_app, set_up
from grandrounds.engines.in_process import InProcessGrid
from grandrounds.errors import ConfigError, EngineError, GrandRoundsError, ReplyError
from grandrounds.server import introductions
from grandrounds.site.custody import agent_client, audit
from grandrounds.site.custody import frames as wire
from grandrounds.site.custody.site_file import SiteFile, read_site_file
from grandrounds.wire import messages
from tests.own_sites import make_site, sites_of
from tests.real import wait_for
from tests.runs import Settings, adapter_bytes, grid_of, play


@contextmanager
def serving(site: SiteFile, **options: Any) -> Iterator[list[str]]:
    """Serve in a thread; yield what the agent says."""
    said: list[str] = []
    agent = agents.Agent(site, said.append, **options)
    thread = threading.Thread(target=agent.serve)
    thread.start()
    deadline = time.monotonic() + 10
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield said
    finally:
        agent.stop()
        thread.join(20)


def question(run: str = "ab") -> Message:
    return introductions.questions([1], run)[1]


def context_of(settings: Settings, node: dict[str, Any]) -> Context:
    flat = recipes.resolve(settings).flat()
    return Context(1, 1, {"partition-id": 0, "num-partitions": 4, **node}, RecordDict(), flat)


def at(site: SiteFile) -> dict[str, Any]:
    return {"agent": agents.place_of(site), "agent-wait-seconds": 0.2}


def asked(site: SiteFile, settings: Settings, message: Message | None = None) -> Message:
    """Return what the agent answers to a message."""
    return agent_client.forward(message or question(), context_of(settings, at(site)))


@pytest.fixture
def site(settings: Settings, tmp_path: Path) -> SiteFile:
    return sites_of(settings, tmp_path)[0]


@pytest.mark.usefixtures("by_the_runs_seed")
def test_a_run_through_agents_is_the_run_without_them_bit_for_bit(
    settings: Settings, tmp_path: Path
) -> None:
    """Each site has a process's agent of its own; here all four share one process, and its base."""
    plain = play(settings)
    own = {**settings, "run-directory": str(tmp_path / "through")}
    sites = sites_of(settings, tmp_path)
    grid = grid_of(recipes.resolve(own), node_app.app, [at(site) for site in sites])
    with serving(sites[0]), serving(sites[1]), serving(sites[2]), serving(sites[3]):
        through = play(own, grid=grid)
    assert adapter_bytes(through) == adapter_bytes(plain)


def test_the_socket_is_its_owners_alone_and_gone_afterwards(site: SiteFile) -> None:
    path = site.place(site.agent.socket)
    with serving(site) as said:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert said[0] == f"site 'site' listens on unix:{path}"
    assert not path.exists()
    assert said[-1] == "stopped"


def test_a_look_whether_an_agent_is_there_leaves_no_line(site: SiteFile) -> None:
    """`grandrounds site status` connects and says nothing."""
    with serving(site) as said:
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(site.place(site.agent.socket)))
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(site.place(site.agent.socket)))
            probe.sendall(b"half")
        wait_for(lambda: len(said) > 1, 10)
    early = [line for line in said if "closed early" in line]
    assert len(early) == 1
    assert "more since" not in early[0]


def test_a_second_agent_on_the_same_socket_is_told_and_one_left_behind_is_replaced(
    settings: Settings, site: SiteFile
) -> None:
    path = site.place(site.agent.socket)
    with serving(site), pytest.raises(ConfigError, match="another agent is listening there"):
        listening.unix_socket(site, path)
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    with serving(site):
        messages.raise_failure(asked(site, settings))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_cannot_connect_unless_a_group_is_named(
    settings: Settings, site: SiteFile, tmp_path: Path
) -> None:
    for folder in (site.path.parent, *site.path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o711)

    def connects(path: Path) -> bool:
        """Whether the user nobody can connect."""
        if (child := os.fork()) == 0:
            try:
                os.setgroups([65534])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                socket.socket(socket.AF_UNIX).connect(str(path))
            except BaseException:
                os._exit(1)
            os._exit(0)
        return os.waitpid(child, 0)[1] == 0

    with serving(site):
        assert not connects(site.place(site.agent.socket))
    text = site.path.read_text()
    group = grp.getgrgid(65534).gr_name
    site.path.write_text(set_up.with_value(text, "agent", "socket-group", group))
    with serving(read_site_file(site.path)):
        assert connects(site.place(site.agent.socket))


STAMPED = r"grandrounds: \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ "
VISIT = STAMPED + r"train, round 1: answered \(\d+\.\d s, run [0-9a-f]{1,8}\)"
"""A visit's line of the agent: time, kind, round, outcome, seconds, run."""


@pytest.mark.slow
def test_the_base_is_loaded_once_for_all_messages(settings: Settings, tmp_path: Path) -> None:
    """A process of its own, asked again and again by new connections."""
    [site, *_] = sites_of(settings, tmp_path, tell__telemetry=True)
    command = [sys.executable, "-m", "grandrounds", "site", "serve", "--config", str(site.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            *had, serving_line = (process.stdout.readline() for _ in range(3))
            assert "27 examples to train on, 3 held out" in had[0]
            assert re.fullmatch(rf"{STAMPED}base \S+: sha256 [0-9a-f]{{64}}\n", had[1])
            assert "listens on" in serving_line
            loads = []
            for _ in range(3):
                reply = asked(site, settings, training_message(settings, site))
                loads.append(messages.metrics_of(reply)["base-loads"])
            assert loads == [1, 1, 1]
        finally:
            process.terminate()
            said = process.stdout.read()
    assert process.returncode == 0
    visits = said.splitlines()
    assert len([line for line in visits if re.fullmatch(VISIT, line)]) == 3, said
    assert re.fullmatch(f"{STAMPED}stopped", visits[-1])


def training_message(settings: Settings, site: SiteFile) -> Message:
    """Return what the server sends in round 1."""
    from grandrounds.model.lora import adapter_layout
    from grandrounds.model.machine import specs
    from grandrounds.server.exchange import Exchange
    from grandrounds.wire.adapter import Ranks, drawn_adapter
    from grandrounds.wire.downlink import Sender
    from grandrounds.wire.ledger import Ledger
    from grandrounds.wire.schedule import round_learning_rate_of

    config = recipes.resolve(settings)
    _, lora = specs(config)
    shapes, _ = adapter_layout(config.model.name, lora)
    start = drawn_adapter(shapes, config.federation.seed)
    sender = Sender(Ranks.of(config), config.communication, start, config.federation.seed)
    parcel = sender.parcel(1, 0, start, trains=True)
    exchange = Exchange(InProcessGrid(client_app.app, {}, 1), Ledger(), "ab", 60)
    said = {"learning-rate": round_learning_rate_of(config, 1), "cursor": 0}
    return exchange.message(1, MessageType.TRAIN, 1, parcel, said)


def test_an_agent_that_is_not_there_is_waited_for_and_then_told(
    settings: Settings, site: SiteFile
) -> None:
    with pytest.raises(EngineError, match=r"is not running .* waited 0\.2 s.* site serve running"):
        asked(site, settings)


def test_an_agent_that_starts_late_or_again_still_answers(
    settings: Settings, site: SiteFile
) -> None:
    replies: list[Message] = []
    patient = {**at(site), "agent-wait-seconds": 20}
    thread = threading.Thread(
        target=lambda: replies.append(
            agent_client.forward(question(), context_of(settings, patient))
        )
    )
    thread.start()
    time.sleep(0.3)
    with serving(site):
        thread.join(20)
    messages.raise_failure(replies[0])


def test_an_agent_that_ends_in_mid_answer_is_asked_again(
    settings: Settings, site: SiteFile
) -> None:
    path = site.place(site.agent.socket)
    path.parent.mkdir(exist_ok=True)
    broken = socket.socket(socket.AF_UNIX)
    broken.bind(str(path))
    broken.listen()
    replies: list[Message] = []
    patient = {**at(site), "agent-wait-seconds": 1}
    thread = threading.Thread(
        target=lambda: replies.append(
            agent_client.forward(question(), context_of(settings, patient))
        )
    )
    thread.start()
    connection, _ = broken.accept()
    connection.recv(100)
    time.sleep(1.5)  # longer than it waits for an agent that is not there
    connection.close()
    broken.close()
    path.unlink()
    with serving(site):
        thread.join(20)
    messages.raise_failure(replies[0])


def test_what_a_policy_forbids_comes_back_in_words(settings: Settings, tmp_path: Path) -> None:
    [site, *_] = sites_of(settings, tmp_path, policy__max_rank=2)
    with serving(site) as said:
        reply = asked(site, settings)
    with pytest.raises(GrandRoundsError, match="max-rank = 2, requested 4"):
        messages.raise_failure(reply)
    assert any("max-rank = 2" in line for line in said)


def test_a_crash_ends_neither_the_agent_nor_tells_server_or_journal_more_than_its_kind(
    settings: Settings, site: SiteFile, capfd: pytest.CaptureFixture[str]
) -> None:
    """97ce3f5 printed the text, and so wrote it into the journal."""

    def crash(message: Message, context: Context) -> Message:
        raise ValueError("the patient's name is in here")

    with serving(site, visits={"query": crash}) as said:
        for _ in range(2):
            reply = asked(site, settings)
            assert reply.has_error()
            assert "ValueError" in str(reply.error.reason)
            assert "patient" not in str(reply.error.reason)
    assert sum("crashed: ValueError at ['test_agent.py:" in line for line in said) == 2
    crashed = audit.read(site.place("state"))
    assert [line["error"] for line in crashed] == ["ValueError"] * 2
    assert "patient" not in f"{said} {crashed} {capfd.readouterr()}"


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "its client is gone"])
def test_the_visit_in_progress_is_answered_and_the_one_that_waits_is_not_begun(
    settings: Settings, site: SiteFile, stopped: bool
) -> None:
    """The one that waits is left to the agent that comes next, or nobody asks for it any more."""
    begun: list[str] = []
    go_on = threading.Event()

    def slow(message: Message, context: Context) -> Message:
        begun.append(message.metadata.message_type)
        go_on.wait(20)
        return Message(messages.content(config={"partition-id": 0}), reply_to=message)

    replies: list[Message] = []
    agent = agents.Agent(site, lambda line: None, visits={"query": slow})
    server = threading.Thread(target=agent.serve)
    server.start()
    path = site.place(site.agent.socket)
    wait_for(path.exists, 10)
    first = threading.Thread(target=lambda: replies.append(asked(site, settings)))
    first.start()
    wait_for(lambda: begun, 10)
    second = socket.socket(socket.AF_UNIX)
    second.connect(str(path))
    second.sendall(wire.pack_request(question(), context_of(settings, {})))
    time.sleep(0.5)  # it waits for its turn now
    if stopped:
        agent.stop()
    else:
        second.close()
    go_on.set()
    first.join(20)
    time.sleep(0.2)
    agent.stop()
    server.join(20)
    second.close()
    messages.raise_failure(replies[0])
    assert len(begun) == 1


def test_a_kind_of_message_that_no_run_sends_is_refused(settings: Settings, site: SiteFile) -> None:
    message = Message(messages.content(config={"round": 0, "run": "ab"}), 1, "train.secretly")
    with serving(site):
        reply = asked(site, settings, message)
    with pytest.raises(ReplyError, match="is not a message type of a site"):
        messages.raise_failure(reply)


# --- What comes over the socket -------------------------------------------------------------------


def raw(site: SiteFile, content: bytes, *, close: bool = True) -> bytes:
    """Send bytes to the agent; return what it answers before it closes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(site.place(site.agent.socket)))
        connection.sendall(content)
        if close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # it did not read all that was sent
            while block := connection.recv(65536):
                answer += block
        return answer


def test_lengths_beyond_the_bound_are_refused_before_anything_is_read(
    settings: Settings, tmp_path: Path
) -> None:
    [site, *_] = sites_of(settings, tmp_path, agent__max_message_mib=1)
    with serving(site) as said:
        for lengths in ((1, 2**20 + 1), (2**31, 1), (2**32 - 1, 2**32 - 1)):
            started = time.monotonic()
            said_back = raw(site, wire.REQUEST + struct.pack(">II", *lengths), close=False)
            assert said_back.startswith(wire.REFUSAL)
            assert time.monotonic() - started < 5
        messages.raise_failure(asked(site, settings))
    assert sum("are allowed (agent.max-message-mib)" in line for line in said) == 3
    refused = [e for e in audit.read(site.place("state")) if e["outcome"] == "refused"]
    assert len(refused) == 3


def test_a_message_that_is_too_large_is_told_as_that_at_once(
    settings: Settings, tmp_path: Path
) -> None:
    [site, *_] = sites_of(settings, tmp_path, agent__max_message_mib=1)
    large = messages.content(config={"round": 0, "run": "ab", "more": "x" * 3 * 2**20})
    patient = context_of(settings, {**at(site), "agent-wait-seconds": 60})
    with serving(site):
        started = time.monotonic()
        reply = node_app.hand_on(Message(large, 1, MessageType.QUERY), patient)
        with pytest.raises(ReplyError, match=r"refused the request.*agent\.max-message-mib"):
            messages.raise_failure(reply)
        assert time.monotonic() - started < 10
    refused = [e for e in audit.read(site.place("state")) if e["outcome"] == "refused"]
    assert len(refused) == 1


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (b"", b""),
        (b"GET / HTTP/1.1\r\n\r\n", wire.REFUSAL),
        (b"GRQ1", b""),
        (wire.REQUEST + struct.pack(">II", 100, 100) + b"x", b""),
    ],
    ids=["nothing", "http", "half a header", "half a body"],
)
def test_what_is_no_request_is_not_answered_and_the_agent_goes_on(
    settings: Settings, site: SiteFile, content: bytes, answer: bytes
) -> None:
    with serving(site):
        assert raw(site, content)[:4] == answer
        messages.raise_failure(asked(site, settings))


def test_a_request_has_one_deadline_however_often_a_byte_comes(
    settings: Settings, site: SiteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "READ_SECONDS", 0.5)
    with serving(site), socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(site.place(site.agent.socket)))
        slow.sendall(wire.REQUEST + struct.pack(">II", 1000, 1000))
        started = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - started < 10:
                slow.sendall(b"x")
                time.sleep(0.1)
    assert time.monotonic() - started < 5


def test_a_half_sent_request_does_not_keep_an_agent_from_stopping(site: SiteFile) -> None:
    with socket.socket(socket.AF_UNIX) as slow:
        with serving(site) as said:
            slow.connect(str(site.place(site.agent.socket)))
            slow.sendall(wire.REQUEST)
            started = time.monotonic()
        assert said[-1] == "stopped"
    assert time.monotonic() - started < 5


def test_every_message_leaves_a_line_whatever_stands_in_it(
    settings: Settings, site: SiteFile
) -> None:
    """Bytes where numbers should be are refused before anything is done; lines stay lines."""
    odd: dict[str, Any] = {"round": 0, "run": "ab", "cursor": "a\u2028b"}
    raw_bytes = {**odd, "learning-rate": b"x"}
    with serving(site) as said:
        messages.raise_failure(
            asked(site, settings, Message(messages.content(config=odd), 1, "query"))
        )
        with pytest.raises(ReplyError, match="'learning-rate' is not a single value"):
            asked(site, settings, Message(messages.content(config=raw_bytes), 1, "evaluate"))
    assert not [line for line in said if "crashed" in line]
    answered, refused = audit.read(site.place("state"))
    assert (answered["cursor"], answered["outcome"]) == (repr("a\u2028b"), "answered")
    assert refused["outcome"] == "refused"


def test_the_server_learns_of_no_place_of_the_agent(
    settings: Settings, site: SiteFile, capsys: pytest.CaptureFixture[str]
) -> None:
    """The site's own log says it."""
    place = str(site.place(site.agent.socket))
    reply = node_app.hand_on(question(), context_of(settings, at(site)))
    with pytest.raises(EngineError, match="The site's agent is not running") as told:
        messages.raise_failure(reply)
    assert place not in str(told.value)
    assert place in capsys.readouterr().err


def test_a_silent_connection_is_closed(
    settings: Settings, site: SiteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "FIRST_SECONDS", 0.2)
    with serving(site) as said:
        assert raw(site, b"GRQ1", close=False) == b""
        messages.raise_failure(asked(site, settings))
    assert any("closed early" in line for line in said)


def test_the_run_cannot_name_files_of_the_site(settings: Settings, site: SiteFile) -> None:
    """Data, base and node are the site's own whatever the run's configuration says."""
    elsewhere = {**settings, "static.dataset.name": "/etc/passwd", "data.question-column": "x"}
    with serving(site):
        reply = asked(site, elsewhere)
        with pytest.raises(GrandRoundsError, match="requests the base '/etc'"):
            messages.raise_failure(asked(site, {**settings, "model.name": "/etc"}))
    facts = reply.content.config_records[messages.CONFIG]
    assert facts["train-examples"] == 30  # 27, rounded


# --- Loopback with TLS ----------------------------------------------------------------------------


@pytest.fixture
def tls_site(settings: Settings, tmp_path: Path) -> SiteFile:
    """A site whose agent listens on a free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = set_up.init_site(tmp_path / "tls", "tls", tls_port=port)
    [site, *_] = sites_of(settings, tmp_path)
    (folder / "cards.jsonl").write_bytes((site.path.parent / "cards.jsonl").read_bytes())
    text = (folder / "site.toml").read_text()
    for section, key, value in (
        ("data", "source", "cards.jsonl"),
        ("policy", "min-examples", 1),
        ("policy", "min-examples-per-visit", 1),
        ("node", "num-partitions", 4),
    ):
        text = set_up.with_value(text, section, key, value)
    name = json.dumps(settings["model.name"])
    (folder / "site.toml").write_text(f"{text}\n[bases.{name}]\npath = {name}\n")
    return read_site_file(folder / "site.toml")


def tls_node(site: SiteFile, **changes: str) -> dict[str, Any]:
    folder = site.path.parent
    return {
        "agent": agents.place_of(site),
        "agent-ca": str(folder / "agent-ca.crt"),
        "agent-certificate": str(folder / "agent-client.crt"),
        "agent-key": str(folder / "agent-client.key"),
        "agent-wait-seconds": 0.2,
        **changes,
    }


def test_over_tls_both_ends_show_who_they_are(settings: Settings, tls_site: SiteFile) -> None:
    with serving(tls_site):
        reply = agent_client.forward(question(), context_of(settings, tls_node(tls_site)))
    messages.raise_failure(reply)


def test_an_answer_over_tls_may_be_larger_than_all_buffers(
    settings: Settings, tls_site: SiteFile
) -> None:
    """And connections that never begin to speak TLS, more than the agent holds, do not delay it."""
    text = "x" * 8 * 2**20

    def large(message: Message, context: Context) -> Message:
        return Message(messages.content(config={"text": text}), reply_to=message)

    host, port = tls_site.agent.address.split(":")
    with serving(tls_site, visits={"query": large}), contextlib.ExitStack() as stack:
        for _ in range(connections.MOST_CONNECTIONS + 6):
            stack.enter_context(socket.create_connection((host, int(port)), 10))
        reply = agent_client.forward(question(), context_of(settings, tls_node(tls_site)))
    assert reply.content.config_records[messages.CONFIG]["text"] == text


def test_a_stranger_is_not_answered_over_tls(
    settings: Settings, tls_site: SiteFile, tmp_path: Path
) -> None:
    strange = set_up.init_site(tmp_path / "strange", "strange", tls_port=9)
    client = {
        "agent-certificate": str(strange / "agent-client.crt"),
        "agent-key": str(strange / "agent-client.key"),
    }
    ca = {"agent-ca": str(strange / "agent-ca.crt")}
    with serving(tls_site):
        for changes in (client, ca):
            node = tls_node(tls_site, **changes)
            with pytest.raises(EngineError, match="trust each other"):
                agent_client.forward(question(), context_of(settings, node))
        host, port = tls_site.agent.address.split(":")
        plain = ssl.create_default_context(cafile=str(tls_site.path.parent / "agent-ca.crt"))
        answer = b""
        with (
            socket.create_connection((host, int(port)), 10) as bare,
            contextlib.suppress(OSError),
            plain.wrap_socket(bare, server_hostname=host) as nobody,
        ):
            nobody.sendall(wire.pack_request(question(), context_of(settings, {})))
            answer = nobody.recv(10)
        assert answer == b""


def test_only_loopback_addresses_are_served(settings: Settings, tmp_path: Path) -> None:
    for address in ("0.0.0.0:9443", "10.0.0.1:9443", "hospital.example:9443", "127.0.0.1:x"):
        site = make_site(
            tmp_path / "site",
            {"formulary": ""},
            agent__address=address,
            agent__socket="",
            agent__certificate="a",
            agent__key="b",
            agent__client_ca="c",
        )
        with pytest.raises(ConfigError, match="must be a loopback address"):
            listening.loopback_address(site)


def test_a_port_in_use_is_told(tls_site: SiteFile) -> None:
    with serving(tls_site), pytest.raises(ConfigError, match="the process that listens there"):
        listening.network_socket(tls_site)


def test_certificates_that_cannot_be_read_are_told(tls_site: SiteFile) -> None:
    (tls_site.path.parent / "agent.crt").write_text("hello")
    with pytest.raises(ConfigError, match=r"agent\.certificate, agent\.key and agent\.client-ca"):
        listening.server_context(tls_site)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ({"agent": "http://127.0.0.1"}, "is not an address: write"),
        ({"agent": "unix:"}, "is not an address: write"),
        ({"agent": "tls:127.0.0.1:9443"}, "needs agent-ca, agent-certificate, agent-key"),
    ],
)
def test_an_agents_address_that_cannot_be_is_told(
    settings: Settings, node: dict[str, Any], reason: str
) -> None:
    with pytest.raises(EngineError, match=reason):
        agent_client.forward(question(), context_of(settings, node))


# --- State ----------------------------------------------------------------------------------------


def test_a_state_folder_that_others_can_look_into_is_refused(site: SiteFile) -> None:
    site.place("state").mkdir(mode=0o755, parents=True, exist_ok=True)
    site.place("state").chmod(0o755)
    with pytest.raises(ConfigError, match=r"is accessible to other users.* chmod 700"):
        agents.Agent(site, print)


def test_a_damaged_state_is_told_with_what_to_do(site: SiteFile) -> None:
    site.place("state").mkdir(mode=0o700, parents=True, exist_ok=True)
    (site.place("state") / "site.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigError, match=r"move a damaged site\.sqlite away.*privacy budget"):
        agents.Agent(site, print)
