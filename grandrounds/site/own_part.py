"""The part of the adapter that a site trains in its visits and keeps: it never travels.

`shared-a`: the factors B, while A is shared and aggregated (FedSA-LoRA: Guo et al., Selective
Aggregation for Low-Rank Adaptation in Federated Learning, 2024). B starts at zero at each site.

`dual`: a private adapter of the run's rank beside the shared one, W + s (B_s A_s + B_p A_p), both
trained together, as in FedDPA (Yang et al., Dual-Personalizing Adapter for Federated Foundation
Models, 2024) and FDLoRA (Qi et al., 2024), without their later fusion or weighting by input. Its A
is drawn from the run's seed and the site's number, its B starts at zero.

A real site keeps it with its state of the run. Where all sites are on one machine, it lies in the
run directory, one file for each visit, so that a resumed run finds that of the round it resumes:

    sites/parts/site-3/000007.safetensors    after round 7
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.app import RecordDict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from grandrounds.config.keys import Config
from grandrounds.errors import DataError, first_line
from grandrounds.storage import flush_folder
from grandrounds.wire import messages
from grandrounds.wire.adapter import (
    Adapter,
    Ranks,
    Shapes,
    assemble,
    drawn_adapter,
    factor_of,
    rank_index,
    shapes_of,
)
from grandrounds.wire.personal import PARTS

_RECORD = "grandrounds-own-part"
_INSTEAD = "Restore it from a copy, or start a new run."


@dataclass(frozen=True)
class OwnPart:
    """What one site keeps of its own in a run."""

    config: Config
    """The run's."""
    site: int
    """The site's number."""
    state: RecordDict
    """What the site keeps between messages."""
    folder: Path | None = None
    """Where a rehearsal keeps personal adapters; None: in `state`."""

    def beside(
        self, adapter: Adapter, shapes: Shapes, after_round: int, *, has_trained: bool = False
    ) -> Adapter:
        """Return a resident adapter with the site's own part in it.

        Parameters
        ----------
        adapter
            The received one, at the resident rank.
        shapes
            The whole adapter's tensors at its configured rank.
        after_round : int
            The last round whose visit may have left the part.
        has_trained : bool
            Whether the site has trained up to that round, so that there is one in a rehearsal.

        Raises
        ------
        DataError
            If the part cannot be read, is of another adapter, or is gone.
        """
        ranks, seed = Ranks.of(self.config), self.config.federation.seed
        part = self.read(after_round)
        if part is None and has_trained and self.folder is not None:
            raise DataError(
                f"{self._place()} has nothing of a round up to {after_round}, though site "
                f"{self.site} has trained. {_INSTEAD}"
            )
        own = {n: s for n, s in shapes.items() if not ranks.stays or factor_of(n) in ranks.stays}
        if part is not None and shapes_of(part) != own:
            raise DataError(
                f"What site {self.site} keeps of its own{self._named(after_round)} has other "
                f"tensors than this run's adapter. {_INSTEAD}"
            )
        if ranks.stays:
            return {**adapter, **(part or {})}
        fresh = drawn_adapter(shapes, seed, 0, self.site)
        resident = {name: tensor.shape for name, tensor in adapter.items()}
        shared = {n: tensor[rank_index(n, slice(0, ranks.rank))] for n, tensor in adapter.items()}
        return assemble(resident, (shared, 0), (part or fresh, ranks.rank))

    def of(self, adapter: Adapter) -> Adapter:
        """Return the site's own part of a resident adapter."""
        ranks = Ranks.of(self.config)
        if ranks.stays:
            return {n: tensor for n, tensor in adapter.items() if factor_of(n) in ranks.stays}
        return {n: tensor[rank_index(n, ranks.private)].copy() for n, tensor in adapter.items()}

    def read(self, after_round: int) -> Adapter | None:
        """Return the part that the last visit up to a round left; None before any.

        Raises
        ------
        DataError
            If its file cannot be read.
        """
        if self.folder is None:
            record = self.state.array_records.get(_RECORD)
            return None if record is None else {n: array.numpy() for n, array in record.items()}
        file = self._file(after_round)
        if file is None:
            return None
        try:
            found: Adapter = load_file(file)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{file}, what site {self.site} keeps of its own, cannot be read "
                f"({first_line(error)}). {_INSTEAD}"
            ) from error
        return found

    def write(self, round_number: int, part: Adapter) -> None:
        """Keep the part that a visit left, and of the earlier ones those that a resume may need."""
        if self.folder is None:
            self.state[_RECORD] = messages.to_arrays(part)
            return
        place = self._place()
        place.mkdir(parents=True, exist_ok=True)
        file = place / f"{round_number:06d}.safetensors"
        partial = file.with_suffix(".partial")
        save_file({name: tensor.copy() for name, tensor in part.items()}, partial)
        partial.replace(file)
        flush_folder(place)
        needed = needed_rounds(
            [int(file.stem) for file in self._files()], self.config.train.save_every_round
        )
        for file in self._files():
            if int(file.stem) not in needed:
                file.unlink()

    def _file(self, after_round: int) -> Path | None:
        """Return the file of the last visit up to a round; None before any."""
        files = [file for file in self._files() if int(file.stem) <= after_round]
        return files[-1] if files else None

    def _named(self, after_round: int) -> str:
        """Return where a part of a rehearsal lies, in brackets."""
        return "" if self.folder is None else f" ({self._file(after_round)})"

    def _place(self) -> Path:
        run = Path() if self.folder is None else self.folder.parent
        return run / PARTS / f"site-{self.site}"

    def _files(self) -> list[Path]:
        return sorted(f for f in self._place().glob("*.safetensors") if f.stem.isdecimal())


def needed_rounds(rounds: Sequence[int], save_every: int) -> set[int]:
    """Return the rounds whose parts stay: the last three, and the last before each checkpoint.

    A round may be played again after a resume, whose visit starts from the part before it.
    """
    kept = set(rounds[-3:])
    for checkpoint in range(save_every, max(rounds, default=0) + 1, save_every):
        kept |= set([number for number in rounds if number <= checkpoint][-1:])
    return kept
