"""Groups of processes that do not import anything: one process did so once, and each of them is a fork of it.

A process that trains spends five seconds on imports before a second on a test's steps. `spawn` is all that tests call;
run as a module this file is the process that imports, and answers each line of its input, {"module", "arguments",
"environments": what each process has besides, "said": a file for what each of them says}, with a line of exit codes,
negative for a signal, or null for one that was killed because it took too long.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests.group import PROJECT, free_port

SECONDS = 300.0


def spawn(module: str, arguments: list[str], processes: int, code: int = 0) -> None:
    """Run a module as a gloo group; each process must end with `code`, and with the word done if that is 0."""
    port = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        said = [str(Path(folder, str(rank))) for rank in range(processes)]
        where = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        each = [{**where, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        asked = {"module": module, "arguments": arguments, "environments": each, "said": said}
        server = _server()
        assert server.stdin
        assert server.stdout
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        codes, texts = json.loads(server.stdout.readline()), [Path(file).read_text() for file in said]
    assert codes == [code] * processes, (codes, texts)
    assert code or all(text.strip().endswith("done") for text in texts), texts


@functools.cache
def _server() -> subprocess.Popen[str]:
    """It ends when its input does, which is when this process ends."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.numerics.nursery"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=PROJECT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _answer(asked: dict[str, Any]) -> list[int | None]:
    pids = [
        _forked(asked["module"], asked["arguments"], environment, said)
        for environment, said in zip(asked["environments"], asked["said"], strict=True)
    ]
    end = time.monotonic() + SECONDS
    codes: list[int | None] = []
    for pid in pids:
        ended = os.pidfd_open(pid)
        seen = select.select([ended], [], [], max(0.0, end - time.monotonic()))[0]
        os.close(ended)
        if not seen:
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        codes.append(code if seen else None)
    return codes


def _forked(module: str, arguments: list[str], environment: dict[str, str], said: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        written = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for stream in (1, 2):
            os.dup2(written, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ |= environment
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    import tests.numerics.preloaded  # noqa: F401 - what the forks would import each by itself

    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)
