"""A stage problem as arrays, and where its quantities stand among columns and rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cobre_shm.sddp.scenarios import InflowModel

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int32]


@dataclass
class Layout:
    """Where the quantities of a stage stand among columns and rows.

    Lists are by position of the entity; inner lists are by block. None stands for a quantity
    that the stage does not have.
    """

    storage: list[int] = field(default_factory=list)
    start_storage: list[int] = field(default_factory=list)
    lags: list[int] = field(default_factory=list)
    noise_inflow: list[int] = field(default_factory=list)
    inflow: list[int] = field(default_factory=list)
    theta: int = 0
    turbined: list[list[int]] = field(default_factory=list)
    spilled: list[list[int]] = field(default_factory=list)
    diverted: list[list[int] | None] = field(default_factory=list)
    thermal: list[list[int]] = field(default_factory=list)
    direct: list[list[int]] = field(default_factory=list)
    reverse: list[list[int]] = field(default_factory=list)
    source: list[list[int] | None] = field(default_factory=list)
    deficit: list[list[list[int]]] = field(default_factory=list)
    excess: list[list[int]] = field(default_factory=list)
    random_load: dict[int, list[int]] = field(default_factory=dict)
    inflow_slack: list[int] = field(default_factory=list)
    withdrawal_slack: list[tuple[int, int] | None] = field(default_factory=list)
    water_rows: list[int] = field(default_factory=list)
    load_rows: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class StageLp:
    """One stage problem; arrays are float64 by column or row, the matrix is by rows.

    Attributes:
        index: Position of the stage.
        stage_id: Id of the stage.
        hours: Length of each block.
        discount: Cost of ``theta``.
        layout: Where each quantity stands.
        inflow: The inflow model of the stage.
        productivity: MW per m3/s of each hydro plant at this stage.
        state_columns: Columns fixed to the state, in state order.
        next_state_columns: Columns that hold the next state, in state order.
        noise_columns: Columns whose bounds follow from the noise.
        cost, lower, upper, row_lower, row_upper, starts, indices, values: The problem.
    """

    index: int
    stage_id: int
    hours: tuple[float, ...]
    discount: float
    layout: Layout
    inflow: InflowModel
    productivity: Floats
    state_columns: Indices
    next_state_columns: Indices
    noise_columns: Indices
    cost: Floats
    lower: Floats
    upper: Floats
    row_lower: Floats
    row_upper: Floats
    starts: Indices
    indices: Indices
    values: Floats

    @property
    def theta_column(self) -> int:
        """Column of the future cost."""
        return self.layout.theta
