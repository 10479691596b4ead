"""Masked sums in a site's custody: the sums of a rehearsal, and a line for all that was asked."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from grandrounds.config import recipes
from grandrounds.config.digest import recipe_sha256
from grandrounds.errors import ConfigError, GrandRoundsError
from grandrounds.site.custody import answer as custody
from grandrounds.site.custody import audit, budget, quota
from grandrounds.site.custody.agent_key import IDENTITY
from grandrounds.site.custody.state import opened
from grandrounds.site.masks import visit as masks
from grandrounds.site.visit import Visit
from grandrounds.wire import messages
from grandrounds.wire.masks import keys, packed
from grandrounds.wire.masks.agreement import keys_text
from grandrounds.wire.masks.attempt import (
    CONFIRM,
    EXCHANGES,
    KEYS,
    KIND_OF,
    MASKED,
    MASKS,
    SHARES,
    UNMASK,
)
from grandrounds.wire.masks.carried import ATTEMPT, MOST_WEIGHT, RECIPE, received_digest, sent
from grandrounds.wire.masks.fixed_point import numbers_of
from grandrounds.wire.masks.packed import SignedKeys
from grandrounds.wire.masks.rehearsal import identity_of, roster_of_run
from grandrounds.wire.schedule import round_learning_rate_of
from tests.asking import Asking
from tests.masking import Rounds, attempt_at, give_keys, identity, roster_of_sites
from tests.own_sites import make_site, sites_of
from tests.runs import GOOD_SITES, Settings, adapter_bytes, metrics_of, play, read_json
from tests.site.custody.test_custody import entries, grid_of_sites

MASKED_RUN: Settings = {
    "secure-aggregation": "masked32",
    "strategy.fraction-train": 1.0,
    "strategy.weighting": "equal",
    "num-server-rounds": 2,
    "train.training-arguments.max-steps": 1,
}

NEEDS_MASKS: dict[str, Any] = {"privacy__require": "masked", "secure__min_cohort": 3}


@pytest.mark.usefixtures("by_the_runs_seed")
def test_sites_in_custody_sum_to_the_adapter_of_a_rehearsal(
    settings: Settings, tmp_path: Path
) -> None:
    """Bit for bit, with the planned bytes, and nothing but arrays leaves with an update. So does a
    run whose server is killed once a site has answered for a sum, and that is resumed."""
    settings |= MASKED_RUN
    rehearsed = play(settings)
    sites = sites_of(settings, tmp_path, policy__max_runs_per_day=2, **NEEDS_MASKS)
    seed = recipes.resolve(settings).federation.seed
    for i, site in enumerate(sites):
        give_keys(site, roster_of_run(seed, 4), identity_of(seed, i))
    own = {**settings, "run-directory": str(tmp_path / "own")}
    run = play(own, grid=grid_of_sites(own, sites))
    assert adapter_bytes(run) == adapter_bytes(rehearsed)
    assert read_json(run / "plan.json")["totals"] == read_json(run / "ledger.json")["totals"]
    for record in metrics_of(run)[1:]:
        assert record["train-loss"] is record["coverage"] is record["visit-seconds"] is None
    for site in sites:
        lines = [line for line in entries(site) if str(line["asked"]).startswith("train")]
        assert {line["outcome"] for line in lines} == {"answered"}
        for number in (1, 2):
            asked = [line["asked"] for line in lines if line["round"] == number]
            assert set(asked) >= {KIND_OF[exchange] for exchange in EXCHANGES[2:]}
        for line in lines:
            assert line["left"]["told"] == []
            assert line["left"]["bytes"] > 0
        [visit, _] = [line for line in lines if line["asked"] == KIND_OF[MASKED]]
        assert visit["cohort"] == [0, 1, 2, 3]
        assert {"train-loss", "update-norm", "num-examples"} <= set(visit["kept"])
        assert visit["figures"]["train-loss"] > 0
        assert [line["survivors"] for line in lines if line["asked"] == KIND_OF[UNMASK]] == [
            [0, 1, 2, 3]
        ] * 2
    cut = {**settings, "run-directory": str(tmp_path / "cut")}
    with pytest.raises(KeyboardInterrupt):
        play(cut, grid=grid_of_sites(cut, sites, killed_at_unmask))
    resumed = {**cut, "resume-from": cut["run-directory"]}
    assert adapter_bytes(play(resumed, grid=grid_of_sites(resumed, sites))) == adapter_bytes(run)
    assert len(entries(sites[0], asked=KIND_OF[UNMASK], round=1, outcome="answered")) == 1 + 2


def killed_at_unmask(message: Message, context: Context) -> Message:
    """Answer as a site does; the server is killed before it has the answer to `unmask`."""
    reply = GOOD_SITES(message, context)
    if message.metadata.message_type == KIND_OF[UNMASK]:
        raise KeyboardInterrupt
    return reply


# --- A hostile server -----------------------------------------------------------------------------


class Hostile:
    """One site in custody among four others that are honest, and a server that may send anything.

    The site's visit is not trained: its change is made up.
    """

    def __init__(
        self, folder: Path, settings: Settings, asked: Settings | None = None, **changes: Any
    ) -> None:
        self.settings = {
            **settings,
            **MASKED_RUN,
            "data.num-partitions": 5,
            "strategy.name": "fedavg",
            "strategy.fraction-evaluate": 0.0,
            **(asked or {}),
        }
        cards = str(settings["static.dataset.name"])
        numbers = {"node__partition_id": 0, "node__num_partitions": 5}
        changes = {**NEEDS_MASKS, **numbers, "policy__max_runs_per_day": 99, **changes}
        base = str(settings["model.name"])
        self.site = make_site(folder, {base: base}, cards, **changes)
        give_keys(self.site, roster_of_sites(5), identity(0))
        self.asking = Asking(self.site, self.settings)
        self.begin("ab")

    def begin(self, run: str, attempt: int = 0) -> None:
        """Begin another run, or another attempt at its first round."""
        self.run, self.attempt, self.rounds = run, attempt, Rounds(5)
        self.rounds.begin(attempt_at(5, run=run, number=attempt))
        self.trained = 0

    @property
    def others(self) -> tuple[int, ...]:
        return (1, 2, 3, 4)

    def visit(self, visit: Visit) -> RecordDict:
        """Answer `train.masked` as the ClientApp does, with a made-up change."""
        masks.check_boxes(visit)
        self.trained += 1
        reply = masks.masked(visit, {"change": np.full(50, 1e-4, np.float32)})
        return RecordDict({**reply, **messages.content(metrics={"train-loss": 1.0})})

    def request(self, exchange: str, data: bytes = b"", *, kind: str = "", **said: Any) -> Message:
        """Return a message of an exchange."""
        config = recipes.resolve(self.settings)
        instruction: dict[str, Any] = {"round": 1, "run": self.run, ATTEMPT: self.attempt}
        arrays = sent(exchange, data) if data else None
        if exchange == MASKED:
            instruction["learning-rate"] = round_learning_rate_of(config, 1)
            instruction |= {MOST_WEIGHT: 1, RECIPE: recipe_sha256(config)}
            arrays = sent("float32", b"adapter")
        content = messages.content(arrays=arrays, config={**instruction, **said})
        if exchange == MASKED:
            content[MASKS] = sent(MASKED, data)
        return Message(content, 1, kind or KIND_OF[exchange])

    def ask(self, exchange: str, data: bytes = b"", **said: Any) -> bytes:
        """Return the answer of the site's custody to one exchange."""
        return self.answer(exchange, self.request(exchange, data, **said))

    def answer(self, exchange: str, message: Message) -> bytes:
        functions: Mapping[str, Callable[[Visit], RecordDict]] = {
            one: lambda visit, one=one: masks.answer(visit, one)
            for one in (KEYS, SHARES, CONFIRM, UNMASK)
        }
        function = functions.get(exchange, self.visit)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(custody, "check_received", lambda *_: None)
            reply = self.asking.answer(message, self.settings, function)
        messages.raise_failure(reply)
        return reply.content.array_records[messages.ARRAYS][exchange].numpy().tobytes()

    # --- As an honest server would ask ------------------------------------------------------------

    def after_keys(self) -> dict[int, SignedKeys]:
        """Let all sites send their keys; return them."""
        self.rounds.server.take_keys(0, self.ask(KEYS))
        return packed.key_list(self.rounds.keys(self.others))

    def after_shares(self) -> dict[int, bytes]:
        """Let all sites send their shares; return the boxes for the site."""
        self.after_keys()
        listed = self.rounds.server.key_list()
        self.rounds.server.take_shares(0, self.ask(SHARES, listed))
        self.rounds.shares(self.others)
        return packed.boxes(self.rounds.server.boxes(0))

    def after_masked(self) -> bytes:
        """Let all sites send their vectors; return the site's."""
        boxes = packed.pack_boxes(self.after_shares())
        message = self.request(MASKED, boxes)
        self.rounds.server.received = self.received = received_digest(message.content)
        vector = self.answer(MASKED, message)
        for site in self.others:
            own = np.frombuffer(self.rounds.vector(site, self.received), np.uint8)
            self.rounds.server.take_masked(site, own)
        self.rounds.server.take_masked(0, np.frombuffer(vector, np.uint8))
        return vector

    def signed(self, survivors: list[int], by: tuple[int, ...] = (1, 2, 3, 4)) -> dict[int, bytes]:
        """Return the other sites' signatures over survivors."""
        request = packed.pack_sites(survivors)
        return {i: self.rounds.ends[i].confirm(self.rounds.attempt, request) for i in by}

    def refused(self, exchange: str, data: bytes = b"", **said: Any) -> str:
        """Return why the site refuses a request, as its audit log has it."""
        before, trained = len(self.log()), self.trained
        with pytest.raises(GrandRoundsError):
            self.ask(exchange, data, **said)
        line = self.log()[-1]
        assert len(self.log()) == before + 1
        assert line["asked"] == said.get("kind", KIND_OF[exchange])
        assert line["outcome"] == ("refused" if "reason" in line else "failed")
        assert self.trained == trained  # no act costs a visit
        return str(line["reason"])

    def log(self) -> list[dict[str, Any]]:
        return audit.read(self.site.place(self.site.agent.state))


