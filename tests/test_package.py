"""What is installed, and what importing it loads."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import files, version
from pathlib import Path

import pytest

import realign_fast

ROOT = Path(__file__).parents[1]
HEAVY = ("faiss", "matplotlib", "pyarrow", "ray", "torch", "transformers", "triton")


def run(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import realign_fast",
        "from realign_fast import *",
        "import realign_fast.cli",
        "import runpy; sys.argv = ['realign', '--help']\n"
        "try: runpy.run_module('realign_fast', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0",
    ],
    ids=["import", "public names", "cli", "help"],
)
def test_heavy_packages_are_not_loaded(code, tmp_path):
    found = run("-c", f"import sys\n{code}\nprint([m for m in {HEAVY!r} if m in sys.modules])", cwd=tmp_path)
    assert found.splitlines()[-1] == "[]"


def test_public_names_exist_and_are_few():
    assert len(realign_fast.__all__) <= 10
    assert all(hasattr(realign_fast, name) for name in realign_fast.__all__)
    assert set(realign_fast.__all__) <= set(dir(realign_fast))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        realign_fast.nothing  # noqa: B018 (the access is the test)


def test_kernels_are_installed_inside_the_package(tmp_path):
    code = "import realign_fast.kernels as k; print(k.__name__)"
    assert run("-c", code, cwd=tmp_path).strip() == "realign_fast.kernels"
    installed = files("realign-fast") or []
    assert not [path for path in installed if path.parts[0] == "kernels"]


def test_one_version():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert declared == realign_fast.__version__ == version("realign-fast")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Return the folder of an unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run("-W", "ignore", "-c", build, str(folder), cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.mark.slow
def test_sdist_holds_what_a_build_needs(sdist):
    headers = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.h")}
    assert headers
    assert {path.relative_to(sdist) for path in (sdist / "csrc").rglob("*.h")} == headers
    for name in (
        "realign_fast/FORMATS.md",
        "Makefile",
        ".ci/test-wheel",
        "constraints.txt",
        "kernels/__init__.py",
        "realign_fast/_C.pyi",
        "tests/test_package.py",
    ):
        assert (sdist / name).is_file(), name


@pytest.mark.slow
def test_wheel_from_the_sdist_is_whole_and_runs(sdist, tmp_path):
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path))
    run("-m", "pip", "wheel", *options, str(sdist), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert {"realign_fast/py.typed", "realign_fast/_C.pyi", "realign_fast/kernels/__init__.py"} <= names
    assert [name for name in names if name.startswith("realign_fast/_C.") and name.endswith((".so", ".pyd"))]
    top_level = {name.split("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"realign_fast"}

    code = "import realign_fast; realign_fast.Moments(4); print(realign_fast.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_without_a_compiler_it_is_installed_and_works(tmp_path):
    """One line of the build says that the extension is missing, and one of the run."""
    broken = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    source = tmp_path / "source"
    for name in ("csrc", "kernels", "realign_fast"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("README.md", "LICENSE", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel(r'..')"
    for required in ("", "1"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", build],
            cwd=source, env={**broken, "REALIGN_FAST_REQUIRE_EXTENSION": required}, capture_output=True, text=True,
        )  # fmt: skip
        said = [line for line in done.stderr.splitlines() if "to build it takes a C++17 compiler" in line]
        assert (done.returncode == 0) == (not required), done.stderr
        assert len(said) == 1, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = """
import numpy as np, realign_fast as rf
rng = np.random.default_rng(0)
text, image = 1 + rng.normal(size=(100, 8)), rng.normal(size=(90, 8))
out = rf.fit(text, image).transform(text)
assert np.allclose(np.linalg.norm(out, axis=1), 1)
print(rf.__file__)
"""
    # -S: what finds an editable install would find its extension too.
    paths = str(tmp_path / "installed"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
    (said,) = done.stderr.splitlines()
    assert "the compiled extension realign_fast._C is missing" in said
