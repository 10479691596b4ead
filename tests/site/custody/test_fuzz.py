"""Whatever comes over the socket: no crash, no allocation beyond the bound, no file outside."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import context_to_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from hypothesis import given
from hypothesis import settings as rules
from hypothesis import strategies as st

from grandrounds.client_app import VISITS
from grandrounds.config import recipes
from grandrounds.config.digest import recipe_sha256
from grandrounds.errors import ReplyError
from grandrounds.server import introductions
from grandrounds.site.custody import agent_client, audit
from grandrounds.site.custody import frames as wire
from grandrounds.wire import messages
from grandrounds.wire.masks import packed
from grandrounds.wire.masks.attempt import CONFIRM, KEYS, KIND_OF, MASKS, SHARES, UNMASK
from grandrounds.wire.masks.attempt import MASKED as MASKED_EXCHANGE
from grandrounds.wire.masks.carried import ATTEMPT, MOST_WEIGHT, RECIPE, carried, sent
from tests.engines.deployment.test_agent import at, context_of, training_message
from tests.masking import Rounds, give_keys, identity, roster_of_sites
from tests.own_sites import sites_of
from tests.runs import Settings

MESSAGES = int(os.environ.get("HOSTILE_MESSAGES", "3000"))
"""Messages sent; HOSTILE_MESSAGES=10000 takes two minutes."""
MIB = 2**20


def context_bytes(settings: Settings) -> bytes:
    flat = recipes.resolve(settings).flat()
    packed: bytes = context_to_proto(Context(1, 1, {}, RecordDict(), flat)).SerializeToString()
    return packed


def framed(context: bytes, message: bytes) -> bytes:
    return wire.REQUEST + struct.pack(">II", len(context), len(message)) + context + message


def read(content: bytes, most: int = MIB) -> Any:
    """Return a request, or None where it is refused in one of the two ways that there are."""
    try:
        lengths = wire.lengths_of(content[: wire.HEADER_BYTES], most)
        body = content[wire.HEADER_BYTES :]
        if len(body) < sum(lengths):
            return None
        return wire.unpack_request(body[: lengths[0]], body[lengths[0] : sum(lengths)])
    except ReplyError:
        return None


@given(st.binary(max_size=400))
@rules(deadline=None, max_examples=300)
def test_arbitrary_bytes_are_refused(content: bytes) -> None:
    assert read(content) is None
    assert read(wire.REQUEST + content) is None


@given(st.binary(max_size=300), st.binary(max_size=300))
@rules(deadline=None, max_examples=300)
def test_frames_of_arbitrary_bytes_are_refused_or_read(context: bytes, message: bytes) -> None:
    read(framed(context, message))


@given(st.data())
@rules(deadline=None, max_examples=300)
def test_a_damaged_request_is_refused_or_read(data: st.DataObject) -> None:
    message = message_to_proto(introductions.questions([1], "ab")[1]).SerializeToString()
    content = bytearray(framed(b"", message))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    read(bytes(content))


def test_what_could_grow_in_memory_is_refused() -> None:
    """A list of numbers takes a byte each on the wire, and eight in memory."""
    proto = message_to_proto(introductions.questions([1], "ab")[1])
    item = proto.content.items[0]
    entry = item.config_record.items.add()
    entry.key = "list"
    entry.value.sint_list.vals.extend([0] * 1000)
    assert read(framed(b"", proto.SerializeToString())) is None
    many = message_to_proto(introductions.questions([1], "ab")[1])
    for i in range(wire.MOST_RECORDS + 1):
        many.content.items.add(key=str(i)).metric_record.SetInParent()
    assert read(framed(b"", many.SerializeToString())) is None
    both = message_to_proto(introductions.questions([1], "ab")[1])
    both.error.code = 3
    assert read(framed(b"", both.SerializeToString())) is None


# --- A real agent ---------------------------------------------------------------------------------

HARNESS = """
import os, resource, signal, sys, threading
from pathlib import Path
from grandrounds.engines.deployment.agent import Agent
from grandrounds.site.custody import kept_runs, quota, refusals
from grandrounds.site.custody.site_file import read_site_file
from grandrounds.quiet import quiet_libraries

# Else nearly all messages would be turned away at the first step.
refusals.MOST = quota.MOST_QUESTIONS = quota.MOST_QUESTIONS_OF_OTHERS = 10**9
kept_runs.check_pinned = lambda *_: None

quiet_libraries()
site = read_site_file(Path(sys.argv[1]))
state = str(site.place(site.agent.state))
socket = str(site.place(site.agent.socket))
outside, watched = [], []

