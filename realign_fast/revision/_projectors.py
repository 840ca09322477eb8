"""Files of a projector: our own, LLaVA's and Bunny's `mm_projector.bin`, and those with transformers' LLaVA's names.

All are the same layers under other names. Here these are those of an `nn.Sequential`: `0.weight`, `0.bias`, `2.weight`.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils.import_utils import check_torch_load_is_safe

from .._files import replacing

Style = Literal["realign", "llava", "transformers"]

_NAMES: Mapping[tuple[Style, int], tuple[str, ...]] = {
    ("realign", 2): ("projector.0", "projector.2"),
    ("realign", 1): ("projector.0",),
    ("llava", 2): ("model.mm_projector.0", "model.mm_projector.2"),
    ("llava", 1): ("model.mm_projector",),
    ("transformers", 2): ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
}
# Whatever wraps a model puts its own names in front.
_TENSOR = re.compile(r"(?:.*\.)?(?:projector|mm_projector|multi_modal_projector)\.(?:(\w+)\.)?(weight|bias)")
_LAYERS = {None: "0", "linear_1": "0", "linear_2": "2"}
# What torch raises for files that are cut off, altered, or want to run something.
_REFUSALS = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError)


def save(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], style: Style) -> None:
    """Write a projector's tensors, whole or not at all."""
    names = _NAMES.get((style, len(tensors) // 2))
    if names is None:
        raise ValueError(f"{path}: style {style!r} has no projector of {len(tensors) // 2} Linear layers")
    is_pickle = _is_pickle(path)
    named = {
        f"{names[int(name[0]) // 2]}{name[1:]}": tensor.detach().clone(memory_format=torch.contiguous_format).cpu()
        for name, tensor in tensors.items()
    }
    with replacing(Path(path)) as temporary:
        if is_pickle:
            with temporary.open("xb") as file:  # given a path, torch would write its name into the file
                torch.save(named, file)
        else:
            save_file(named, temporary, metadata={"format": "pt"})


def load(path: str | os.PathLike[str], expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read a projector with tensors of these names and shapes, from a file that may hold other tensors too."""
    tensors: dict[str, torch.Tensor] = {}
    keys: dict[str, str] = {}
    for key, layer, kind, tensor in _read(path):
        name = f"{_LAYERS.get(layer, layer)}.{kind}"
        if name in keys:
            raise ValueError(f"{path} holds two projectors: {keys[name]!r} and {key!r}")
        tensors[name], keys[name] = tensor, key
    if tensors.keys() != expected.keys():
        raise ValueError(
            f"{path}: expected the tensors {', '.join(expected) or 'none'} of a projector, got "
            f"{', '.join(keys.values()) or 'none'}"
        )
    for name, like in expected.items():
        tensor = tensors[name]
        if tensor.shape != like.shape or not tensor.is_floating_point():
            raise ValueError(
                f"{path}: tensor {keys[name]!r} must be floating point of shape {tuple(like.shape)}, got "
                f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    return tensors


def _read(path: str | os.PathLike[str]) -> list[tuple[str, str | None, str, torch.Tensor]]:
    """Return key, layer, "weight" or "bias" and tensor of what may be a projector's."""
    if _is_pickle(path):
        check_torch_load_is_safe()
        try:
            contents: Any = torch.load(path, map_location="cpu", weights_only=True)
        except _REFUSALS as error:
            raise ValueError(f"{path} is damaged, or holds more than tensors, which is refused") from error
        if not isinstance(contents, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in contents.values()):
            raise ValueError(f"{path} must hold a dict of tensors")
        return [(key, *m.groups(), contents[key]) for key in contents if (m := _TENSOR.fullmatch(str(key)))]
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            keys = list(file.keys())  # not a mapping
            return [(key, *m.groups(), file.get_tensor(key)) for key in keys if (m := _TENSOR.fullmatch(key))]
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def _is_pickle(path: str | os.PathLike[str]) -> bool:
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".bin"):
        raise ValueError(f"{path}: a projector's file ends in .safetensors or .bin, got {suffix!r}")
    return suffix == ".bin"
