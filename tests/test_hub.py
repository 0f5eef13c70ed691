"""Uploads, to a stand-in for the hub on this machine, by processes that are told it is the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cytoclip import hub
from cytoclip.errors import ExitCode, UserError
from tests import hub_stand_in


def pushed(address: str, tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_of_the_test",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "cytoclip", "export", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_an_export_is_uploaded_whole_and_private(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with hub_stand_in.running() as there:
        words = (str(base), "--to", str(out), "--format", "hf")
        done = pushed(there.address, tmp_path, *words, "--push", "lab/pap-clip")
        assert not done.returncode, done.stderr
        (made,) = there.made
        assert (made["organization"], made["name"]) == ("lab", "pap-clip")
        assert made.get("visibility") == "private" or made.get("private") is True  # by version of huggingface_hub
        assert there.tokens == {"Bearer hf_of_the_test", ""}, "an address to put bytes at knows who may"
        assert f"{there.address}/lab/pap-clip" in done.stdout
        assert there.files == {path.name: path.read_bytes() for path in out.iterdir()}
        assert "model.safetensors" in there.files
        assert '\nfolder = snapshot_download("lab/pap-clip")\n' in there.files["README.md"].decode()

        there.files["adapter_config.json"] = b"{}"  # on top of a model, transformers would put an adapter
        again = (*words[:2], str(tmp_path / "again"), *words[3:], "--push", "lab/pap-clip")
        mixed = pushed(there.address, tmp_path, *again)
        assert mixed.returncode == ExitCode.SYSTEM
        assert "lab/pap-clip holds files that are not of it: adapter_config.json" in mixed.stderr
        there.refuses, there.files = True, {}
        refused = pushed(there.address, tmp_path, *words[:2], str(tmp_path / "kept"), *words[3:], "--push", "lab/other")
        assert refused.returncode == ExitCode.SYSTEM
        assert "could not be uploaded to lab/other" in refused.stderr
        assert "hint: log in with `hf auth login`" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert (tmp_path / "kept" / "model.safetensors").is_file()
        assert not there.files
        by_hand = f"hf upload lab/other {tmp_path / 'kept'} --private"
        assert by_hand in refused.stderr
        again = pushed(there.address, tmp_path, *words[:2], str(tmp_path / "kept"), *words[3:], "--push", "lab/other")
        assert f"hint: it is exported, and uploaded by: {by_hand}; " in again.stderr


def test_a_hub_that_cannot_be_reached_is_said(tmp_path: Path) -> None:
    """Its HTTP library has errors of its own, which are none of Python's."""
    (tmp_path / "out").mkdir()
    program = (
        "from pathlib import Path; from cytoclip import hub; from cytoclip.console import Console\n"
        "from cytoclip.errors import UserError\n"
        f"try: hub.upload(Path({str(tmp_path / 'out')!r}), 'lab/x', Console(quiet=True))\n"
        "except UserError as error: print(error.lines())"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert f"error: {tmp_path / 'out'} is exported, but could not be uploaded to lab/x: " in done.stdout, done.stderr
    assert f"hf upload lab/x {tmp_path / 'out'} --private" in done.stdout


@pytest.mark.parametrize(
    "name", ["model", "a/b/c", "../b", "lab/..", "lab/a--b", "lab/", "/lab", "lab/ä", "http://x/y"]
)
def test_what_is_no_repository_is_refused(name: str) -> None:
    hub.refuse("my-lab/pap_clip.v2")
    with pytest.raises(UserError, match="is no repository of the hub"):
        hub.refuse(name)