@pytest.fixture(scope="module")
def same_site(federation: Settings, tmp_path_factory: pytest.TempPathFactory) -> Hostile:
    return Hostile(tmp_path_factory.mktemp("hostile") / "site0", federation)


@pytest.fixture
def server(same_site: Hostile) -> Hostile:
    """A run of its own at one site for all tests."""
    same_site.begin(secrets.token_hex(4))
    return same_site


def own_key(server: Hostile) -> str:
    """Its own key put in for a site's."""
    known = server.after_keys()
    box, mask = (keys.public_of(keys.new_secret()) for _ in range(2))
    text = keys_text(server.rounds.attempt, 2, box, mask)
    known[2] = SignedKeys(box, mask, keys.sign(identity(99), text))
    return server.refused(SHARES, packed.pack_key_list(known))


def threshold_one(server: Hostile) -> str:
    """A threshold of its own: no message has a place for one."""
    known = packed.pack_key_list(server.after_keys())
    with pytest.raises(GrandRoundsError, match="bytes, not"):
        server.ask(SHARES, known + b"\0\1")
    server.ask(SHARES, known, threshold=1)  # what nobody reads changes nothing
    server.rounds.shares(server.others)
    return server.log()[-2]["reason"]


def small_cohort(server: Hostile) -> str:
    """A cohort below min-cohort."""
    known = server.after_keys()
    return server.refused(SHARES, packed.pack_key_list({i: known[i] for i in (0, 1)}))


