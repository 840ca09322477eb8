"""The row transform and the moments: every dtype, dimension and instruction set, in place, by domain, and small."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from realign_fast import _C, Alignment, AlignmentBank, Moments, fit
from realign_fast._dtypes import empty
from realign_fast.benchmark import rows_of
from realign_fast.nn import ReAlign

CHECKED_BY = ("test_kernels.py", "test_bank.py", "test_nn.py")
# All of them are for a full run, the ends of the range for a short one.
DIMS = [pytest.param(dim, marks=[] if dim in (512, 4096) else pytest.mark.slow) for dim in (512, 768, 1024, 1280, 4096)]
SETS = _C.instruction_sets()
BEST = SETS[-1]
TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
GOALS = {
    ("float32", "avx512"): 1.15,
    ("float32", "avx2"): 0.9,
    ("float32", "baseline"): 0.4,
    ("float16", "avx512"): 0.9,
    ("bfloat16", "avx512"): 0.9,
}
TWICE = "reads every row twice, for its norm and for its columns; the second time it waits for the cache"


@pytest.fixture(params=SETS)
def instruction_set(request) -> Iterator[str]:
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set("auto")


def alignment_of(dim: int) -> Alignment:
    rng = np.random.default_rng(0)
    return fit(*(rng.normal(mean, 1, (2000, dim)).astype(np.float32) for mean in (0.1, -0.1)))


def tensor_of(rows: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16) if dtype == "bfloat16" else torch.from_numpy(rows)


def in_torch(alignment: Alignment) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the map of unit rows as one would write it in torch: two normalisations are all it takes."""
    shift, correction = (torch.from_numpy(v.astype(np.float32)) for v in (alignment.shift, alignment.correction))
    scale = float(alignment.scale)

    def mapped(x: torch.Tensor) -> torch.Tensor:
        return normalize(normalize(scale * x.float() + shift, dim=-1) + correction, dim=-1).to(x.dtype)

    return mapped


