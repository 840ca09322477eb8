"""Importing this makes the tree it stands in the package `realign_fast`, whether or not that is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import import_module, invalidate_caches
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTENSION = "realign_fast._C"


def load_package(name: str, folder: Path) -> None:
    """Import the package in `folder` under `name`: no folder goes on `sys.path`, where `kernels` is another's name."""
    spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    package = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(package)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, package)


def is_here(module: str) -> bool:
    """Return whether this tree has it: that of another tree, which is installed, might be older."""
    parent, _, _ = module.rpartition(".")
    return PathFinder.find_spec(module, sys.modules[parent].__path__) is not None


class Extension:
    """`realign_fast._C`: built in the background where it is missing and can be, while the GPU is busy."""

    def __init__(self) -> None:
        self._build: subprocess.Popen[str] | None = None
        self._missing = ""
        if self._loads():
            return
        if find_spec("pybind11") is None or find_spec("setuptools") is None:
            self._missing = "pybind11 or setuptools is not installed"
        elif shutil.which("c++") is None:
            self._missing = "there is no C++ compiler"
        else:
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            self._build = subprocess.Popen(command, cwd=ROOT, **pipes)

    def wait(self) -> str:
        """Return why it cannot be imported, in a line, or nothing; wait for the build."""
        if self._build is not None:
            _, errors = self._build.communicate()
            self._build = None
            if not self._loads():
                self._missing = " ".join(errors.split()[-20:])
        return self._missing

    def _loads(self) -> bool:
        invalidate_caches()
        try:
            return is_here(EXTENSION) and bool(import_module(EXTENSION))
        except ImportError:  # built for another Python
            return False


load_package("realign_fast", ROOT / "realign_fast")
load_package("realign_fast.kernels", ROOT / "kernels")
