"""Packages that only some jobs need."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_extra(name: str, job: str = "this") -> Any:
    """Return the package, which an extra of the same name installs.

    Raises
    ------
    ImportError
        If it is missing, saying which `job` needs it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise ImportError(f"{job} needs {name}: pip install 'realign-fast[{name}]'") from None
