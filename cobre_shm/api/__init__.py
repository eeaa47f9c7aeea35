"""Library mode: training and simulation called from a program, which chooses the backend itself.

    training      train(), simulate()
    asynchronous  train_async()
    place         where the ranks are: this process, workers started here, a group started elsewhere
    worker        what a worker does
    plain         results as messages
    result        what comes back: TrainingResult, History, WorkerInfo, ProgressEvent
    policy        Policy: the cuts, by stage

The names are those of ``cobre_shm`` itself: ``cobre_shm.train(...)``.
"""
