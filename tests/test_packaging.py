"""What users get: the contents and metadata of the wheel and of the source distribution.

Both are built once, from this checkout and from its object files, into a temporary folder. ``HDROPS_WHEEL`` and
``HDROPS_SDIST`` name finished ones to check instead.
"""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import hdrops

ROOT = Path(__file__).resolve().parents[1]


def build(command: list[str], target: Path) -> Path:
    """Runs a setup.py command that leaves one file in ``target``; nothing but object files stays in the checkout."""
    base = target / "egg"
    base.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(base), *command, "--dist-dir", str(target)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (path for path in target.iterdir() if path.is_file())
    return made


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("HDROPS_WHEEL"):
        return Path(given)
    target = tmp_path_factory.mktemp("wheel")
    built, packed = str(target / "lib"), str(target / "bdist")
    return build(["build", "--build-lib", built, "bdist_wheel", "--bdist-dir", packed], target)


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("HDROPS_SDIST"):
        return Path(given)
    return build(["sdist"], tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="session")
def sdist_names(sdist: Path) -> set[str]:
    """The files of the source distribution, without its top folder."""
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


@pytest.fixture(scope="session")
def metadata(wheel: Path, wheel_names: set[str]) -> Message:
    (name,) = (name for name in wheel_names if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(name).decode())


def sources(folder: str, *suffixes: str) -> set[str]:
    """The files of a folder of the checkout that are part of the project."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and (not suffixes or path.suffix in suffixes)
    }


def test_wheel_fits_every_python_from_3_10(wheel: Path, wheel_names: set[str]) -> None:
    assert re.fullmatch(r"hdrops-[\w.+]+-cp310-abi3-\w+\.whl", wheel.name)
    (name,) = (name for name in wheel_names if name.endswith(".dist-info/WHEEL"))
    with zipfile.ZipFile(wheel) as archive:
        assert re.search(r"^Tag: cp310-abi3-", archive.read(name).decode(), re.MULTILINE)


def test_wheel_has_the_library_once_and_under_a_name_of_no_python(wheel_names: set[str]) -> None:
    libraries = {name for name in wheel_names if name.endswith(".so")}
    assert "hdrops/_C.so" in libraries
    assert libraries <= {"hdrops/_C.so", "hdrops/_C_cuda.so"}


def test_wheel_has_every_module(wheel_names: set[str]) -> None:
    models = {f"hdrops/{name}" for name in sources("models", ".py")}
    expected = {name for name in sources("hdrops", ".py") if not name.startswith("hdrops/models/")} | models
    assert {name for name in wheel_names if name.endswith(".py")} == expected
    assert "hdrops/models/__init__.py" in wheel_names


def test_wheel_is_typed_and_licensed(wheel_names: set[str], metadata: Message) -> None:
    assert "hdrops/py.typed" in wheel_names
    licences = {Path(name).name for name in wheel_names if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}
    assert metadata["License-Expression"] == "Apache-2.0"


def test_wheel_has_nothing_else(wheel_names: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel_names} == {"hdrops", f"hdrops-{hdrops.__version__}.dist-info"}
    package = {name for name in wheel_names if name.startswith("hdrops/")}
    assert {Path(name).suffix for name in package} == {".py", ".so", ".typed"}


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "hdrops"
    assert metadata["Version"] == hdrops.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    required = metadata.get_all("Requires-Dist") or []
    assert {"torch>=2.11", "numpy"} <= set(required)
    assert not [line for line in required if line.startswith("torch") and "<" in line], "one binary fits newer torch"
    assert {"photo", "raw", "test"} <= set(metadata.get_all("Provides-Extra") or [])


def test_version_stands_in_one_place(wheel: Path, sdist: Path) -> None:
    assert re.search(r'^__version__ = "(.+)"$', (ROOT / "hdrops" / "__init__.py").read_text(), re.MULTILINE)
    assert hdrops.__version__ not in (ROOT / "pyproject.toml").read_text()
    assert wheel.name.split("-")[1] == hdrops.__version__
    assert sdist.name == f"hdrops-{hdrops.__version__}.tar.gz"


def test_changelog_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[(Unreleased|{re.escape(hdrops.__version__)})\]", text, re.MULTILINE)


@pytest.mark.parametrize("folder", ["csrc", "hdrops", "models", "benches", "tests", "docs"])
def test_sdist_has_the_whole_of(folder: str, sdist_names: set[str]) -> None:
    if not (ROOT / folder).is_dir():
        pytest.skip(f"this checkout has no {folder}/")
    expected = {name for name in sources(folder) if not name.endswith(".so") and not name.startswith("hdrops/models/")}
    missing = expected - sdist_names
    assert not missing


def test_sdist_builds_and_tests_itself(sdist_names: set[str]) -> None:
    frame = {"setup.py", "pyproject.toml", "Makefile", "LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "PKG-INFO"}
    assert frame <= sdist_names


def test_sdist_has_nothing_built(sdist_names: set[str]) -> None:
    assert not [name for name in sdist_names if name.endswith((".so", ".o", ".pyc"))]
    folders = {name.split("/")[0] for name in sdist_names if "/" in name}
    assert folders <= {"csrc", "hdrops", "models", "benches", "tests", "docs", "hdrops.egg-info"}
    assert not [name for name in sdist_names if name.startswith("hdrops/models/")], "models/ would be there twice"
