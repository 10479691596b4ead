"""What a node's configuration says about who holds the data."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from grandrounds.errors import PolicyError

AGENT = "agent"
"""Key: the address of the site's agent."""

SITE = "site"
"""Key: the path of the site's site.toml."""

DATA_OF_THE_RUN = "data-of-the-run"
"""Key: `true` lets a SuperNode that has neither use the data that a run names."""

IN_PROCESS = "in-process"
"""Key: whether the node is one of the in-process engine."""


def is_one_machine(node: Mapping[str, Any]) -> bool:
    """Whether all sites are on the machine of the server: in process, or in Flower's simulation.

    A simulation runs its sites in workers of Ray, a SuperNode does not.
    """
    ray = sys.modules.get("ray")
    return node.get(IN_PROCESS) is True or (ray is not None and bool(ray.is_initialized()))


def check_choice(node: Mapping[str, Any]) -> None:
    """Raise `PolicyError` unless a SuperNode without agent and site.toml was started so on purpose.

    Whoever starts a run names the data then, and nothing limits what it asks or what leaves.
    """
    if node.get(DATA_OF_THE_RUN) is not True:
        raise PolicyError(
            "This site has neither an agent nor a site.toml, so the run would name its data, with "
            "no policy and no audit log. Set up a site (grandrounds site init) and start the "
            "SuperNode with the command that grandrounds site supernode prints; or, if the run "
            f"may name the data, add {DATA_OF_THE_RUN}=true to the SuperNode's --node-config."
        )
