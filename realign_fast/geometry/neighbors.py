"""Nearest neighbours by cosine, among as many rows as there are, and what they say of two sets of embeddings.

A neighbour's similarity is the inner product, in float64, of rows brought to unit length in float32, rounded to 2**-36:
less than float32 shows of it, and more than float64 loses in any order of summation. Neighbours are ordered by it, ties
by index, so that the library that searches leaves no trace in what is found.

Sources: ReAlign (arXiv 2602.07026) for the mixing and the overlap of neighbourhoods, AnisoAlign (arXiv 2605.07825) for
the entropies of the mixing by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from .._dtypes import Rows
from .._extras import import_extra
from .._native import _C
from .._nearest import similarities as in_parts
from .._rows import as_rows
from ..backends import count_threads
from ..methods import unit_length

__all__ = [
    "Mixing",
    "Neighbours",
    "Options",
    "Overlap",
    "knn_mixing",
    "knn_overlap",
    "mixing",
    "nearest",
    "overlap",
    "recall_at",
    "recalls",
]

Backend = Literal["auto", "faiss", "torch"]
Indices = NDArray[np.int64]
Unit = NDArray[np.float32]
Found = tuple[NDArray[np.float32], Indices]  # similarities, descending, and indices
Search = Callable[[Unit, Unit, int], Found]

EXACT_ROWS = 200_000  # candidates up to which every one is looked at

_STEP = 2.0**-36
_SPARE = 8  # candidates fetched beyond those asked for: float32 may have taken one for another
_NONE = np.iinfo(np.int64).min  # the key of a neighbour that there is not
_CHUNK_BYTES = 64 << 20  # of similarities at a time
_GATHERED_BYTES = 4 << 20  # of candidates at a time, as float64: they stay in the caches
_BLOCK_ROWS = 4096  # candidates in float64 at a time

_LEAST_RECALL = 0.95
_RECALL_QUERIES = 1000
_FIRST_PROBES = 8
_TRAINING_ROWS = 64  # for each list

_PERMUTATIONS = 10
_STANDARD_ERRORS = 1.96


class Options(TypedDict, total=False):
    """How to search: see `nearest`."""

    backend: Backend
    num_threads: int | None
    exact: bool | None


class Neighbours(NamedTuple):
    """The nearest candidates of each query, nearest first.

    Attributes
    ----------
    indices : ndarray
        `(n, k)` int64, -1 where there is none: an approximate search may find fewer than `k`.
    similarities : ndarray
        `(n, k)` float64 cosines, -inf where there is none.
    recall : float
        The share of the true neighbours that are found: 1 for an exact search, else measured on at most 1,000 queries.
    """

    indices: Indices
    similarities: NDArray[np.float64]
    recall: float

    def first(self, k: int) -> Neighbours:
        """Return the `k` nearest of them."""
        return Neighbours(self.indices[:, :k], self.similarities[:, :k], self.recall)


class Mixing(NamedTuple):
    """How far the neighbours of rows come from the other set.

    Attributes
    ----------
    value : float
        The share of the `k` nearest neighbours that come from the other set, mean over the rows of both.
    interval : tuple of float
        95 %, normal, of rows taken as independent.
    text, image : float
        For the rows of either side (source and target), the mean binary entropy of the share of neighbours from the
        other set, over the same for labels dealt at random: 0 for two sets apart, 1 where labels say nothing. NaN where
        there is no entropy to compare with, as with k = 1.
    k, seed : int
        `seed` is that of the random labels.
    recall : float
        Of the search, see `Neighbours`.
    """

    value: float
    interval: tuple[float, float]
    text: float
    image: float
    k: int
    seed: int
    recall: float


class Overlap(NamedTuple):
    """How many neighbours a map keeps.

    Attributes
    ----------
    value : float
        The share of a row's `k` nearest neighbours before the map that are among those after it, mean over the rows.
    interval : tuple of float
        95 %, normal, of rows taken as independent.
    k : int
    recall : float
        Of the worse of the two searches, see `Neighbours`.
    """

    value: float
    interval: tuple[float, float]
    k: int
    recall: float


def nearest(
    queries: Any,
    candidates: Any = None,
    k: int = 20,
    *,
    backend: Backend = "auto",
    num_threads: int | None = None,
    exact: bool | None = None,
) -> Neighbours:
    """Return the `k` candidates most similar to each query by cosine, the same for every backend where it is exact.

    Parameters
    ----------
    queries
        `(n, dim)` array or tensor.
    candidates
        `(m, dim)`; by default the queries themselves, none of which is its own neighbour.
    k
        How many.
    backend
        "faiss", "torch", or "auto": the first of them that is installed. torch searches on a GPU where it finds one,
        FAISS where it was built for GPUs too.
    num_threads
        By default as many as the library takes.
    exact
        Whether to look at every candidate: by default up to 200,000 of them, and always with torch. Otherwise FAISS
        looks into the nearest of about `4 sqrt(m)` lists, of so many that 0.95 of the true neighbours are found.

    Raises
    ------
    ImportError
        If the backend is missing.
    ValueError
        If there are fewer than `k` candidates, shapes do not fit, a row is zero or not finite, or `exact` is False
        without FAISS.
    TypeError
        If rows are not float16, bfloat16, float32 or float64.
    """
    rows = unit_rows(queries, "queries", num_threads)
    others = None if candidates is None else unit_rows(candidates, "candidates", num_threads, dim=rows.shape[1])
    return _nearest(rows, others, k, backend=backend, num_threads=num_threads, exact=exact)


def knn_mixing(source: Any, target: Any, k: int = 20, **options: Unpack[Options]) -> float:
    """Return the share of the `k` nearest neighbours (by cosine, self excluded) that come from the other set.

    Both sets, `source` and `target` `(n, dim)`, count as many rows; two samples of one distribution give about one
    half. See `nearest` for options and what is raised.
    """
    labels, found = _both(source, target, k, **options)
    return float(_other_shares(labels, found.indices).mean())


def mixing(source: Any, target: Any, k: int = 20, *, seed: int = 0, **options: Unpack[Options]) -> Mixing:
    """Return `knn_mixing` with its interval, and how mixed the neighbourhoods of either side are.

    Parameters
    ----------
    source, target
        `(n, dim)` each: text and image.
    k
        How many neighbours, 2 or more for the entropies to say something.
    seed
        Of ten random permutations of the labels, over which the entropy to compare with is averaged.
    **options
        See `nearest`, for what is raised too.
    """
    labels, found = _both(source, target, k, **options)
    return _mixing(labels, found, k, seed)


def mixing_of(
    source: Neighbours, to_target: Neighbours, to_source: Neighbours, target: Neighbours, k: int, *, seed: int = 0
) -> Mixing:
    """Return `mixing` from neighbours that have been found, at least `k` of each row in either set.

    Parameters
    ----------
    source, target
        Of the rows of a set among themselves.
    to_target, to_source
        Of the source rows among the target rows, and the other way round.
    """
    num_rows = len(source.indices)
    keys = np.concatenate([_joined(source, to_target, k), _joined(to_source, target, k)])
    recall = min(each.recall for each in (source, to_target, to_source, target))
    return _mixing(np.arange(2 * num_rows) >= num_rows, _decoded(keys, 2 * num_rows, recall), k, seed)


def _joined(of_source: Neighbours, of_target: Neighbours, k: int) -> Indices:
    """Return the keys of the nearest among both sets, the rows of the target being counted on."""
    num_rows = len(of_source.indices)
    parts = []
    for found, offset in ((of_source, 0), (of_target, num_rows)):
        there = found.indices >= 0
        keys = _keys(np.where(there, found.similarities, 0), found.indices + offset, 2 * num_rows)
        parts.append(np.where(there, keys, _NONE))
    return _largest(np.concatenate(parts, axis=1), k)


def _mixing(labels: NDArray[np.bool_], found: Neighbours, k: int, seed: int) -> Mixing:
    rng = np.random.default_rng(seed)
    dealt = [rng.permutation(labels) for _ in range(_PERMUTATIONS)]
    by_chance = np.mean([_entropies(each, found.indices) for each in dealt], axis=0)
    by_chance[by_chance == 0] = np.nan
    text, image = (_entropies(labels, found.indices) / by_chance).tolist()
    return Mixing(*_mean(_other_shares(labels, found.indices)), text, image, k, seed, found.recall)


def knn_overlap(before: Any, after: Any, k: int = 10, **options: Unpack[Options]) -> float:
    """Return the share of a row's `k` nearest neighbours in `before` that are still among them in `after`.

    Both are `(n, dim)`: the same rows before and after a map. See `nearest` for options and what is raised.
    """
    return overlap(before, after, k, **options).value


def overlap(before: Any, after: Any, k: int = 10, **options: Unpack[Options]) -> Overlap:
    """Return `knn_overlap` of `before` and `after` `(n, dim)` with its interval; `k` and options as there."""
    if len(after) != len(before):
        raise ValueError(f"after must have the {len(before)} rows of before, got {len(after)}")
    found, mapped = (
        _nearest(unit_rows(rows, name, options.get("num_threads")), None, k, **options)
        for rows, name in ((before, "before"), (after, "after"))
    )
    return overlap_of(found, mapped)


def overlap_of(before: Neighbours, after: Neighbours) -> Overlap:
    """Return the same of neighbours that have been found, of the same rows among themselves."""
    num_rows, k = before.indices.shape
    row = np.arange(num_rows)[:, None] * num_rows
    there = before.indices >= 0
    kept = there & np.isin(row + before.indices, (row + after.indices)[after.indices >= 0])
    return Overlap(*_mean(_share(kept, there)), k, min(before.recall, after.recall))


def recall_at(queries: Any, candidates: Any, k: int = 1) -> float:
    """Return the share of rows i of `queries` `(n, dim)` with row i of `candidates` among the `k` most similar.

    Candidates as similar as the right one count against it.
    """
    return recalls(queries, candidates, (k,))[k]


def recalls(queries: Any, candidates: Any, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Return `recall_at` each of `ks`, of `queries` and `candidates` `(n, dim)`, from one pass over the similarities.

    Raises
    ------
    ValueError
        If one of `ks` is not between 1 and the number of candidates, the shapes differ, or a row is zero or not finite.
    """
    names = "queries", "candidates"
    rows, others = map(_unit, _pairs(queries, candidates, names), names)
    for k in ks:
        _check_k(k, len(others))
    right = _products(rows, others, np.arange(len(rows))[:, None])
    error = _float32_error(rows.shape[1])
    least, most = (right - error).astype(np.float32), (right + error).astype(np.float32)
    ahead, may_be = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    for part, products in in_parts(rows, others):
        ahead[part] = np.count_nonzero(products > most[part], axis=1)
        may_be[part] = np.count_nonzero(products >= least[part], axis=1) - 1  # itself
    unsure = np.flatnonzero((may_be > ahead) & (ahead < max(ks, default=0)))
    for start, exact in _in_float64(rows[unsure], others):
        which = unsure[start : start + len(exact)]
        ahead[which] = np.count_nonzero(exact > right[which] - _STEP, axis=1) - 1
    return {k: float((ahead < k).mean()) for k in ks}