def of_any_length(mapped: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the same for rows of any length, as ours takes them."""
    return lambda x: mapped(normalize(x.float(), dim=-1)).to(x.dtype)


def in_numpy(alignment: Alignment) -> Callable[[np.ndarray], np.ndarray]:
    shift, correction = (v.astype(np.float32) for v in (alignment.shift, alignment.correction))
    scale = np.float32(alignment.scale)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.einsum("ij,ij->i", x, x))[:, None]

    def mapped(x: np.ndarray) -> np.ndarray:
        return unit(unit(scale * unit(x.astype(np.float32)) + shift) + correction).astype(x.dtype)

    return mapped


def moments_in_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and trace of unit rows as one would write it in torch, in one pass over what fits in memory."""
    unit = normalize(x.float(), dim=-1)
    mean = unit.mean(dim=0)
    return mean, 1 - mean @ mean


def by_parts(run: Callable[[torch.Tensor], object], x: torch.Tensor) -> Callable[[], object]:
    """Return what calls `run` on 8,192 rows at a time, as a loop over batches does: its copies stay in the caches."""
    return lambda: [run(part) for part in x.split(8192)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_row_transform(measure, pick, instruction_set, dtype):
    count = pick(2_000, 200_000, 1_000_000)
    rows = rows_of(count, 768, dtype)
    out, alignment = empty(rows.shape, rows.dtype), alignment_of(768)
    source, target = tensor_of(rows, dtype), tensor_of(out, dtype)
    target.copy_(source)
    peers = {"torch.Tensor.copy_": lambda: target.copy_(source)}
    goal = GOALS.get((dtype, instruction_set))
    measure(
        "row transform",
        lambda: alignment.transform(source, out=target),
        peers,
        unit="GB/s",
        work=2 * rows.nbytes,
        limit="copy",
        goals={"torch.Tensor.copy_": goal} if goal else {},
        why={"torch.Tensor.copy_": "the peer only copies"},
        dtype=dtype,
        shape=rows.shape,
        note=instruction_set,
        rounds=pick(2, 3, 9),
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_row_transform_against_libraries(measure, pick, dtype):
    count = pick(2_000, 100_000, 500_000)
    rows = rows_of(count, 768, dtype)
    out, alignment = empty(rows.shape, rows.dtype), alignment_of(768)
    out.fill(0)
    source, target = tensor_of(rows, dtype), tensor_of(out, dtype)
    eager = of_any_length(in_torch(alignment))
    compiled = torch.compile(eager)
    torch.testing.assert_close(alignment.transform(source[:64]), eager(source[:64]))
    peers = {
        "eager torch, 8,192 rows at a time": by_parts(eager, source),
        "torch.compile, 8,192 rows at a time": by_parts(compiled, source),
    }
    if dtype != "bfloat16":
        plain = in_numpy(alignment)
        peers["NumPy, 8,192 rows at a time"] = lambda: [plain(rows[i : i + 8192]) for i in range(0, count, 8192)]
    measure(
        "row transform",
        lambda: alignment.transform(source, out=target),
        peers,
        unit="GB/s",
        work=2 * rows.nbytes,
        limit="copy",
        dtype=dtype,
        shape=rows.shape,
        rounds=pick(2, 3, 5),
    )


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dim", DIMS)
def test_in_place(measure, pick, dim, dtype):
    rows = rows_of(pick(1 << 20, 1 << 28, 1 << 30) // (dim * (8 if dtype == "float64" else 4)), dim, dtype)
    x, alignment = tensor_of(rows, dtype), alignment_of(dim)
    measure(
        "row transform",
        lambda: alignment.transform(x, out=x),
        unit="GB/s",
        work=2 * rows.nbytes,
        limit="copy",
        dtype=dtype,
        shape=rows.shape,
        note="in place",
        rounds=pick(2, 3, 5),
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_moments(measure, pick, dtype):
    count = pick(2_000, 200_000, 1_000_000)
    rows = rows_of(count, 768, dtype)
    source, words = tensor_of(rows, dtype), torch.from_numpy(rows.view(np.float32))
    compiled = torch.compile(moments_in_torch)
    total = "torch.sum of the bytes as float32"
    measure(
        "moments",
        lambda: Moments(768).update(source),
        {
            total: lambda: words.sum(),
            "eager torch, 8,192 rows at a time": by_parts(moments_in_torch, source),
            "torch.compile, 8,192 rows at a time": by_parts(compiled, source),
        },
        unit="GB/s",
        work=rows.nbytes,
        limit="read",
        goals={total: {"float32": 0.9, "float16": 0.8}[dtype]} if dtype != "bfloat16" else {},
        why={total: f"the peer only adds; ours {TWICE}"},
        dtype=dtype,
        shape=rows.shape,
        rounds=pick(2, 3, 9),
    )


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dim", DIMS)
def test_moments_by_dimension(measure, pick, dim, dtype):
    rows = rows_of(pick(1 << 20, 1 << 28, 1 << 30) // (dim * (8 if dtype == "float64" else 4)), dim, dtype)
    x = tensor_of(rows, dtype)
    measure(
        "moments",
        lambda: Moments(dim).update(x),
        unit="GB/s",
        work=rows.nbytes,
        limit="read",
        dtype=dtype,
        shape=rows.shape,
        rounds=pick(2, 3, 5),
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_many_domains(measure, pick, dtype):
    count = pick(2_000, 200_000, 1_000_000)
    rows = rows_of(count, 768, dtype)
    out, alignment = empty(rows.shape, rows.dtype), alignment_of(768)
    out.fill(0)
    bank = AlignmentBank({str(number): alignment for number in range(64)})
    domain = np.random.default_rng(0).integers(0, 64, count)
    measure(
        "row transform",
        lambda: bank.transform(rows, domain, out=out),
        {"one domain": lambda: alignment.transform(rows, out=out)},
        unit="GB/s",
        work=2 * rows.nbytes,
        limit="copy",
        goals={"one domain": 0.9},
        why={"one domain": "a row's map, twice its bytes, comes from the second-level cache anew"},
        dtype=dtype,
        shape=rows.shape,
        note="64 domains at random",
        rounds=pick(2, 3, 9),
    )


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_small_batches(measure, pick, kind):
    alignment = alignment_of(768)
    x = normalize(torch.from_numpy(rows_of(256, 768, "float32")))
    rows = x.numpy() if kind == "array" else x
    eager = in_torch(alignment)
    compiled = torch.compile(eager)
    torch.testing.assert_close(alignment.transform(x), eager(x), rtol=0, atol=1e-6)
    measure(
        "row transform",
        lambda: alignment.transform(rows),
        {"eager torch, folded": lambda: eager(x), "torch.compile, folded": lambda: compiled(x)},
        unit="us",
        work=2 * x.nbytes,
        goals={"eager torch, folded": 5.0, "torch.compile, folded": 2.0},
        why={"eager torch, folded": "5x leaves little more than the kernel takes; a tensor's memory comes on top"},
        dtype="float32",
        shape=tuple(x.shape),
        note=f"an {kind}" if kind == "array" else f"a {kind}",
        rounds=pick(2, 15, 27),
        calls=pick(2, 400, 400),
    )


def test_gradients(measure, pick):
    alignment = alignment_of(768)
    # Few enough rows for memory that is used again: fresh pages would cost all of them more than the arithmetic.
    x = normalize(torch.from_numpy(rows_of(2000, 768, "float32"))).requires_grad_()
    grad_out, layer, eager = x.detach().flip(0), ReAlign(alignment), in_torch(alignment)
    compiled = torch.compile(eager)

    def gradient(run):
        return lambda: torch.autograd.grad(run(x), x, grad_out)

    measure(
        "nn.ReAlign and its gradient",
        gradient(layer),
        {"eager torch": gradient(eager), "torch.compile": gradient(compiled)},
        unit="ms",
        work=x.nbytes,
        dtype="float32",
        shape=tuple(x.shape),
        rounds=pick(2, 15, 27),
        calls=pick(2, 20, 40),
    )