def twice(server: Hostile) -> str:
    """One site's keys a second time as another's."""
    known = server.after_keys()
    return server.refused(SHARES, packed.pack_key_list({**known, 2: known[1]}))


def changed_share(server: Hostile) -> str:
    """A share changed on its way."""
    boxes = server.after_shares()
    wrong = bytes([boxes[3][0] ^ 1]) + boxes[3][1:]
    return server.refused(MASKED, packed.pack_boxes({**boxes, 3: wrong}))


def masked_again(server: Hostile) -> str:
    """The same round asked to mask again."""
    server.after_masked()
    boxes = packed.boxes(server.rounds.server.boxes(0))
    return server.refused(MASKED, packed.pack_boxes({i: boxes[i] for i in (1, 2, 3)}))


def survivors_of_one(server: Hostile) -> str:
    """Survivors of one."""
    server.after_masked()
    return server.refused(CONFIRM, packed.pack_sites([0]))


def second_survivors(server: Hostile) -> str:
    """A second set of survivors."""
    server.after_masked()
    server.ask(CONFIRM, packed.pack_sites(range(5)))
    return server.refused(CONFIRM, packed.pack_sites([0, 1, 2, 3]))


def another_set(server: Hostile) -> str:
    """Another site's signature over another set."""
    server.after_masked()
    own = server.ask(CONFIRM, packed.pack_sites(range(5)))
    signed = {0: own, **server.signed([*range(5)], (2, 3, 4)), **server.signed([0, 1, 2, 3], (1,))}
    return server.refused(UNMASK, packed.pack_signatures(signed))


