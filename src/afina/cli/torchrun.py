"""The command line in the processes of torchrun: one of them speaks. No torch here, where there is one process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def print_from_main_process_only() -> Iterator[None]:
    """Within the block all processes but the first are silent: they would say the same. Errors pass."""
    if not _number():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def is_first_failure() -> bool:
    """Whether this process has to tell its error: the others fail alike, or because this one did."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return True
    from afina.training.setup.processes import world

    try:
        return world().first_to_fail()
    except Exception:  # they have not met, or whoever counts is gone: better told twice than never
        return True


def _number() -> int:
    """Which of the processes this is, from 0."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0
