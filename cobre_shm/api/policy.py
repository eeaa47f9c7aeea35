"""The policy that a training finds: what the water in store is worth at the end of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cobre_shm.sddp.cuts import StageCuts
from cobre_shm.sddp.errors import OutOfRange

if TYPE_CHECKING:
    from cobre_shm.sddp.training_result import TrainingDetails

__all__ = ["Policy"]


class Policy:
    """Cuts by stage, with the names of the state components that they are functions of.

    Args:
        stages: Ids of the stages, in order, as the case has them.
        cuts: Cuts of each stage.
        components: Of the state, in the order of a cut's coefficients: ``(kind, hydro id, lag,
            unit)``, with kind ``storage`` or ``inflow_lag``.
    """

    def __init__(
        self,
        stages: Sequence[int],
        cuts: Sequence[StageCuts],
        components: Sequence[tuple[str, int, int, str]],
    ) -> None:
        if len(stages) != len(cuts):
            raise ValueError(f"cuts of {len(stages)} stages are needed, not of {len(cuts)}")
        self.stages: tuple[int, ...] = tuple(stages)
        self.components: tuple[tuple[str, int, int, str], ...] = tuple(components)
        self._cuts = tuple(cuts)

    @classmethod
    def of(cls, result: TrainingDetails) -> Policy:
        """Return the policy of a training."""
        ids = [stage.id for stage in result.case.horizon.stages]
        return cls(ids, result.cuts, result.case.state_names())

    def __repr__(self) -> str:
        count = sum(len(cuts) for cuts in self._cuts)
        return (
            f"<Policy of {len(self.stages)} stages, {count} cuts, "
            f"{len(self.components)} state components>"
        )

    def cuts(self, stage: int) -> StageCuts:
        """Return the cuts of a stage: future cost >= intercept + coefficients @ state, in $.

        Args:
            stage: Its id.

        Raises:
            OutOfRange: There is no such stage.
        """
        return self._cuts[self._position(stage)]

    def all_cuts(self) -> tuple[StageCuts, ...]:
        """Return the cuts of every stage, in the order of the stages."""
        return self._cuts

    def evaluate(self, stage: int, state: npt.ArrayLike) -> float:
        """Return the cost of all stages after ``stage`` as the policy sees it, in $.

        That is the highest of the stage's cuts at ``state``, discounted to the end of the stage,
        and at least 0, as in the stage's problem; 0 as well where there are no cuts, as after the
        last stage.

        Args:
            stage: Its id.
            state: float64, one value per component, at the end of the stage.

        Raises:
            OutOfRange: There is no such stage, or ``state`` has another number of components.
        """
        cuts = self.cuts(stage)
        values = np.asarray(state, dtype=np.float64).reshape(-1)
        if len(values) != len(self.components):
            raise OutOfRange(
                f"a state has {len(self.components)} components, not {len(values)}",
                context={
                    "field": "state",
                    "value": len(values),
                    "expected": len(self.components),
                },
            )
        return float(np.max(cuts.intercept + cuts.coefficients @ values, initial=0.0))

    def save(self, directory: str | Path) -> None:
        """Write ``cuts.parquet`` and ``state.json``, as the output of a training has them.

        Raises:
            OutputError: They cannot be written.
            MissingDependency: pyarrow is not installed.
        """
        from cobre_shm.sddp.results import write_policy

        write_policy(Path(directory), self.stages, self._cuts, self.components)

    @classmethod
    def load(cls, directory: str | Path) -> Policy:
        """Read what :meth:`save` wrote, or the folder ``policy`` of a training's output.

        Raises:
            MissingFile: A file is not there.
            ParseError: A file cannot be read.
            SchemaViolation: The two files do not belong together.
            MissingDependency: pyarrow is not installed.
        """
        from cobre_shm.sddp.policy_files import read_policy

        stored = read_policy(directory)
        return cls(stored.stages, stored.cuts, stored.components)

    def _position(self, stage: int) -> int:
        try:
            return self.stages.index(stage)
        except ValueError:
            listed = f"{self.stages[0]}..{self.stages[-1]}" if self.stages else "none"
            raise OutOfRange(
                f"there is no stage {stage!r}: the policy has the stages {listed}",
                context={"field": "stage", "value": repr(stage), "expected": list(self.stages)},
            ) from None
