"""How many devices of this machine a visit trains on."""

from __future__ import annotations

import torch

from grandrounds.config.keys import Config
from grandrounds.waiting import usable_cpus


def processes(config: Config) -> int:
    """Return the number of processes that compute a visit: one for each device, this one included.

    `train.devices`, at most the GPUs in view or the CPUs of this process. With fewer of them, each
    computes several shares of a batch in turn; the result is the same, bit for bit. A private visit
    has one.
    """
    if config.train.devices == 1 or config.is_private:
        return 1
    there = torch.cuda.device_count() if torch.cuda.is_available() else usable_cpus()
    return min(config.train.devices, there)
