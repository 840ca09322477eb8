"""Close the modality gap of contrastive encoders, without training, at the speed of memory.

`fit` reads text and image embeddings and returns an `Alignment`; its `transform` maps text embeddings to where image
embeddings lie, and `nn.ReAlign` is the same as a layer of torch. `Moments` are the statistics, for those who gather
them elsewhere, `MomentsWindow` keeps those of a sliding corpus, and `Whitener` whitens one set.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import data as data
    from . import geometry as geometry
    from . import nn as nn
    from . import ray as ray
    from . import revision as revision
    from .alignment import Alignment, fit, fit_from_moments
    from .bank import AlignmentBank
    from .moments import Moments
    from .whitening import Whitener
    from .window import MomentsWindow

__all__ = [
    "Alignment",
    "AlignmentBank",
    "Moments",
    "MomentsWindow",
    "Whitener",
    "__version__",
    "fit",
    "fit_from_moments",
]

_HOMES = {
    "Alignment": "alignment",
    "AlignmentBank": "bank",
    "Moments": "moments",
    "MomentsWindow": "window",
    "Whitener": "whitening",
    "fit": "alignment",
    "fit_from_moments": "alignment",
}


def __getattr__(name: str) -> Any:
    # Not public names: `from realign_fast import *` does without torch.
    if name in ("data", "geometry", "nn", "ray", "revision"):
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
