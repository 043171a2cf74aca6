"""Running a model that is not ours: batches, modules, processes, run folders."""