def few_signatures(server: Hostile) -> str:
    """Fewer than t signatures."""
    server.after_masked()
    own = server.ask(CONFIRM, packed.pack_sites(range(5)))
    signed = {0: own, **server.signed([*range(5)], (1, 2))}
    return server.refused(UNMASK, packed.pack_signatures(signed))


def replayed_keys(server: Hostile) -> str:
    """The last round's signed keys replayed."""
    known = server.after_keys()
    own = packed.signed_keys(server.ask(KEYS, round=2))
    return server.refused(SHARES, packed.pack_key_list({**known, 0: own}), round=2)


def both_shares(server: Hostile) -> str:
    """Both shares of one site: after a sum of five the one of four is asked for."""
    opened_once(server)
    signed = server.signed([*range(5)])
    return server.refused(UNMASK, packed.pack_signatures(signed))


def downgrade(server: Hostile) -> str:
    """A plain `train` of a run whose updates are masked."""
    server.after_keys()
    return server.refused(MASKED, b"", kind="train")


def other_adapter(server: Hostile) -> str:
    """Another adapter to one site: no site opens what its signature does not fit."""
    server.after_masked()
    own = server.ask(CONFIRM, packed.pack_sites(range(5)))
    one = server.rounds.ends[1]
    held = one.store.read(server.rounds.attempt)
    assert held is not None
    text = packed.pack_sites(range(5))
    object.__setattr__(held, "received", bytes(32))
    one.store.replace(held, MASKED)
    signed = {
        0: own,
        1: one.confirm(server.rounds.attempt, text),
        **server.signed([*range(5)], (2, 3, 4)),
    }
    return server.refused(UNMASK, packed.pack_signatures(signed))


def another_recipe(server: Hostile) -> str:
    """Another recipe for the other sites, with which their updates would be nothing."""
    boxes = server.after_shares()
    return server.refused(MASKED, packed.pack_boxes(boxes), **{RECIPE: "0" * 64})


def no_weight(server: Hostile) -> str:
    """No largest weight: nothing is charged or trained for what cannot be answered."""
    boxes = packed.pack_boxes(server.after_shares())
    with pytest.raises(GrandRoundsError):
        server.ask(MASKED, boxes, **{MOST_WEIGHT: 0})
    assert not server.trained
    return str(server.log()[-1]["reason"])


def opened_once(server: Hostile) -> bytes:
    """Let the site answer for one sum."""
    server.after_masked()
    own = server.ask(CONFIRM, packed.pack_sites(range(5)))
    signed = {0: own, **server.signed([*range(5)])}
    request = packed.pack_signatures(signed)
    first = server.ask(UNMASK, request)
    assert server.ask(UNMASK, request) == first  # the same request again, the same bytes
    return first


ACTS = {
    own_key: "'site-2' are not signed by its agent key",
    threshold_one: "bytes, not",
    small_cohort: "has 2 sites; this site takes part in sums of at least 3",
    twice: "the same key twice",
    changed_share: "The box of 'site-3' does not open",
    masked_again: "has answered the exchange 'masked'",
    survivors_of_one: "has 1 sites; this site takes part in sums of at least 4",
    second_survivors: "has answered the exchange 'confirm'",
    another_set: "'site-1' has not signed the survivors",
    few_signatures: "Only 3 sites have signed the survivors; this site needs 4",
    replayed_keys: "are not signed by its agent key for this attempt",
    both_shares: "has answered the exchange 'unmask'",
    downgrade: "its updates are masked .* and the server asked for 'train'",
    other_adapter: "'site-1' has not signed the survivors",
    another_recipe: "the message is of the recipe '0000",
    no_weight: "most-weight",
}


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_every_act_of_a_hostile_server_is_refused_and_logged(
    server: Hostile, act: Callable[[Hostile], str]
) -> None:
    """Each message finds the site's state as an agent does that was just started."""
    assert re.search(ACTS[act], act(server))


