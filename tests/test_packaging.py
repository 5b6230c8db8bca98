"""The wheel and the source archive, built as a release is and used without this checkout."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(the source archive, the wheel that was built from it)."""
    pytest.importorskip("build", reason="pip install 'jdm[dev]'")
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (archive,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The Python of a fresh virtual environment with the wheel; its dependencies are this Python's."""
    place = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = place / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(built[1])], check=True)
    packages = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                                       text=True).strip()
    own = [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
    (Path(packages) / "dependencies.pth").write_text("\n".join(own) + "\n")
    return python


def said(python: Path, *arguments: str, cwd: Path) -> str:
    return subprocess.run([python, *arguments], capture_output=True, text=True, check=True, cwd=cwd,
                          env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}).stdout


def test_the_wheel_has_the_package_whole(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    tracked = subprocess.check_output(["git", "ls-files", "src/jdm"], cwd=ROOT, text=True).splitlines()
    assert {name.removeprefix("src/") for name in tracked} <= names
    assert "jdm/py.typed" in names
    assert not {name.split("/")[0] for name in names} - {"jdm", f"jdm-{PROJECT['version']}.dist-info"}


def test_the_archive_has_what_its_tests_read(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    assert {name for name in tracked if not name.startswith(".")} <= names
    assert not [name for name in names if name.startswith((".venv", "runs/", "data/"))]


def test_the_metadata_names_extras_and_pythons(built):
    with zipfile.ZipFile(built[1]) as wheel:
        (place,) = (name for name in wheel.namelist() if name.endswith("dist-info/METADATA"))
        found = message_from_bytes(wheel.read(place))
    assert set(found.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert found["Requires-Python"] == PROJECT["requires-python"] == ">=3.11"
    minors = {line.rpartition(".")[2] for line in found.get_all("Classifier") if "Python :: 3." in line}
    assert minors == {"11", "12", "13"}
    assert not [line for line in found.get_all("Requires-Dist") if "extra" not in line and "torchvision" in line]


def test_the_installed_wheel_is_what_runs(installed, tmp_path):
    place = said(installed, "-c", "import jdm; print(jdm.__file__)", cwd=tmp_path).strip()
    assert Path(place).is_relative_to(installed.parents[1])
    command = installed.parent / "jdm"
    assert said(command, "--version", cwd=tmp_path).strip() == f"jdm {PROJECT['version']}"
    assert "nano-canny" in said(command, "recipes", cwd=tmp_path)


def test_the_installed_wheel_draws(installed, tmp_path):
    command = installed.parent / "jdm"
    said(command, "sample", "nano-sd", "--prompt", "ankle boot", "--n", "2", "--steps", "2", "--out", "drawn",
         cwd=tmp_path)
    first, second = (Image.open(tmp_path / "drawn" / f"00{i}.png") for i in range(2))
    assert first.size == second.size == (32, 32)
    assert first.tobytes() != second.tobytes()
    assert all(high > low for low, high in first.getextrema()), "something is drawn"
