"""The commands of docs/guide/serve.md, typed as they stand there, and the numbers it names."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cytoclip import desk, serve
from tests import served
from tests.typed import Run

HERE = Path(__file__).parents[1]
PAGE = (HERE / "docs" / "guide" / "serve.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_commands_in_order(
    sample: served.Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sample.root, tmp_path / "path" / "to" / "data_root")
    shutil.copytree(sample.model, tmp_path / "runs" / "first")
    for name, number in (("query", 1), ("other", 2)):
        shutil.copy(sample.picture(number), tmp_path / f"{name}.png")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    (index, start), asked = (block.replace("7861", port).splitlines() for block in BLOCKS)
    assert run(*shlex.split(index)[1:]).code == 0
    command = [sys.executable, "-m", *shlex.split(start)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr
            assert any(f"http://127.0.0.1:{port} is open" in line for line in server.stderr)
            answers = said_to(asked)
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)
    assert server.returncode == 128 + signal.SIGINT
    assert len(answers) == 7
    assert len(answers[0]["hits"]) == 5
    assert {hit["keys"]["label"] for hit in answers[1]["hits"]} == {"koilocyte"}
    assert len(answers[2]["hits"]) == 5
    assert Path("thumb.jpg").read_bytes()[:2] == b"\xff\xd8"
    assert [one["caption"] for one in answers[4]["captions"]] == ["a koilocyte", "a parabasal cell"]
    assert [len(answers[5][kind]) for kind in ("images", "texts")] == [2, 1]
    assert answers[6]["status"] == "ok"


def said_to(asked: list[str]) -> list[Any]:
    """What each curl prints, as JSON; ID is that of the first hit."""
    found: list[Any] = []
    for line in asked:
        words = shlex.split(line.replace("ID", str(found[0]["hits"][0]["id"])) if found else line)
        out = subprocess.run([*words, "-s", "--fail-with-body"], capture_output=True, text=True, check=True).stdout
        found.append(json.loads(out) if out else None)
    return found


def test_the_numbers_are_those_of_the_code() -> None:
    prose = " ".join(PAGE.split())
    assert f"at least {serve.SHORTEST} characters" in prose
    assert f"{desk.UPLOAD_BYTES // 10**6} MB and {desk.UPLOAD_PIXELS // 10**6} million pixels" in prose
    assert f"({desk.HELD_BYTES // 10**6} MB of all together" in prose
    assert f"up to {desk.BATCH_PICTURES} pictures and {desk.BATCH_TEXTS} texts in up to 64 MB" in prose
    assert f"listens on {serve.Where().port}" in prose
