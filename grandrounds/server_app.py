"""The ServerApp: a run from beginning to end.

Started by `grandrounds run` in process, or by Flower as the app's ServerApp (`flwr run .`).
"""

from __future__ import annotations

from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from grandrounds.config.keys import Config
from grandrounds.config.recipes import resolve
from grandrounds.errors import GrandRoundsError
from grandrounds.quiet import quiet_libraries
from grandrounds.server import lifecycle, resumption, rounds
from grandrounds.server.listeners import Listener
from grandrounds.server.listeners.plain import PlainReporter
from grandrounds.server.listeners.trackers import tracked

app = ServerApp()

LAST_SECONDS = 60.0
"""How long a resumed run waits for the ServerApp before it, which ends some seconds after its
SuperLink was killed."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation of Flower's run config, with plain progress lines."""
    quiet_libraries()
    config = resolve(context.run_config)
    if config.federation.resume_from:
        config = resumption.continued(config, patience_seconds=LAST_SECONDS)
        for damage in resumption.check(config):
            print(f"warning: {damage}", flush=True)
    with tracked(config, PlainReporter(config)) as listener:
        federate(grid, config, listener)


def federate(grid: Grid, config: Config, listener: Listener) -> dict[str, Any]:
    """Train one adapter across the sites of the grid; return the summary.

    Raises
    ------
    GrandRoundsError
        If the run cannot start, or a round has too few good replies. Finished rounds are kept.
    """
    run = lifecycle.begin(grid, config, listener)
    try:
        lifecycle.open_session(run)
        if not run.directory.read_metrics():
            rounds.record_start(run)
        while run.state.round < config.federation.num_server_rounds:
            rounds.play_round(run)
        summary = lifecycle.finish(run)
    except KeyboardInterrupt:
        kept = lifecycle.fail(run, "stopped", "interrupted")
        raise KeyboardInterrupt(kept) from None
    except GrandRoundsError as error:
        kept = lifecycle.fail(run, "failed", str(error))
        raise type(error)(f"{error} {kept[0].upper()}{kept[1:]}") from error
    except Exception as error:
        lifecycle.fail(run, "failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        run.directory.release()
    listener.on_finished({**summary, "directory": str(run.directory.path)})
    return summary
