"""Alignments for other runtimes: a chain of FAISS transforms, an ONNX graph."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ._extras import import_extra
from ._files import write_atomically
from .alignment import Alignment, Side

if TYPE_CHECKING:
    import faiss
    import onnx

__all__ = ["save", "to_faiss", "to_onnx"]

_OPSET = 18


def save(
    alignment: Alignment, path: str | os.PathLike[str], to: Literal["faiss", "onnx"], *, side: Side = "source"
) -> None:
    """Write the map to a file of FAISS (`faiss.read_index`) or ONNX, whole or not at all.

    Parameters
    ----------
    alignment
        A fitted one.
    path
        The file.
    to
        "faiss", what `to_faiss` returns, or "onnx", what `to_onnx` does.
    side
        Whose map: "source" or "target".

    Raises
    ------
    ImportError
        If the package that writes it is missing.
    OSError
        If the file cannot be written.
    ValueError
        If `to` is neither.
    """
    if to == "faiss":
        module = import_extra("faiss")
        data = module.serialize_index(to_faiss(alignment, side=side)).tobytes()
    elif to == "onnx":
        data = to_onnx(alignment, side=side).SerializeToString()
    else:
        raise ValueError(f"to must be 'faiss' or 'onnx', got {to!r}")
    write_atomically(Path(path), data)


def to_faiss(alignment: Alignment, index: Any = None, *, side: Side = "source") -> faiss.IndexPreTransform:
    """Return an index that maps what is added to it and searched for: normalise, matrix, normalise, shift, normalise.

    The transforms are its `chain`. Noise ("c3") is left out. Rows that are already where they belong, such as images,
    go to the index it wraps, not through it.

    Parameters
    ----------
    alignment
        A fitted one.
    index
        The index behind the transforms; by default an empty `faiss.IndexFlatIP`, whose scores are cosines.
    side
        Whose map: "source" or "target".

    Raises
    ------
    ImportError
        If faiss is missing.
    ValueError
        If `index` has another dimension.
    """
    module = import_extra("faiss")
    dim = alignment.dim
    if index is not None and index.d != dim:
        raise ValueError(f"index must have dimension {dim}, got {index.d}")
    matrix, offset, correction = _parts(alignment, side)
    steps = [module.NormalizationTransform(dim, 2.0), _linear(module, matrix, offset)]
    steps.append(module.NormalizationTransform(dim, 2.0))
    if correction.any():
        steps += [_linear(module, np.eye(dim), correction), module.NormalizationTransform(dim, 2.0)]
    chained: faiss.IndexPreTransform = module.IndexPreTransform(module.IndexFlatIP(dim) if index is None else index)
    for step in reversed(steps):
        chained.prepend_transform(step)
    return chained


def _linear(module: Any, matrix: NDArray[np.float64], offset: NDArray[np.float64]) -> Any:
    dim = len(matrix)
    linear = module.LinearTransform(dim, dim, True)
    module.copy_array_to_vector(np.ascontiguousarray(matrix, np.float32).ravel(), linear.A)
    module.copy_array_to_vector(np.ascontiguousarray(offset, np.float32), linear.b)
    linear.is_trained = True
    return linear


def to_onnx(alignment: Alignment, *, side: Side = "source") -> onnx.ModelProto:
    """Return a graph that maps `x` `(n, dim)` float32 to `aligned` `(n, dim)` float32; rows of zeros stay zeros.

    Rows are divided by their largest magnitude first, so that no square overflows. Noise ("c3") is left out, and
    nothing is refused: what becomes of a row with NaN or infinity is not defined.

    Parameters
    ----------
    alignment, side
        As `to_faiss`.

    Raises
    ------
    ImportError
        If onnx is missing.
    """
    module = import_extra("onnx")
    helper, numpy_helper = module.helper, module.numpy_helper
    matrix, offset, correction = _parts(alignment, side)
    affine = alignment.parameters_of(side).affine
    centre = np.zeros(alignment.dim) if affine is None else affine.centre
    constants = {
        "axis": np.array([1], np.int64),
        "zero": np.array(0, np.float32),
        "one": np.array(1, np.float32),
        "centre": centre.astype(np.float32),
        "matrix": np.ascontiguousarray(matrix.T, np.float32),
        "offset": (offset + matrix @ centre).astype(np.float32),
        "correction": correction.astype(np.float32),
    }
    nodes: list[Any] = []

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def divide(rows: str, by: str, output: str) -> str:
        """Divide rows by what is theirs, `(n, 1)`; where that is 0, by 1."""
        none = add("Equal", [by, "zero"], f"{output}_none")
        return add("Div", [rows, add("Where", [none, "one", by], f"{output}_by")], output)

    def project(rows: str, output: str) -> str:
        return divide(rows, add("ReduceL2", [rows, "axis"], f"{output}_norm", keepdims=1), output)

    largest = add("ReduceMax", [add("Abs", ["x"], "magnitude"), "axis"], "largest", keepdims=1)
    unit = project(divide("x", largest, "scaled"), "unit")
    centred = add("Sub", [unit, "centre"], "centred")
    moved = add("Add", [add("MatMul", [centred, "matrix"], "product"), "offset"], "moved")
    once = project(moved, "once")
    twice = project(add("Add", [once, "correction"], "corrected"), "twice")
    add("Where", [add("Equal", [largest, "zero"], "is_zero"), "zero", twice], "aligned")
    shape = ["n", alignment.dim]
    graph = helper.make_graph(
        nodes,
        f"realign_{alignment.method}_{side}",
        [helper.make_tensor_value_info("x", module.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("aligned", module.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model: onnx.ModelProto = helper.make_model(
        graph, producer_name="realign-fast", opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=9
    )
    module.checker.check_model(model)
    return model


def _parts(alignment: Alignment, side: Side) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return matrix, offset and correction of `pi(pi(matrix u + offset) + correction)`."""
    parameters = alignment.parameters_of(side)
    affine = parameters.affine
    matrix = parameters.scale * np.eye(alignment.dim) if affine is None else affine.matrix
    return matrix, parameters.shift, parameters.correction
