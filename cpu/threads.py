"""How the threads of a CPU wait for each other."""

import os


def let_threads_sleep() -> None:
    """Has a thread that waits for others sleep soon; call it before torch is imported.

    A thread tries GOMP_SPINCOUNT times before it sleeps. GNU OpenMP's default takes some
    milliseconds, which doubles a step's time beside another program.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
