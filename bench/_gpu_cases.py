"""The Triton kernels as `bench/gpu.py` runs them: each checked against the oracle, each as a case beside its peers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import _tree  # noqa: F401 (makes this tree the package)
import numpy as np
import torch
from _gpu_timing import DEVICE, DTYPES, INTERPRETED, at_precision
from realign_fast.kernels import _rows, _tuning, whitening
from realign_fast.kernels import covariance as covariance_kernels
from realign_fast.kernels import moments as moments_kernels
from realign_fast.kernels import noise as noise_kernels
from realign_fast.kernels import row_transform as row_kernels
from torch.nn.functional import layer_norm, normalize, rms_norm

from realign_fast import reference

NUM_DOMAINS = 4 if INTERPRETED else 64
# What a product in this precision may be wrong by, over the norms of its two vectors, and the rate that bounds it.
PRECISIONS = {"fast": (2**-8, "bfloat16"), "high": (5e-6, "TF32"), "exact": (2e-6, "float32")}
# As which float32 matrices are multiplied that are compared with it.
MATMUL = {"fast": "high", "high": "highest", "exact": "highest"}
# Of `awkward_rows`: how many are zero, how many are not finite, which comes first.
BAD_ROWS = (1, 2, 3)
LAST = slice(-16, None)
NOISE_STD, NOISE_SEED = 0.02, 5


class Case(NamedTuple):
    """One launch to be timed.

    Attributes
    ----------
    run : callable
    amount : float
        The bytes of rows it moves, or the operations it does.
    unit : str
        "GB/s" or "TFLOP/s".
    limit : str
        The name of what bounds it, a key of `_gpu_timing.limits`.
    peers : dict
        What it is compared with, by name.
    last_rows_error : callable, optional
        After `run`: the largest error of the last rows of the result over what is allowed. They lie furthest away.
    """

    run: Callable[[], object]
    amount: float
    unit: str
    limit: str
    peers: dict[str, Callable[[], object]]
    last_rows_error: Callable[[], float] | None = None


class Kernel(NamedTuple):
    """A kernel of this package.

    Attributes
    ----------
    module : str
        Where it is, in `realign_fast.kernels`.
    check : callable
        Of rows on the device: its largest error over what is allowed.
    case : callable
        Of rows on the device, and whether torch.compile is to be among the peers.
    num_tensors : int
        How many tensors as large as the rows a case needs, those of its peers included.
    dtypes : tuple of str
    """

    module: str
    check: Callable[[torch.Tensor], float]
    case: Callable[[torch.Tensor, bool], Case]
    num_tensors: int
    dtypes: tuple[str, ...] = tuple(DTYPES)


def plain_rows(count: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(count, dim, dtype=dtype, device=DEVICE).normal_(0.02, dim**-0.5)


def awkward_rows(count: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Return rows of which some are bad and some of extreme magnitude."""
    rows = reference.project(np.random.default_rng(0).normal(0.05, 1, (count, dim)))
    x = torch.from_numpy(rows).to(dtype)
    x[3], x[7, dim - 1], x[11, 0] = 0, float("nan"), float("inf")
    x[12] *= 1e-4
    if dtype != torch.float16:
        x[13] *= 1e25
    return x.to(DEVICE)


def oracle_rows(x: torch.Tensor) -> np.ndarray:
    return x.double().cpu().numpy()


def worst(found: torch.Tensor, wanted: np.ndarray, allowed: np.ndarray | float, bad: torch.Tensor | None) -> float:
    """Return the largest error over what is allowed; infinity where the bad rows were not counted right."""
    if bad is not None and _rows.read_bad_rows(bad) != BAD_ROWS:
        return float("inf")
    return float((np.abs(oracle_rows(found) - wanted) / allowed).max())


