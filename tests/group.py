"""Start the processes of a run as a launcher does, but without one, and look at how each of them ends."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROJECT = Path(__file__).parents[1]


def free_port() -> int:
    """Below the ports that systems give out by themselves: no other connection takes it before the group meets."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


@contextmanager
def started(code: str, arguments: list[str], processes: int = 2) -> Iterator[list[subprocess.Popen[str]]]:
    """`python -c code arguments` in each process of a gloo group; none outlives the block."""
    port = free_port()
    group = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            },
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        yield group
    finally:
        for process in group:
            process.kill()
            process.communicate()


def until(happened: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)
