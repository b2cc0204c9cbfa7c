"""The command line in the processes of torchrun: one of them prints. No torch for one process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def print_from_main_process_only() -> Iterator[None]:
    """Discard the output of all processes but the main one within the block; errors pass."""
    if not _rank():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def is_first_failure() -> bool:
    """Return whether this process prints its error: others fail alike, or because of it."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return True
    from afina.training.setup.processes import world

    try:
        return world().first_to_fail()
    except Exception:  # process group missing or broken: print on every rank rather than on none
        return True


def _rank() -> int:
    """Return the rank of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0
