"""What is built is what is installed: the wheel works alone, with its types and without tests and docs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import cytoclip

HERE = Path(__file__).parents[1]


def call(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    made = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    return made.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist), built from a copy, with this environment's setuptools: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "dist", "build", "demo", "runs")
    shutil.copytree(HERE, folder / "copy", ignore=ignored)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=folder / "copy")
    (wheel,), (sdist,) = ((folder / "dist").glob(pattern) for pattern in ("*.whl", "*.tar.gz"))
    return wheel, sdist


@pytest.mark.slow  # builds a wheel and an sdist: 15 s
def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(built[0]).namelist())
    modules = {f"cytoclip/{p.name}" for p in (HERE / "src" / "cytoclip").glob("*.py")}
    assert len(modules) > 20
    inside = {name for name in names if ".dist-info/" not in name}
    pages = {
        f"cytoclip/{p.name}" for p in (HERE / "src" / "cytoclip").iterdir() if p.suffix in (".html", ".css", ".js")
    }
    assert len(pages) == 16
    assert inside == {*modules, *pages, "cytoclip/py.typed", "cytoclip/templates.yaml"}, (
        "without py.typed nobody's mypy reads our types, without a page no --html and no report"
    )
    assert built[0].name == f"cytoclip-{cytoclip.__version__}-py3-none-any.whl"
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow  # builds a wheel and an sdist: 15 s
def test_the_sdist_builds_that_wheel_again(built: tuple[Path, Path]) -> None:
    """`python -m build` makes the wheel out of the sdist, so what the first test saw came through it."""
    with tarfile.open(built[1]) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/cytoclip/py.typed", "src/cytoclip/cli.py"} <= names


@pytest.mark.slow  # makes a virtual environment and imports in it: 20 s
def test_the_installed_command_works_in_an_environment_of_its_own(built: tuple[Path, Path], tmp_path: Path) -> None:
    """From another folder, without this source tree in sight; the dependencies are lent by a .pth file."""
    home = tmp_path / "env"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    call(python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", str(built[0]), cwd=tmp_path)
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # A .pth inside a folder that a .pth names is not read, so this project's editable install stays out of sight.
    found = call(python, "-c", "import cytoclip; print(cytoclip.__file__, cytoclip.__version__)", cwd=tmp_path)
    assert found.split() == [str(site / "cytoclip" / "__init__.py"), cytoclip.__version__]
    said = call(home / "bin" / "cytoclip", "--help", cwd=tmp_path)
    assert all(command in said for command in ("train", "evaluate", "config", "demo"))
    assert "train.learning_rate" in call(python, "-m", "cytoclip", "config", cwd=tmp_path)
    imported = call(python, "-c", "import cytoclip.training; print(cytoclip.training.__file__)", cwd=tmp_path)
    assert imported.strip() == str(site / "cytoclip" / "training.py")
