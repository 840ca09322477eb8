"""Packages that only some jobs need."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_extra(name: str, job: str = "this", extra: str | None = None) -> Any:
    """Return the package, which an extra installs: by default one of the same name.

    Raises
    ------
    ImportError
        If it is missing, saying which `job` needs it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise ImportError(f"{job} needs {name}: pip install 'realign-fast[{extra or name}]'") from None