def mapping(dim: int, seed: int = 1) -> tuple[float, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return 1.2, 0.5 * rng.normal(size=dim) / np.sqrt(dim), 0.1 * rng.normal(size=dim) / np.sqrt(dim)


def maps_of(*mappings: tuple[float, np.ndarray, np.ndarray]) -> row_kernels.Maps:
    stacked = (torch.from_numpy(np.stack(values)).to(DEVICE) for values in zip(*mappings, strict=True))
    return row_kernels.Maps.of(*stacked)


def domains_of(x: torch.Tensor) -> tuple[row_kernels.Maps, torch.Tensor]:
    maps = maps_of(*(mapping(x.shape[1], seed) for seed in range(NUM_DOMAINS)))
    generator = torch.Generator(DEVICE).manual_seed(0)
    return maps, torch.randint(NUM_DOMAINS, (len(x),), generator=generator, device=DEVICE)


def folded(x: torch.Tensor, scale: float, shift: torch.Tensor, correction: torch.Tensor) -> torch.Tensor:
    """Map unit rows as plain torch would: two normalisations are all it takes."""
    return normalize(normalize(scale * x + shift) + correction)


def parameters_like(x: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
    scale, shift, correction = mapping(x.shape[1])
    return scale, *(torch.from_numpy(v).to(DEVICE, x.dtype) for v in (shift, correction))


def compiled(function: Callable[..., object], *arguments: object) -> dict[str, Callable[[], object]]:
    torch.compiler.reset()  # or a new shape is compiled for all shapes, and after a few of them not at all
    default = torch.compile(function, dynamic=False)
    tuned = torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs")
    return {"torch.compile": partial(default, *arguments), "torch.compile max-autotune": partial(tuned, *arguments)}


def check_row_transform(x: torch.Tensor) -> float:
    out, bad = torch.full_like(x, float("nan")), _rows.new_bad_rows(DEVICE)
    row_kernels.row_transform(x, out, maps_of(mapping(x.shape[1])), bad)
    return row_transform_error(x, out, bad)


def row_transform_error(x: torch.Tensor, out: torch.Tensor, bad: torch.Tensor | None) -> float:
    return worst(out, reference.row_transform(oracle_rows(x), *mapping(x.shape[1])), rounding(x), bad)


def rounding(x: torch.Tensor) -> float:
    """Return what an element of a unit row may be wrong by: one rounding to its dtype, and some of float32."""
    return torch.finfo(x.dtype).eps / 2 + 4e-7


def row_transform(x: torch.Tensor, with_compiled: bool) -> Case:
    out, bad = torch.empty_like(x), _rows.new_bad_rows(DEVICE)
    run = partial(row_kernels.row_transform, x, out, maps_of(mapping(x.shape[1])), bad)
    arguments = x, *parameters_like(x)
    peers = {
        "eager torch": partial(folded, *arguments),
        "layer_norm": partial(layer_norm, x, x.shape[1:]),
        "rms_norm": partial(rms_norm, x, x.shape[1:]),
    }
    if with_compiled:
        peers |= compiled(folded, *arguments)
    moved = _tuning.plan_rows(*x.shape, DEVICE).count_bytes([x], [out])
    return Case(run, moved, "GB/s", "copy", peers, lambda: row_transform_error(x[LAST], out[LAST], None))


def check_noisy(x: torch.Tensor) -> float:
    out, bad = torch.full_like(x, float("nan")), _rows.new_bad_rows(DEVICE)
    noise_kernels.noisy_row_transform(x, out, maps_of(mapping(x.shape[1])), bad, NOISE_STD, NOISE_SEED, 0)
    return noisy_error(x, out, bad)


def noisy_error(x: torch.Tensor, out: torch.Tensor, bad: torch.Tensor | None, first: int = 0) -> float:
    mapped = reference.row_transform(oracle_rows(x), *mapping(x.shape[1]))
    wanted = reference.add_noise(mapped, NOISE_STD, NOISE_SEED, list(range(first, first + len(x))))
    return worst(out, wanted, rounding(x) + 2e-6, bad)


def row_transform_with_noise(x: torch.Tensor, with_compiled: bool) -> Case:
    def noisy(*arguments: object) -> torch.Tensor:
        mapped = folded(*arguments)
        return normalize(mapped + NOISE_STD * torch.randn_like(mapped))

    out, bad = torch.empty_like(x), _rows.new_bad_rows(DEVICE)
    maps = maps_of(mapping(x.shape[1]))
    run = partial(noise_kernels.noisy_row_transform, x, out, maps, bad, NOISE_STD, NOISE_SEED, 0)
    arguments = x, *parameters_like(x)
    peers = {"eager torch": partial(noisy, *arguments)}
    if with_compiled:
        peers |= compiled(noisy, *arguments)
    moved = noise_kernels.plan_noisy(*x.shape, DEVICE).count_bytes([x], [out])
    of_last = partial(noisy_error, x[LAST], out[LAST], None, len(x) - len(x[LAST]))
    return Case(run, moved, "GB/s", "copy", peers, of_last)


def check_domains(x: torch.Tensor) -> float:
    out, bad = torch.full_like(x, float("nan")), _rows.new_bad_rows(DEVICE)
    maps, domain = domains_of(x)
    row_kernels.row_transform(x, out, maps, bad, domain)
    return domains_error(x, domain, out, bad)


def domains_error(x: torch.Tensor, domain: torch.Tensor, out: torch.Tensor, bad: torch.Tensor | None) -> float:
    rows, numbers = oracle_rows(x), domain.cpu().numpy()
    wanted = np.empty_like(rows)
    for number in range(NUM_DOMAINS):
        of_it = numbers == number
        wanted[of_it] = reference.row_transform(rows[of_it], *mapping(x.shape[1], number))
    return worst(out, wanted, rounding(x), bad)


def row_transform_by_domain(x: torch.Tensor, with_compiled: bool) -> Case:
    out, bad = torch.empty_like(x), _rows.new_bad_rows(DEVICE)
    maps, domain = domains_of(x)
    scale, shift, correction = (parameter.to(x.dtype) for parameter in maps[:3])

    def gathered() -> torch.Tensor:
        return folded(x, scale[domain, None], shift[domain], correction[domain])

    peers = {"one domain": partial(row_kernels.row_transform, x, out, maps, bad), "eager torch": gathered}
    moved = _tuning.plan_rows(*x.shape, DEVICE).count_bytes([x], [out])
    run = partial(row_kernels.row_transform, x, out, maps, bad, domain)
    return Case(run, moved, "GB/s", "copy", peers, lambda: domains_error(x[LAST], domain[LAST], out[LAST], None))


def check_backward(x: torch.Tensor) -> float:
    grad_out = plain_rows(*x.shape, x.dtype)
    grad_x = torch.full_like(x, float("nan"))
    row_kernels.row_transform_backward(x, grad_out, grad_x, maps_of(mapping(x.shape[1])))
    return backward_error(x, grad_out, grad_x)


def backward_error(x: torch.Tensor, grad_out: torch.Tensor, grad_x: torch.Tensor) -> float:
    wanted = reference.row_transform_backward(oracle_rows(x), oracle_rows(grad_out), *mapping(x.shape[1]))
    limits = torch.finfo(x.dtype)
    largest = np.abs(wanted).max(axis=1, keepdims=True)
    fits = largest[:, 0] < limits.max / 2  # those of half-precision rows of magnitude 1e-4 may not
    allowed = (limits.eps + 2e-6) * largest + limits.tiny  # below which a GPU may write zeros
    return worst(grad_x[torch.from_numpy(fits).to(DEVICE)], wanted[fits], allowed[fits], None)


def row_transform_backward(x: torch.Tensor, with_compiled: bool) -> Case:
    grad_out, grad_x = plain_rows(*x.shape, x.dtype), torch.empty_like(x)
    leaf = x.detach().requires_grad_()
    mapped = folded(leaf, *parameters_like(x))
    peers = {"eager torch": lambda: torch.autograd.grad(mapped, leaf, grad_out, retain_graph=True)}
    run = partial(row_kernels.row_transform_backward, x, grad_out, grad_x, maps_of(mapping(x.shape[1])))
    moved = row_kernels.plan_backward(*x.shape, DEVICE).count_bytes([x, grad_out], [grad_x])
    of_last = partial(backward_error, x[LAST], grad_out[LAST], grad_x[LAST])
    return Case(run, moved, "GB/s", "copy", peers, of_last)


def new_sums(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(x.shape[1], dtype=torch.int64, device=DEVICE), _rows.new_bad_rows(DEVICE)


def check_moments(x: torch.Tensor) -> float:
    sums, bad = new_sums(x)
    moments_kernels.moments(x, sums, bad)
    count, mean, _ = reference.moments(oracle_rows(x))
    return worst(sums / 2.0**moments_kernels.FIXED_POINT_BITS / count, mean, 1e-9 + 8e-8 / np.sqrt(count), bad)


def moments(x: torch.Tensor, with_compiled: bool) -> Case:
    def mean_direction(x: torch.Tensor) -> torch.Tensor:
        return normalize(x).sum(dim=0, dtype=torch.float32)

    as_float32 = x.view(torch.float32)
    peers = {"torch.sum of the bytes": lambda: torch.sum(as_float32), "eager torch": partial(mean_direction, x)}
    if with_compiled:
        peers |= compiled(mean_direction, x)
    moved = moments_kernels.plan_moments(*x.shape, DEVICE).count_bytes([x])
    return Case(partial(moments_kernels.moments, x, *new_sums(x)), moved, "GB/s", "read", peers)


def check_transformed_moments(x: torch.Tensor) -> float:
    sums, bad = new_sums(x)
    moments_kernels.transformed_moments(x, maps_of(mapping(x.shape[1])), sums, bad)
    wanted = reference.row_transform(oracle_rows(x), *mapping(x.shape[1])).sum(axis=0)
    return worst(sums / 2.0**moments_kernels.FIXED_POINT_BITS, wanted, len(x) * 2e-7, bad)


def transformed_moments(x: torch.Tensor, with_compiled: bool) -> Case:
    def mean_of_mapped(*arguments: object) -> torch.Tensor:
        return folded(*arguments).sum(dim=0, dtype=torch.float32)

    arguments = x, *parameters_like(x)
    run = partial(moments_kernels.transformed_moments, x, maps_of(mapping(x.shape[1])), *new_sums(x))
    moved = moments_kernels.plan_moments(*x.shape, DEVICE).count_bytes([x])
    return Case(run, moved, "GB/s", "read", {"eager torch": partial(mean_of_mapped, *arguments)})


def pilot_of(dim: int) -> torch.Tensor:
    return torch.full((dim,), 0.05 / np.sqrt(dim), dtype=torch.float64, device=DEVICE)


def new_products(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=DEVICE), _rows.new_bad_rows(DEVICE)


def check_covariance(precision: str, x: torch.Tensor) -> float:
    pilot, (products, bad) = pilot_of(x.shape[1]), new_products(x)
    covariance_kernels.covariance(x, pilot, products, bad, precision=precision)
    rows = oracle_rows(x)
    centred = reference.project(rows[~reference.bad_rows(rows)]) - pilot.cpu().numpy()
    wanted = centred.T @ centred
    norms = np.sqrt(wanted.diagonal())
    return worst(products.tril(), np.tril(wanted), PRECISIONS[precision][0] * np.outer(norms, norms), bad)


def covariance(precision: str, x: torch.Tensor, with_compiled: bool) -> Case:
    pilot = pilot_of(x.shape[1])
    plain_pilot, plain_products = pilot.to(x.dtype), x.new_zeros(x.shape[1], x.shape[1])

    def centred_product() -> torch.Tensor:
        centred = normalize(x) - plain_pilot
        return torch.addmm(plain_products, centred.T, centred)

    run = partial(covariance_kernels.covariance, x, pilot, *new_products(x), precision=precision)
    peers = {"normalize and addmm": at_precision(MATMUL[precision], centred_product)}
    return Case(run, len(x) * x.shape[1] ** 2, "TFLOP/s", PRECISIONS[precision][1], peers)


def whitening_matrix(dim: int) -> torch.Tensor:
    matrix = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / np.sqrt(dim)
    return (torch.eye(dim, dtype=torch.float64) + 0.5 * matrix).to(DEVICE)


def check_whiten(precision: str, x: torch.Tensor) -> float:
    matrix, out, bad = whitening_matrix(x.shape[1]), torch.full_like(x, float("nan")), _rows.new_bad_rows(DEVICE)
    weights = whitening.Weights.of(matrix, pilot_of(x.shape[1]), x.dtype, precision)
    whitening.whiten(x, weights, out, bad, precision=precision)
    return whiten_error(precision, x, matrix, out, bad)


def whiten_error(
    precision: str, x: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor, bad: torch.Tensor | None
) -> float:
    rows, matrix64 = oracle_rows(x), matrix.cpu().numpy()
    is_bad = reference.bad_rows(rows)
    unit = reference.project(np.where(is_bad[:, None], 1, rows))
    wanted = np.where(is_bad[:, None], 0, (unit - pilot_of(x.shape[1]).cpu().numpy()) @ matrix64.T)
    eps = torch.finfo(x.dtype).eps
    # Half-precision rows are multiplied as they are, by weights of their dtype.
    of_products = 2 * max(PRECISIONS[precision][0], eps) * np.sqrt((matrix64**2).sum(axis=1))
    return worst(out, wanted, eps * np.abs(wanted) + of_products, bad)


def whiten(precision: str, x: torch.Tensor, with_compiled: bool) -> Case:
    matrix, out = whitening_matrix(x.shape[1]), torch.empty_like(x)
    plain_matrix = matrix.to(x.dtype).T
    weights = whitening.Weights.of(matrix, pilot_of(x.shape[1]), x.dtype, precision)
    run = partial(whitening.whiten, x, weights, out, _rows.new_bad_rows(DEVICE), precision=precision)
    peers = {"torch.matmul": at_precision(MATMUL[precision], partial(torch.matmul, x, plain_matrix))}
    limit = rate_of("whitening", precision, str(x.dtype).removeprefix("torch."))
    of_last = partial(whiten_error, precision, x[LAST], matrix, out[LAST], None)
    return Case(run, 2 * len(x) * x.shape[1] ** 2, "TFLOP/s", limit, peers, of_last)


def rate_of(name: str, precision: str, dtype: str) -> str:
    """Return which matrix rate bounds a kernel: that of the dtype in which it multiplies rows of `dtype`."""
    return dtype if name == "whitening" and dtype != "float32" else PRECISIONS[precision][1]


def multiplied(name: str, precision: str, dtypes: Iterable[str]) -> tuple[str, ...]:
    """Return those dtypes of rows that can be multiplied here."""
    # The interpreter takes the bits of bfloat16 for whole numbers.
    return tuple(dtype for dtype in dtypes if not INTERPRETED or rate_of(name, precision, dtype) != "bfloat16")


KERNELS = {
    "row transform": Kernel("row_transform", check_row_transform, row_transform, 7),
    "row transform with noise": Kernel("noise", check_noisy, row_transform_with_noise, 10),
    "row transform backward": Kernel("row_transform", check_backward, row_transform_backward, 14),
    "moments": Kernel("moments", check_moments, moments, 4),
    "transformed moments": Kernel("moments", check_transformed_moments, transformed_moments, 6),
    "row transform by domain": Kernel("row_transform", check_domains, row_transform_by_domain, 9),
}
for precision in PRECISIONS:
    KERNELS[f"covariance {precision}"] = Kernel(
        "covariance",
        partial(check_covariance, precision),
        partial(covariance, precision),
        6,
        # IEEE products are for rows that have the digits.
        multiplied("covariance", precision, ["float32"] if precision == "exact" else DTYPES),
    )
    KERNELS[f"whitening {precision}"] = Kernel(
        "whitening",
        partial(check_whiten, precision),
        partial(whiten, precision),
        5,
        # Half-precision rows are multiplied as they are in any precision.
        multiplied("whitening", precision, DTYPES if precision == "high" else ["float32"]),
    )


def kernels_here() -> dict[str, Kernel]:
    """Return the kernels that can run here; say which ones cannot."""
    here = {}
    for name, kernel in KERNELS.items():
        if kernel.dtypes:
            here[name] = kernel
        else:
            print(f"{name}: Triton's interpreter cannot multiply bfloat16")
    return here
