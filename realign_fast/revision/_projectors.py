"""Files of a projector: our own, `mm_projector.bin` of LLaVA and Bunny, and those with names of transformers' LLaVA.

All are the same layers under other names. Here these are those of an `nn.Sequential`: `0.weight`, `0.bias`, `2.weight`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import safe_open
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


def save(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], style: Style) -> None:
    """Write a projector's tensors, whole or not at all."""
    is_pickle, names = _is_pickle(path), _NAMES.get((style, len(tensors) // 2))
    if names is None:
        raise ValueError(f"{path}: style {style!r} has no projector of {len(tensors) // 2} Linear layers")
    named = {
        f"{names[int(name[0]) // 2]}{name[1:]}": tensor.detach().clone(memory_format=torch.contiguous_format).cpu()
        for name, tensor in tensors.items()
    }
    # Given a path, torch would write its name into the file, and safetensors let nobody but its owner read it.
    with replacing(Path(path)) as temporary, temporary.open("xb") as file:
        if is_pickle:
            torch.save(named, file)
        else:
            file.write(safetensors.torch.save(named, metadata={"format": "pt"}))


def load(path: str | os.PathLike[str], expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read a projector with tensors of these names and shapes, from a file that may hold other tensors too."""
    found: dict[str, tuple[str, torch.Tensor]] = {}
    for key, layer, kind, tensor in _read(path):
        name = f"{_LAYERS.get(layer, layer)}.{kind}"
        if name in found:
            raise ValueError(f"{path} holds two projectors: {found[name][0]!r} and {key!r}")
        found[name] = key, tensor
    if found.keys() != expected.keys():
        names = ", ".join(key for key, _ in found.values()) or "none"
        raise ValueError(f"{path}: expected tensors {', '.join(expected) or 'none'} of a projector, got {names}")
    for name, like in expected.items():
        key, tensor = found[name]
        if tensor.shape != like.shape or not tensor.is_floating_point():
            raise ValueError(
                f"{path}: tensor {key!r} must be floating point of shape {tuple(like.shape)}, got {tensor.dtype} of "
                f"shape {tuple(tensor.shape)}"
            )
    return {name: tensor for name, (_, tensor) in found.items()}


def _read(path: str | os.PathLike[str]) -> list[tuple[str, str | None, str, torch.Tensor]]:
    """Return key, layer, "weight" or "bias" and tensor of all that is named as a projector's."""
    is_pickle = _is_pickle(path)
    if is_pickle:
        check_torch_load_is_safe()
    try:
        if is_pickle:
            contents: Any = torch.load(path, map_location="cpu", weights_only=True)
            keys = [key for key in contents if torch.is_tensor(contents[key])]
            return [(key, *m.groups(), contents[key]) for key in keys if (m := _TENSOR.fullmatch(key))]
        with safe_open(os.fspath(path), framework="pt") as file:
            keys = list(file.keys())  # not a mapping
            return [(key, *m.groups(), file.get_tensor(key)) for key in keys if (m := _TENSOR.fullmatch(key))]
    except OSError:
        raise
    except Exception as error:  # many kinds: the file is cut off, altered, something else, or wants to run something
        raise ValueError(f"{path} is damaged, or holds more than named tensors, which is refused") from error


def _is_pickle(path: str | os.PathLike[str]) -> bool:
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".bin"):
        raise ValueError(f"{path}: a projector's file ends in .safetensors or .bin, got {suffix!r}")
    return suffix == ".bin"
