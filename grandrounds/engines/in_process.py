"""The in-process engine: Flower's two apps, called in this process without a runtime."""

from __future__ import annotations

import dataclasses
import itertools
import traceback
from collections.abc import Callable, Iterable, Mapping

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from grandrounds.config.keys import Config
from grandrounds.engines.watching import with_run_directory
from grandrounds.quiet import quiet_libraries
from grandrounds.server.listeners import Listener
from grandrounds.site.custody.node import IN_PROCESS
from grandrounds.wire.messages import CLIENT_APP_RAISED

ClientAppCall = Callable[[Message, Context], Message]


class InProcessGrid(Grid):
    """A Grid whose sites run one after another, each when its reply is pulled.

    Parameters
    ----------
    client_app
        Called with (message, context), as Flower's runtimes do.
    run_config
        Flat configuration of the run, as every site receives it.
    num_partitions : int
        Number of sites; site i has node id i + 1.
    """

    in_one_process = True
    """Read by the server: one site's answers are those of all."""

    def __init__(
        self,
        client_app: ClientAppCall,
        run_config: Mapping[str, bool | int | float | str],
        num_partitions: int,
    ) -> None:
        self._client_app = client_app
        self._contexts = {
            partition + 1: Context(
                run_id=1,
                node_id=partition + 1,
                node_config={
                    "partition-id": partition,
                    "num-partitions": num_partitions,
                    IN_PROCESS: True,
                },
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for partition in range(num_partitions)
        }
        self._pending: dict[str, Message] = {}
        self._ids = (f"message-{i}" for i in itertools.count())
        self._run = Run.create_empty(1)
        # Flower's runtimes set these before an app starts; Message() reads them.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0

    def set_run(self, run: Run) -> None:
        """Set the run's description."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's description."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; a site is called when its reply is pulled."""
        ids = []
        for message in messages:
            message_id = next(self._ids)
            message.metadata.__dict__["_message_id"] = message_id
            self._pending[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Call the site of the first pending message and return its reply only.

        One at a time, so that a reply can be consumed before the next one takes memory.
        """
        for message_id in message_ids:
            if message_id in self._pending:
                return [self._call(self._pending.pop(message_id))]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and return all replies, as a list."""
        pending = list(self.push_messages(messages))
        replies: list[Message] = []
        while len(replies) < len(pending):
            replies += self.pull_messages(pending)
        return replies

    def _call(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            return self._client_app(message, context)
        except Exception:  # a crash becomes an error reply, as in Flower's runtimes
            return Message(Error(CLIENT_APP_RAISED, traceback.format_exc()), reply_to=message)


def run_in_process(config: Config, listener: Listener) -> None:
    """Run server and sites in this process."""
    quiet_libraries()
    from grandrounds import client_app, server_app
    from grandrounds.site import steps
    from grandrounds.site.devices import group

    if config.is_personal:  # the sites keep their own adapters below it
        place = str(with_run_directory(config)[0]["run-directory"])
        federation = dataclasses.replace(config.federation, run_directory=place)
        config = dataclasses.replace(config, federation=federation)
    with listener, steps.watched(listener.on_step):
        grid = InProcessGrid(client_app.app, config.flat(), config.data.num_partitions)
        try:
            server_app.federate(grid, config, listener)
        finally:
            group.end()
