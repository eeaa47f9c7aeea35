"""What a worker does for ``train`` and ``simulate``.

The task comes from the process that started the worker, which pickled it. What goes back is plain
data (see ``plain.py``): rank 0 sends the result, and every rank its progress.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cobre_shm.api.plain import encode
from cobre_shm.api.result import ProgressEvent
from cobre_shm.communicator import Communicator
from cobre_shm.sddp import simulate, train
from cobre_shm.sddp.case import Case
from cobre_shm.sddp.cuts import StageCuts
from cobre_shm.sddp.training_result import Iteration
from cobre_shm.selection.factory import create_communicator
from cobre_shm.spawn.frames import Channel

__all__ = ["SimulationTask", "TrainingTask", "carry_out"]


@dataclass(frozen=True)
class TrainingTask:
    """A training."""

    case: Case
    output_dir: Path | None
    wants_progress: bool
    options: dict[str, Any]

    def run(self, comm: Communicator, channel: Channel) -> Any:
        """Do this rank's part."""
        limit = self.case.config.iteration_limit

        def tell(item: Iteration) -> None:
            event = ProgressEvent.of(item, comm.rank, limit)
            channel.send_event(json.dumps(asdict(event)).encode())

        return train(
            self.case,
            comm,
            output_dir=self.output_dir,
            progress=tell if self.wants_progress else None,
            should_stop=channel.is_stopping,
            **self.options,
        )


@dataclass(frozen=True)
class SimulationTask:
    """A simulation."""

    case: Case
    cuts: Sequence[StageCuts]
    scenarios: int | None
    output_dir: Path | None

    def run(self, comm: Communicator, _channel: Channel) -> Any:
        """Do this rank's part."""
        return simulate(self.case, self.cuts, comm, self.scenarios, output_dir=self.output_dir)


def carry_out(channel: Channel, task: bytes) -> bytes:
    """Do this rank's part of the task; rank 0 returns the result, without the case."""
    work: TrainingTask | SimulationTask = pickle.loads(task)
    with create_communicator() as comm:
        result = work.run(comm, channel)
        # Who asked has the case.
        return encode(replace(result, case=None)) if comm.rank == 0 else b""
