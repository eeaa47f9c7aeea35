"""Training from asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cobre_shm.api.place import find_place
from cobre_shm.api.result import TrainingResult
from cobre_shm.api.training import ProgressCallback, train_at, trainer_options
from cobre_shm.communicator import Communicator
from cobre_shm.sddp.case import Case
from cobre_shm.spawn.cancellation import Cancellation

__all__ = ["train_async"]


async def train_async(
    case: Case | str | Path,
    *,
    backend: str = "auto",
    num_workers: int = 1,
    coordinator: str | None = None,
    rank: int | None = None,
    size: int | None = None,
    comm: Communicator | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    progress_callback: ProgressCallback | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
) -> TrainingResult:
    """Train as :func:`cobre_shm.train` does, without keeping the event loop from its work.

    The call runs in a thread of its own, and so does ``progress_callback``. When the awaiting task
    is cancelled, workers are ended within a second, and a training in this process after the
    problem that it solves; what waits for ranks that are started elsewhere waits for them, or for
    their time limit. Only then is the cancellation raised: nothing is left behind.

    Args:
        case: As for :func:`cobre_shm.train`, like everything else.
        backend: Name of the communication backend.
        num_workers: Number of processes to start, or 1 for this one.
        coordinator: Address of rank 0, for tcp.
        rank: Of this process in a group that is started elsewhere.
        size: Number of ranks of that group.
        comm: A communicator to use instead.
        config_overrides: Values that replace those of ``config.json``.
        progress_callback: Called after every iteration.
        output_dir: Where the results are written.
        resume: Whether to go on from a checkpoint.

    Raises:
        asyncio.CancelledError: The awaiting task was cancelled.
        CobreError: As for :func:`cobre_shm.train`.
        RuntimeError: ``progress_callback`` raised StopIteration, which is its ``__cause__``; any
            other exception comes out as it is.
    """
    place = find_place(backend, num_workers, coordinator, rank, size, comm)
    options = trainer_options(resume, output_dir)
    loop = asyncio.get_running_loop()
    with Cancellation() as cancellation:
        # One thread for the whole call: the kernel ties the workers' lives to it.
        executor = ThreadPoolExecutor(1, thread_name_prefix="cobre-train")
        try:
            future = loop.run_in_executor(
                executor,
                _train,
                place,
                case,
                config_overrides,
                progress_callback,
                output_dir,
                options,
                cancellation,
                cancellation.check,
            )
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                cancellation.request()
                while not future.done():
                    # Cancelled again or not, the thread has to end first.
                    try:
                        await asyncio.wait([future])
                    except asyncio.CancelledError:
                        continue
                if not future.cancelled():
                    future.exception()
                raise
        finally:
            # Also where the coroutine is dropped, when nothing can be awaited any more. After the
            # end it does no harm.
            cancellation.request()
            executor.shutdown()


def _train(*arguments: Any) -> TrainingResult:
    try:
        return train_at(*arguments)
    except StopIteration as error:
        # A future of asyncio takes none, and would never be done; generators say the same.
        raise RuntimeError("progress_callback raised StopIteration") from error
