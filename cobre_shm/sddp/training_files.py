"""The files from which a training begins, and those that it leaves behind on its way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cobre_shm.errors import IncompatibleSettings
from cobre_shm.sddp.checkpoint import FILE_NAME
from cobre_shm.sddp.config import CheckpointSchedule, Config

# The reason of a training that ended because it was asked to.
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class TrainingFiles:
    """From which files a training begins, and which it leaves behind on its way; None: from none.

    Attributes:
        directory: The output directory.
        schedule: When to write checkpoints.
        resumes: Whether to go on from the checkpoint in the output directory, if there is one.
        warm_start: The policy directory with cuts to begin with.
    """

    directory: Path | None
    schedule: CheckpointSchedule | None
    resumes: bool
    warm_start: Path | None

    @property
    def checkpoint(self) -> Path | None:
        """Where checkpoints are written."""
        return None if self.directory is None else self.directory / "policy" / FILE_NAME

    @property
    def resume_from(self) -> Path | None:
        """The checkpoint to go on from, if it exists: the one that this training writes."""
        return self.checkpoint if self.resumes else None

    def writes_checkpoint(self, iteration: int, reason: str) -> bool:
        """Tell whether a checkpoint is written after an iteration.

        Args:
            iteration: Number of the iteration, from 1.
            reason: Why the training ends after it, or nothing if it goes on.
        """
        if self.directory is None:
            return False
        if self.schedule is None:
            return reason == INTERRUPTED
        return bool(reason) or self.schedule.is_due(iteration)


def training_files(
    config: Config,
    output_dir: str | Path | None,
    every: int | None,
    resume: bool | None,
    warm_start: str | Path | None,
) -> TrainingFiles:
    """Return the files of a training from the wishes of its caller, which come before the case's.

    Raises:
        IncompatibleSettings: Checkpoints are asked for without an output directory.
    """
    directory = None if output_dir is None else Path(output_dir)
    schedule = config.checkpoints if every is None else CheckpointSchedule(every, every)
    resumes = config.policy_mode == "resume" if resume is None else resume
    if directory is None and (every is not None or resumes):
        setting = "policy.mode" if resume is None else "resume"
        if every is not None:
            setting = "checkpoint_every"
        raise IncompatibleSettings(
            f"{setting} needs an output directory, where the checkpoints are",
            context={"setting": setting},
            suggestion="Give an output directory; to resume, that of the run that is to go on",
        )
    if warm_start is None and config.policy_mode == "warm_start":
        warm_start = (directory or Path()) / config.policy_path
    return TrainingFiles(
        directory=directory,
        schedule=schedule,
        resumes=resumes,
        warm_start=None if warm_start is None else Path(warm_start),
    )