def test_the_same_request_gets_the_same_bytes_and_no_second_visit(
    server: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the process ended before the reply was kept: the vector was on disk."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    boxes = packed.pack_boxes(server.after_shares())
    with monkeypatch.context() as patched:
        patched.setattr(custody.replay, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            server.ask(MASKED, boxes)
    [held] = (server.site.place("state") / "replies").glob(f"{server.run}-*")
    vector = server.ask(MASKED, boxes)
    assert vector in held.read_bytes()
    assert server.trained == 2
    for _ in range(2):
        assert server.ask(MASKED, boxes) == vector
    assert server.trained == 2
    assert server.log()[-1]["outcome"] == "answered again"


PRIVATE: Settings = {
    "privacy.unit-guarantee": "example",
    "privacy.noise-multiplier": 4.0,
    "privacy.clipping-norm": 0.1,
}


@pytest.mark.parametrize("require", ["masked", "example+masked"])
def test_another_attempt_masks_the_same_change_without_a_second_visit(
    settings: Settings, tmp_path: Path, require: str
) -> None:
    """Neither a visit nor a charge is lost with an attempt, and other bytes leave."""
    asked = PRIVATE if require == "example+masked" else {}
    units = {"privacy__require": require, "privacy__declared_units": 100 if asked else 0}
    server = Hostile(tmp_path / "site0", settings, asked, **units)
    first = server.after_masked()
    assert server.trained == 1
    server.begin("ab", 1)
    assert server.after_masked() != first
    assert server.trained == 0
    own = server.ask(CONFIRM, packed.pack_sites(range(5)))
    summing = server.rounds.server
    for site, signature in {0: own, **server.signed([*range(5)])}.items():
        summing.take_signature(site, signature)
    summing.take_opened(0, server.ask(UNMASK, summing.signatures()))
    sent_by_it = server.rounds.unmask(server.others) - server.rounds.plain(server.others)
    config = recipes.resolve(server.settings)
    numbers = numbers_of(config, round_learning_rate_of(config, 1), 5, 50, 1)
    assert (sent_by_it == numbers.encode(np.full(50, 1e-4, np.float32), 1)).all()
    with opened(server.site.place("state")) as state:
        assert quota.visits_today(state) == 1
        charged = budget.read(server.site, state).runs
    assert {run: found.visits for run, found in charged.items()} == ({"ab": 1} if asked else {})


def test_no_second_sum_over_a_restart(server: Hostile) -> None:
    """The answer to `unmask` is on disk as the round's one sum before it leaves."""
    opened_once(server)
    assert "has answered for one sum of round 1" in server.refused(KEYS, **{ATTEMPT: 1})


# --- What a site requires -------------------------------------------------------------------------


def told(asking: Asking, **settings: Any) -> str:
    """Return why a site refuses a run at the roll call, as its audit log has it."""
    with pytest.raises(GrandRoundsError) as error:
        asking("cd", kind="query", settings=settings)
    line = audit.read(asking.site.place("state"))[-1]
    assert (line["asked"], line["outcome"]) == ("query", "refused")
    assert line["reason"] == str(error.value)
    return str(error.value)


def test_a_run_without_masks_is_refused_at_the_roll_call(server: Hostile) -> None:
    why = told(server.asking, **{"secure-aggregation": "none"})
    assert "privacy.require = 'masked', requested secure-aggregation = 'none'" in why


def test_a_run_of_fewer_sites_than_min_cohort_is_refused_at_the_roll_call(
    settings: Settings, tmp_path: Path
) -> None:
    server = Hostile(tmp_path / "site0", settings, secure__min_cohort=5)
    why = told(server.asking, **{"strategy.fraction-train": 0.6})
    assert "secure.min-cohort = 5, requested 3 sites a round" in why
    assert server.asking("cd", kind="query").content  # of five


def test_without_agent_key_or_roster_a_site_refuses_masked_runs(
    settings: Settings, tmp_path: Path
) -> None:
    server = Hostile(tmp_path / "site0", settings)
    (server.site.path.parent / IDENTITY).rename(server.site.path.parent / "gone")
    assert "has no agent key" in told(server.asking)
    keys_file = server.site.path.parent / IDENTITY
    (server.site.path.parent / "gone").rename(keys_file)
    server.site.place(server.site.secure.roster).unlink()
    assert "has accepted no roster" in told(server.asking)


@pytest.mark.parametrize("require", ["masked", "example+masked"])
def test_what_a_site_requires_is_consistent(
    settings: Settings, tmp_path: Path, require: str
) -> None:
    units = {"privacy__require": require, "privacy__declared_units": 100}
    site = make_site(tmp_path / "a", {"formulary": ""}, **units)
    assert site.privacy.requires_masks
    assert site.is_private == (require == "example+masked")
    with pytest.raises(ConfigError, match=r'does not go with tell\.figures = "exact"'):
        make_site(tmp_path / "b", {"formulary": ""}, **units, tell__figures="exact")
    with pytest.raises(ConfigError, match="is none of 'none', 'example', 'masked', 'example"):
        make_site(tmp_path / "c", {"formulary": ""}, privacy__require="mask")
