"""Fine-tuning jobs: the worker, the process of a job, the watcher of its run folder."""