def watch(event, arguments):
    if not watched:
        return
    path, writes = None, True
    if event == "open":
        path, mode, flags = arguments
        writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or any(
            c in str(mode or "") for c in "wax+")
    elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.chmod",
                   "os.link", "os.symlink", "os.chown"):
        path = arguments[0]
    if event in ("subprocess.Popen", "os.system", "os.exec", "socket.connect", "pickle.find_class"):
        outside.append(f"{event} {arguments!r}")
    elif path is not None and writes and isinstance(path, (str, bytes, os.PathLike)):
        name = os.fspath(path)
        name = name.decode() if isinstance(name, bytes) else name
        if not name.startswith(state) and name not in (socket, "/dev/null"):
            outside.append(f"{event} {name}")

sys.addaudithook(watch)
crashed = []
agent = Agent(site, lambda line: crashed.append(line) if "crashed" in line else None)
def answer(*_):
    watched.append(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, flush=True)
signal.signal(signal.SIGUSR1, answer)
signal.signal(signal.SIGTERM, lambda *_: agent.stop())
print("ready", flush=True)
agent.serve()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, flush=True)
print(sorted(set(outside)), flush=True)
print(sorted(set(crashed)), flush=True)
"""


PICKLED = (
    b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    b"c__builtin__\neval\n(S'1'\ntR."
)
"""An array of objects: what numpy would unpickle if it were let."""


def mutated(request: tuple[bytes, bytes], draw: random.Random) -> bytes:
    """Return a request with damage of some kind."""
    context, message = map(bytearray, request)
    kind = draw.randrange(8)
    if kind == 0:
        return draw.randbytes(draw.randrange(200))
    if kind == 1:
        return wire.REQUEST + struct.pack(">II", draw.getrandbits(32), draw.getrandbits(32))
    body = draw.choice((context, message))
    for _ in range(draw.randint(1, 6)):
        place = draw.randrange(len(body))
        if kind == 2:
            body[place] = draw.getrandbits(8)
        elif kind == 3:
            body[place] ^= 1 << draw.randrange(8)
        elif kind == 4:
            del body[place : place + draw.randint(1, 30)]
        elif kind == 5:
            body[place:place] = draw.randbytes(draw.randint(1, 30))
        elif kind == 6:
            end = place + draw.randint(1, 40)
            body[place:end] = body[: end - place]
        if not body:
            break
    whole = framed(bytes(context), bytes(message))
    return whole[: draw.randrange(len(whole))] if kind == 7 else whole


def structured(flat: Mapping[str, Any], visit: bytes, draw: random.Random) -> tuple[bytes, bytes]:
    """Return a whole request for a visit, as serialised, in which some values are others."""
    flat = dict(flat)
    for key in draw.sample(sorted(flat), draw.randrange(3)):
        flat[key] = draw.choice([-1, 0, 2**62, 1e308, "", "../../etc/passwd", "x" * 5000, True])
    proto = ProtoMessage.FromString(visit)
    if draw.random() < 0.5 or not proto.metadata.message_type.startswith("train."):
        proto.metadata.message_type = draw.choice(["train", *VISITS, "x" * 50])
    for item in proto.content.items:
        if item.WhichOneof("value") == "config_record":
            for entry in item.config_record.items:
                if draw.random() < 0.3:
                    entry.value.Clear()
                    which = draw.randrange(5)
                    if which == 0:
                        entry.value.sint64 = draw.choice([-1, 0, 2**62])
                    elif which == 1:
                        entry.value.string = draw.choice(["", "../..", "\0", "none", "int4"])
                    elif which == 2:
                        entry.value.double = draw.choice([float("nan"), float("inf"), -1.0])
                    elif which == 3:
                        entry.value.bytes = b"x"
        elif item.WhichOneof("value") == "array_record" and draw.random() < 0.8:
            array = draw.choice(item.array_record.items)
            which = draw.randrange(5)
            if which == 0:
                array.value.shape[:] = [2**31 - 1, 2**31 - 1]
            elif which == 1:
                array.value.data = draw.randbytes(draw.randrange(2000))
            elif which == 2:
                array.value.dtype = draw.choice(["object", "float64", "O", "x" * 100])
            elif which == 3:
                array.key = draw.choice(["", "../../x", "a" * 1000])
            else:
                array.value.data = PICKLED
    packed: bytes = context_to_proto(Context(1, 1, {}, RecordDict(), flat)).SerializeToString()
    return packed, proto.SerializeToString()


MASKED: Settings = {
    "secure-aggregation": "masked32",
    "strategy.name": "fedavg",
    "strategy.fraction-train": 1.0,
}


def of_masks(settings: Settings, site: Any, own_keys: bytes) -> Iterator[Message]:
    """Yield a message of each exchange of a masked sum; the first three are as they should be.

    Parameters
    ----------
    own_keys : bytes
        The site's answer to `keys`.
    """
    rounds = Rounds(4)
    rounds.server.take_keys(0, own_keys)
    listed = rounds.keys((1, 2, 3))
    rounds.shares((1, 2, 3))
    boxes = {i: dealt.boxes[0] for i, dealt in rounds.server._dealt.items()}
    survivors, signed = packed.pack_sites(range(4)), dict.fromkeys(range(4), bytes(96))
    said = {"round": 1, "run": "ab", ATTEMPT: 0}
    for exchange, data in (
        (KEYS, b""),
        (SHARES, listed),
        (MASKED_EXCHANGE, packed.pack_boxes(boxes)),
        (CONFIRM, survivors),
        (UNMASK, packed.pack_signatures(signed)),
    ):
        content = messages.content(arrays=sent(exchange, data) if data else None, config=said)
        if exchange == MASKED_EXCHANGE:
            content = training_message(settings, site).content
            recipe = recipe_sha256(recipes.resolve(settings))
            content.config_records[messages.CONFIG].update(
                {ATTEMPT: 0, MOST_WEIGHT: 1, RECIPE: recipe}
            )
            content[MASKS] = sent(exchange, data)
        yield Message(content, 1, KIND_OF[exchange])


def requests(
    settings: Settings, plain: Sequence[Message], masked: Sequence[Message]
) -> Iterator[bytes]:
    """Yield what is sent: two thirds damaged bytes, one third whole with wrong values.

    Half of it is of masked sums.
    """
    draw = random.Random(7)
    kinds = [
        (recipes.resolve(of).flat(), [message_to_proto(m).SerializeToString() for m in those])
        for of, those in ((settings, plain), ({**settings, **MASKED}, masked))
    ]
    contexts = [context_bytes(settings), context_bytes({**settings, **MASKED})]
    for i in range(MESSAGES):
        flat, those = kinds[i % 2]
        if i % 3:
            yield mutated((contexts[i % 2], draw.choice(those)), draw)
        else:
            yield framed(*structured(flat, draw.choice(those[1:]), draw))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thousands_of_hostile_messages_do_no_harm(settings: Settings, tmp_path: Path) -> None:
    [site, *_] = sites_of(
        settings,
        tmp_path,
        agent__max_message_mib=1,
        policy__max_visits_per_day=100_000,
        policy__max_runs_per_day=100_000,
        secure__min_cohort=3,
    )
    give_keys(site, roster_of_sites(4), identity(0))
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if "state" not in f.parts}
    command = [sys.executable, "-B", "-c", HARNESS, str(site.path)]  # no compiled modules either
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            path = str(site.place(site.agent.socket))
            question = context_of(settings, {**at(site), "agent-wait-seconds": 30})
            plain = [introductions.questions([1], "ab")[1], training_message(settings, site)]
            for message in (*plain, plain[1]):
                messages.raise_failure(agent_client.forward(message, question))
            of_masked = {**settings, **MASKED}
            context = context_of(of_masked, {**at(site), "agent-wait-seconds": 30})
            said = {"round": 1, "run": "ab", ATTEMPT: 0}
            ask = Message(messages.content(config=said), 1, KIND_OF[KEYS])
            reply = agent_client.forward(ask, context)
            messages.raise_failure(reply)
            masked = [*of_masks(of_masked, site, carried(reply.content, KEYS))]
            for message in masked[:2]:
                messages.raise_failure(agent_client.forward(message, context))
            process.send_signal(10)  # SIGUSR1: from now on files are watched
            at_start = int(process.stdout.readline())
            for content in requests(settings, plain, masked):
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.settimeout(60)
                    connection.connect(path)
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        connection.sendall(content)
                        connection.shutdown(socket.SHUT_WR)
                        while connection.recv(65536):
                            pass
            reply = agent_client.forward(introductions.questions([1], "ab")[1], question)
            messages.raise_failure(reply)
            assert process.poll() is None
        finally:
            process.terminate()
            said = process.stdout.read().splitlines()
    assert process.returncode == 0
    at_end, outside, crashed = int(said[-3]), said[-2], said[-1]
    assert (outside, crashed) == ("[]", "[]")
    assert at_end - at_start < 8 * 1 + 64  # MiB: eight times a message, and what PyTorch keeps
    after = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if "state" not in f.parts}
    assert {f: after.get(f) for f in before if f.is_file()} == {
        f: before[f] for f in before if f.is_file()
    }
    told = audit.read(site.place("state"))
    outcomes = {entry["outcome"] for entry in told}
    assert outcomes == {"answered", "answered again", "refused", "failed"}
    assert len(told) >= MESSAGES / 3
