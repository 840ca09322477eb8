"""The kernels: the compiled extension, or, where there is none, what does its work in NumPy."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

__all__ = ["HAS_EXTENSION", "_C"]

# Set, it leaves out the extension: so the tests try the way without one.
_VARIABLE = "REALIGN_FAST_NO_EXTENSION"


def _warn(why: object) -> None:
    from multiprocessing import parent_process

    if parent_process() is not None:  # the first process has said it
        return
    message = (
        f"the compiled extension realign_fast._C is missing ({why}), NumPy does its work, many times slower: install "
        "a wheel for this platform, or a C++17 compiler and realign-fast anew (pip install --force-reinstall "
        "--no-cache-dir)"
    )
    # Of no file whose source could be shown: one line.
    warnings.warn_explicit(message, RuntimeWarning, "realign_fast", 1)


if TYPE_CHECKING:
    from . import _C

    HAS_EXTENSION = True
else:
    try:
        if os.environ.get(_VARIABLE):
            raise ImportError(f"{_VARIABLE} is set")
        from . import _C

        HAS_EXTENSION = True
    except ImportError as error:
        from . import _plain as _C  # noqa: N812 (it stands for that module)

        HAS_EXTENSION = False
        _warn(error)