def recalls_of(found: Neighbours, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Return `recalls` from neighbours of each query among the candidates: more than `max(ks)`, or all there are."""
    right = found.indices == np.arange(len(found.indices))[:, None]
    as_similar = (found.similarities >= found.similarities.max(axis=1, where=right, initial=-np.inf)[:, None]).sum(
        axis=1
    )
    return {k: float((right.any(axis=1) & (as_similar <= k)).mean()) for k in ks}


def unit_rows(x: Any, name: str, num_threads: int | None = None, *, dim: int | None = None) -> Unit:
    """Return `(n, dim)` rows in host memory as float32 of unit length.

    Raises
    ------
    TypeError
        If they are not float16, bfloat16, float32 or float64.
    ValueError
        If there are none, they have another dimension than `dim`, or one of them is zero or not finite.
    """
    return _unit(_rows(x, name, dim), name, num_threads)


@contextmanager
def _limited(get: Callable[[], int], limit: Callable[[int], Any], num_threads: int | None) -> Iterator[None]:
    """Let a library use so many threads, if it is told how many."""
    before = get()
    if num_threads is not None:
        limit(num_threads)
    try:
        yield
    finally:
        limit(before)


def faiss_threads(faiss: Any, num_threads: int | None) -> AbstractContextManager[None]:
    """Let FAISS use so many threads, if it is told how many."""
    return _limited(faiss.omp_get_max_threads, faiss.omp_set_num_threads, num_threads)


def _torch_threads(torch: Any, num_threads: int | None) -> AbstractContextManager[None]:
    return _limited(torch.get_num_threads, torch.set_num_threads, num_threads)


def _rows(x: Any, name: str, dim: int | None = None) -> Rows:
    if np.ndim(x) != 2 or 0 in np.shape(x):
        raise ValueError(f"{name} must have shape (n, dim) and at least one row, got {tuple(np.shape(x))}")
    return as_rows(x, name=name, dim=dim)


def _pairs(first: Any, second: Any, names: tuple[str, str]) -> tuple[Rows, Rows]:
    rows, others = (_rows(x, name) for x, name in zip((first, second), names, strict=True))
    if rows.values.shape != others.values.shape:
        raise ValueError(f"{names[1]} must have shape {rows.values.shape}, got {others.values.shape}")
    return rows, others


def _unit(rows: Rows, name: str, num_threads: int | None = None, out: Unit | None = None) -> Unit:
    if out is None:
        out = np.empty(rows.values.shape, np.float32)
    project = unit_length(out.shape[1]).row_map
    threads = count_threads(num_threads)
    zero, not_finite, first = _C.row_transform(rows.values, rows.bfloat16, out, False, project, threads)
    if first >= 0:
        raise ValueError(
            f"{name} must have finite rows of non-zero norm, got row {first} and in all {zero} of norm zero, "
            f"{not_finite} with NaN or infinity"
        )
    return out


def _check_k(k: int, num_candidates: int) -> None:
    if not 1 <= k <= num_candidates:
        raise ValueError(f"k must be between 1 and {num_candidates}, the number of candidates, got {k}")


def _both(source: Any, target: Any, k: int, **options: Unpack[Options]) -> tuple[NDArray[np.bool_], Neighbours]:
    """Return which of the rows of both sets are the target's, and the neighbours of each among all of them."""
    names = "source", "target"
    sides = _pairs(source, target, names)
    num_rows, dim = sides[0].values.shape
    both = np.empty((2 * num_rows, dim), np.float32)
    for rows, name, out in zip(sides, names, np.split(both, 2), strict=True):
        _unit(rows, name, options.get("num_threads"), out)
    return np.arange(len(both)) >= num_rows, _nearest(both, None, k, **options)


def _other_shares(labels: NDArray[np.bool_], indices: Indices) -> NDArray[np.float64]:
    """Return the share of each row's neighbours that have the other label."""
    return _share((labels[indices] != labels[:, None]) & (indices >= 0), indices >= 0)


def _share(chosen: NDArray[np.bool_], there: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the share of the neighbours of each row that are chosen, NaN for a row without neighbours."""
    counts = there.sum(axis=1)
    shares: NDArray[np.float64] = chosen.sum(axis=1) / np.where(counts == 0, np.nan, counts)
    return shares


def _mean(shares: NDArray[np.float64]) -> tuple[float, tuple[float, float]]:
    """Return the mean of the shares that there are, and its interval."""
    shares = shares[~np.isnan(shares)]
    mean = float(shares.mean())
    margin = float(_STANDARD_ERRORS * shares.std() / np.sqrt(len(shares)))
    return mean, (max(0.0, mean - margin), min(1.0, mean + margin))


def _entropies(labels: NDArray[np.bool_], indices: Indices) -> NDArray[np.float64]:
    """Return the mean binary entropy, in bits, of `_other_shares` over the rows of either label, `(2,)`."""
    shares = _other_shares(labels, indices)
    parts = np.stack([shares, 1 - shares])
    entropy = -(parts * np.log2(np.where(parts == 0, 1, parts))).sum(axis=0)
    return np.array([np.nanmean(entropy[labels == label]) for label in (False, True)])


def _nearest(
    queries: Unit,
    candidates: Unit | None,
    k: int,
    *,
    backend: Backend = "auto",
    num_threads: int | None = None,
    exact: bool | None = None,
) -> Neighbours:
    """As `nearest`, of unit rows."""
    own = np.arange(len(queries)) if candidates is None else np.full(len(queries), -1)
    others = queries if candidates is None else candidates
    _check_k(k, len(others) - (candidates is None))
    name = _choose(backend)
    if exact is False and name == "torch":
        raise ValueError("exact=False needs faiss, got the backend 'torch'")
    module = import_extra(name, "k-NN")
    if name == "torch":
        with _torch_threads(module, num_threads):
            search = partial(_search_by_torch, module)
            return _decoded(_exact_keys(queries, others, own, k, search, num_threads), len(others))
    with faiss_threads(module, num_threads):
        search = partial(_search_by_faiss, module)
        if exact or (exact is None and len(others) <= EXACT_ROWS):
            return _decoded(_exact_keys(queries, others, own, k, search, num_threads), len(others))
        return _search_in_lists(module, queries, others, own, k, num_threads)


def _choose(backend: str) -> str:
    if backend not in ("auto", "faiss", "torch"):
        raise ValueError(f"backend must be one of auto, faiss, torch, got {backend!r}")
    if backend != "auto":
        return backend
    for name in ("faiss", "torch"):
        if find_spec(name) is not None:
            return name
    raise ImportError("k-NN needs faiss or torch: pip install 'realign-fast[faiss]' or 'realign-fast[torch]'")


def _search_by_faiss(faiss: Any, queries: Unit, candidates: Unit, count: int) -> Found:
    if faiss.get_num_gpus() > 0:
        resources, metric = faiss.StandardGpuResources(), faiss.METRIC_INNER_PRODUCT
        found: Found = faiss.knn_gpu(resources, queries, candidates, count, metric=metric)
    else:
        found = faiss.knn(queries, candidates, count, metric=faiss.METRIC_INNER_PRODUCT)
    return found


def _search_by_torch(torch: Any, queries: Unit, candidates: Unit, count: int) -> Found:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns = torch.from_numpy(candidates).to(device).T
    similarities = np.empty((len(queries), count), np.float32)
    indices = np.empty((len(queries), count), np.int64)
    step = max(1, _CHUNK_BYTES // (4 * len(candidates)))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        values, found = (torch.from_numpy(queries[part]).to(device) @ columns).topk(count, dim=1)
        similarities[part], indices[part] = values.cpu().numpy(), found.cpu().numpy()
    return similarities, indices


def _exact_keys(
    queries: Unit, candidates: Unit, own: Indices, k: int, search: Search, num_threads: int | None
) -> Indices:
    """Return the keys of the `k` nearest candidates but `own`, found in float32, and in float64 where that may err."""
    count = min(k + 1 + _SPARE, len(candidates))
    similarities, indices = search(queries, candidates, count)
    products = _products(queries, candidates, indices, count_threads(num_threads))
    keys = _ranked(products, indices, own, len(candidates), k)
    if count < len(candidates):
        # Arithmetic of less precision than float32, as users allow it on GPUs, shows in what it found.
        error = max(_float32_error(queries.shape[1]), 2 * float(np.abs(products - similarities).max()))
        last = _similarities(keys[:, -1], len(candidates))
        unsure = np.flatnonzero(last - similarities[:, -1] <= error)
        if len(unsure):
            keys[unsure] = _keys_in_float64(queries[unsure], candidates, own[unsure], k)
    return keys


def _keys_in_float64(queries: Unit, candidates: Unit, own: Indices, k: int) -> Indices:
    """Return the same from all products in float64, each distinct query once."""
    whole = np.ascontiguousarray(queries).view(np.dtype((np.void, queries.itemsize * queries.shape[1])))[:, 0]
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    num_candidates = len(candidates)
    num_found = min(k + 1, num_candidates)
    found = np.empty((len(first), num_found), np.int64)
    for start, products in _in_float64(queries[first], candidates):
        keys = _keys(products, np.arange(num_candidates), num_candidates)
        keys.partition(num_candidates - num_found, axis=1)
        found[start : start + len(keys)] = keys[:, -num_found:]
    keys = found[inverse]
    keys[_indices(keys, num_candidates) == own[:, None]] = _NONE
    return _largest(keys, k)


def _search_in_lists(
    faiss: Any, queries: Unit, candidates: Unit, own: Indices, k: int, num_threads: int | None
) -> Neighbours:
    """Return neighbours from an inverted file, and the share of the true ones among them."""
    num_candidates, dim = candidates.shape
    num_lists = min(num_candidates, round(4 * num_candidates**0.5))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, num_lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, _TRAINING_ROWS
    index.train(candidates)
    index.add(candidates)
    count = min(k + 1, num_candidates)

    def search(rows: Unit, own: Indices) -> Indices:
        indices = index.search(rows, count)[1]
        products = _products(rows, candidates, indices, count_threads(num_threads))
        return _ranked(products, indices, own, num_candidates, k)

    asked = np.random.default_rng(0).permutation(len(queries))[:_RECALL_QUERIES]
    rows, themselves = queries[asked], own[asked]
    true = _exact_keys(rows, candidates, themselves, k, partial(_search_by_faiss, faiss), num_threads)
    least = true[:, -1:] // num_candidates  # a candidate as similar as the last is as good
    index.nprobe = min(_FIRST_PROBES, num_lists)
    while (recall := float((search(rows, themselves) // num_candidates >= least).mean())) < _LEAST_RECALL:
        if index.nprobe == num_lists:
            break
        index.nprobe = min(2 * index.nprobe, num_lists)
    return _decoded(search(queries, own), num_candidates, recall)


def _products(queries: Unit, candidates: Unit, indices: Indices, threads: int = 1) -> NDArray[np.float64]:
    """Return the inner products `(n, k)` of queries and their candidates: for equal rows, equal to the last bit."""
    products = np.empty(indices.shape)
    step = max(1, _GATHERED_BYTES // (8 * indices.shape[1] * queries.shape[1]))

    def multiply(start: int) -> None:
        part = slice(start, start + step)
        gathered, rows = candidates[indices[part]].astype(np.float64), queries[part].astype(np.float64)
        np.einsum("nkd,nd->nk", gathered, rows, out=products[part])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(multiply, range(0, len(queries), step)))
    return products


def _in_float64(queries: Unit, candidates: Unit) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield the first of some queries, and their inner products with all candidates; no copy of all candidates."""
    step = max(1, _CHUNK_BYTES // (8 * len(candidates)))
    for start in range(0, len(queries), step):
        rows = queries[start : start + step].astype(np.float64)
        products = np.empty((len(rows), len(candidates)))
        for block in range(0, len(candidates), _BLOCK_ROWS):
            columns = slice(block, block + _BLOCK_ROWS)
            products[:, columns] = rows @ candidates[columns].T.astype(np.float64)
        yield start, products


def _float32_error(dim: int) -> float:
    """Return how far an inner product of unit rows can be off in float32, in any order of summation."""
    return float((dim + 2) * 2.0**-24)


# A key holds a similarity, in whole steps, and an index in one integer: the larger key is the nearer neighbour.


def _keys(products: NDArray[np.float64], indices: Indices, num_candidates: int) -> Indices:
    steps = np.rint(products / _STEP).astype(np.int64)
    return steps * num_candidates + (num_candidates - 1 - indices)


def _indices(keys: Indices, num_candidates: int) -> Indices:
    return num_candidates - 1 - keys % num_candidates


def _similarities(keys: Indices, num_candidates: int) -> NDArray[np.float64]:
    similarities: NDArray[np.float64] = np.multiply(keys // num_candidates, _STEP)
    return similarities


def _ranked(products: NDArray[np.float64], indices: Indices, own: Indices, num_candidates: int, k: int) -> Indices:
    keys = _keys(products, indices, num_candidates)
    keys[(indices < 0) | (indices == own[:, None])] = _NONE
    return _largest(keys, k)


def _largest(keys: Indices, k: int) -> Indices:
    """Return the `k` largest of each row, descending; `keys` is overwritten."""
    keys.sort(axis=1)
    return np.ascontiguousarray(keys[:, ::-1][:, :k])


def _decoded(keys: Indices, num_candidates: int, recall: float = 1.0) -> Neighbours:
    there = keys != _NONE
    indices = np.where(there, _indices(keys, num_candidates), -1)
    similarities = np.where(there, _similarities(keys, num_candidates), -np.inf)
    return Neighbours(indices, similarities, recall)
