"""Nearest neighbours and their metrics against plain float64 loops, for either library that searches."""

import subprocess
import sys

import faiss
import numpy as np
import pytest
import torch

from realign_fast import reference
from realign_fast.geometry import neighbors
from realign_fast.geometry.neighbors import (
    knn_mixing,
    knn_overlap,
    mixing,
    mixing_of,
    nearest,
    overlap,
    recall_at,
    recalls,
    recalls_of,
)

BACKENDS = ["faiss", "torch"]


def cloud(count, dim, seed=0):
    return np.random.default_rng(seed).normal(0.1, 1, (count, dim)).astype(np.float32)


def unit(rows):
    return reference.project(np.asarray(rows, np.float64)).astype(np.float32).astype(np.float64)


def ordered(queries, candidates=None):
    """Return every other candidate of each query, by similarity, then by index."""
    rows = unit(queries)
    others = rows if candidates is None else unit(candidates)
    found = []
    for i, row in enumerate(rows):
        similarities = np.rint([(row * other).sum() * 2**36 for other in others])
        order = sorted(range(len(others)), key=lambda j: (-similarities[j], j))
        found.append([j for j in order if candidates is not None or j != i])
    return np.array(found)


def shares_of_others(source, target, k):
    order = ordered(np.concatenate([source, target]))[:, :k]
    text = np.arange(len(order)) < len(source)
    return np.array([np.mean([text[j] != text[i] for j in row]) for i, row in enumerate(order)]), order


SETS = {
    "cloud": cloud(90, 37),
    "one dimension": cloud(40, 1),
    "float64": cloud(90, 255).astype(np.float64),
    "float16": cloud(60, 64).astype(np.float16),
    "constant": np.full((70, 19), 0.3),
    "groups": np.repeat(cloud(4, 16), 25, axis=0)[np.random.default_rng(1).permutation(100)],
    "pairs": np.repeat(cloud(40, 16), 2, axis=0),
    "nearly the same": 1 + 1e-6 * cloud(80, 33),
    "axes": np.eye(8)[np.random.default_rng(2).integers(0, 8, 60)],
    "signed zeros": np.where(np.eye(8) == 0, [[-0.0], [0.0]] * 4, 1)[np.random.default_rng(3).integers(0, 8, 60)],
    "opposite": np.concatenate([np.ones((30, 5)), -np.ones((30, 5))]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SETS)
def test_neighbours_are_those_of_a_loop(name, backend):
    rows = SETS[name]
    for k in (1, 12):
        found = nearest(rows, k=k, backend=backend)
        np.testing.assert_array_equal(found.indices, ordered(rows)[:, :k])
        assert (found.indices.dtype, found.similarities.dtype, found.recall) == (np.int64, np.float64, 1.0)
        wanted = np.einsum("id,ikd->ik", unit(rows), unit(rows)[found.indices])
        np.testing.assert_allclose(found.similarities, wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates_of_their_own(backend):
    rows, others = cloud(30, 12), np.concatenate([cloud(50, 12, 1), cloud(30, 12)])
    found = nearest(rows, others, k=80, backend=backend)
    np.testing.assert_array_equal(found.indices, ordered(rows, others))
    np.testing.assert_array_equal(found.indices[:, 0], np.arange(50, 80))


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_neighbours_as_there_are_other_rows(backend):
    rows = cloud(20, 6)
    np.testing.assert_array_equal(nearest(rows, k=19, backend=backend).indices, ordered(rows))


@pytest.mark.parametrize("name", ["cloud", "groups", "nearly the same"])
def test_chunks_and_threads_change_nothing(name, monkeypatch):
    whole = [nearest(SETS[name], k=10, backend=backend) for backend in BACKENDS]
    for limit in ("_CHUNK_BYTES", "_GATHERED_BYTES"):
        monkeypatch.setattr(neighbors, limit, 3000)
    monkeypatch.setattr(neighbors, "_BLOCK_ROWS", 7)
    for backend, wanted in zip(BACKENDS, whole, strict=True):
        found = nearest(SETS[name], k=10, backend=backend, num_threads=1)
        np.testing.assert_array_equal(found.indices, wanted.indices)
        np.testing.assert_array_equal(found.similarities, wanted.similarities)


def test_a_coarser_search_is_seen_and_set_right(monkeypatch):
    """A GPU may multiply in a precision that its user chose."""
    rows, exact = cloud(300, 64), neighbors._search_by_faiss

    def coarse(*arguments):
        queries, candidates = (x.astype(np.float16).astype(np.float32) for x in arguments[1:3])
        return exact(arguments[0], queries, candidates, arguments[3])

    monkeypatch.setattr(neighbors, "_search_by_faiss", coarse)
    np.testing.assert_array_equal(nearest(rows, k=20, backend="faiss").indices, ordered(rows)[:, :20])


def test_faiss_searches_on_gpus_if_it_can(monkeypatch):
    calls = []

    def knn_gpu(resources, queries, candidates, k, metric):
        calls.append(resources)
        return faiss.knn(queries, candidates, k, metric=metric)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "resources", raising=False)
    monkeypatch.setattr(faiss, "knn_gpu", knn_gpu)
    np.testing.assert_array_equal(nearest(SETS["cloud"], k=5).indices, ordered(SETS["cloud"])[:, :5])
    assert calls == ["resources"]


def test_tensors_of_any_kind():
    rows = torch.from_numpy(cloud(40, 16)).bfloat16()
    np.testing.assert_array_equal(nearest(rows, k=6).indices, ordered(rows.float().numpy())[:, :6])


def test_the_number_of_threads_is_set_and_put_back():
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    with neighbors.faiss_threads(faiss, 1), neighbors._torch_threads(torch, 1):
        assert (faiss.omp_get_max_threads(), torch.get_num_threads()) == (1, 1)
    assert (faiss.omp_get_max_threads(), torch.get_num_threads()) == before


def test_lists_find_what_they_say():
    rows = cloud(3000, 24)
    found, true = nearest(rows, k=10, exact=False), nearest(rows, k=10)
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(found.indices.tolist(), true.indices.tolist(), strict=True)]
    assert 0.95 <= found.recall <= 1
    assert np.mean(shares) == pytest.approx(found.recall, abs=0.02)
    assert (found.indices != np.arange(3000)[:, None]).all()
    assert nearest(rows, k=10, exact=False).recall == found.recall


def test_more_candidates_than_a_limit_go_into_lists(monkeypatch):
    monkeypatch.setattr(neighbors, "EXACT_ROWS", 400)
    rows = cloud(500, 8)
    assert nearest(rows[:400], k=3).recall == 1
    assert nearest(rows, k=3, backend="torch").recall == nearest(rows, k=3, exact=True).recall == 1
    monkeypatch.setattr(neighbors, "_FIRST_PROBES", 1)
    monkeypatch.setattr(neighbors, "_LEAST_RECALL", 0)
    assert nearest(rows, rows[:401], k=3).recall < 1


def test_neighbours_that_there_are_not_count_in_no_share(monkeypatch):
    monkeypatch.setattr(neighbors, "_FIRST_PROBES", 1)
    monkeypatch.setattr(neighbors, "_LEAST_RECALL", 0)
    text, image = (np.repeat(cloud(20, 16, seed), 6, axis=0) for seed in (1, 2))
    found = nearest(np.concatenate([text, image]), k=20, exact=False)
    there = found.indices >= 0
    assert not there.all()
    assert (found.similarities == -np.inf).tolist() == (~there).tolist()
    assert found.recall < 0.95
    source = np.arange(240) < 120
    wanted = [np.mean([source[j] != source[i] for j in row if j >= 0]) for i, row in enumerate(found.indices)]
    assert mixing(text, image, exact=False).value == pytest.approx(np.mean(wanted))
    assert overlap(text, text, k=20, exact=False).value == 1
    assert overlap(text, image, k=20, exact=False).recall < 0.95


def test_lists_that_are_all_looked_into_find_all(monkeypatch):
    monkeypatch.setattr(neighbors, "_LEAST_RECALL", 1.1)
    rows = cloud(200, 8)
    found = nearest(rows, k=5, exact=False)
    assert found.recall == 1
    np.testing.assert_array_equal(found.indices, ordered(rows)[:, :5])


@pytest.mark.parametrize("first", BACKENDS)
def test_both_libraries_in_one_process_in_either_order(first):
    second = BACKENDS[1 - BACKENDS.index(first)]
    code = f"""if True:
        import numpy as np
        from realign_fast.geometry.neighbors import nearest
        rows = np.random.default_rng(0).normal(size=(2000, 32))
        found = [nearest(rows, k=20, backend=b).indices for b in ("{first}", "{second}", "{first}")]
        assert (found[0] == found[1]).all() and (found[0] == found[2]).all()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_mixing_against_a_loop():
    text, image = cloud(60, 6), cloud(60, 6, 1) + 0.3
    shares, order = shares_of_others(text, image, 7)
    found = mixing(text, 1024 * image, k=7, seed=3)
    margin = 1.96 * shares.std() / np.sqrt(120)
    assert found.value == knn_mixing(text, image, k=7) == pytest.approx(shares.mean())
    assert found.interval == pytest.approx((shares.mean() - margin, shares.mean() + margin))
    assert (found.k, found.seed, found.recall) == (7, 3, 1)

    def entropy(shares):
        return np.mean([-sum(p * np.log2(p) for p in (s, 1 - s) if p > 0) for s in shares])

    rng = np.random.default_rng(3)
    labels = np.arange(120) >= 60
    chance = np.zeros((10, 2))
    for permutation in chance:
        dealt = rng.permutation(labels)
        for side in (0, 1):
            permutation[side] = entropy([(dealt[order[i]] != side).mean() for i in np.flatnonzero(dealt == side)])
    wanted = entropy(shares[:60]) / chance[:, 0].mean(), entropy(shares[60:]) / chance[:, 1].mean()
    assert (found.text, found.image) == pytest.approx(wanted)


def test_mixing_of_one_distribution_and_of_two_apart():
    rows = np.random.default_rng(4).normal(size=(1600, 8))
    found = mixing(rows[:800], rows[800:])
    assert found.interval[0] < 0.5 < found.interval[1]
    assert (found.text, found.image) == pytest.approx((1, 1), abs=0.02)
    assert mixing(rows[:800], rows[800:], backend="torch") == found
    apart = mixing(rows[:50] * 0.1 + 3, rows[50:100] * 0.1 - 3)
    assert (apart.value, apart.interval, apart.text, apart.image) == (0, (0, 0), 0, 0)


def test_mixing_with_one_neighbour_has_no_entropy():
    found = mixing(cloud(30, 4), cloud(30, 4, 1), k=1)
    assert np.isnan([found.text, found.image]).all()


def test_overlap_against_a_loop():
    before, after = cloud(80, 10), cloud(80, 10) + cloud(80, 10, 1)
    orders = ordered(before)[:, :9].tolist(), ordered(after)[:, :9].tolist()
    shares = np.array([len(set(a) & set(b)) / 9 for a, b in zip(*orders, strict=True)])
    margin = 1.96 * shares.std() / np.sqrt(80)
    found = overlap(before, after, k=9)
    assert found.value == knn_overlap(before, after, k=9) == pytest.approx(shares.mean())
    assert found.interval == pytest.approx((shares.mean() - margin, shares.mean() + margin))
    assert (found.k, found.recall) == (9, 1)
    assert overlap(before, before, k=9).value == 1


@pytest.mark.parametrize("name", SETS)
def test_recalls_against_a_loop(name, monkeypatch):
    candidates = SETS[name]
    noise = 0.3 * np.random.default_rng(5).normal(size=candidates.shape)
    for queries in (candidates, candidates + (noise > 0.5) * noise):
        rows, others = unit(queries), unit(candidates)
        similarities = np.array([[(row * other).sum() for other in others] for row in rows])
        ranks = [(row > row[i] - 2**-36).sum() for i, row in enumerate(similarities)]
        wanted = {k: np.mean([rank <= k for rank in ranks]) for k in (1, 3, 30)}
        assert recalls(queries, candidates, (1, 3, 30)) == pytest.approx(wanted)
        with monkeypatch.context() as patch:
            patch.setattr("realign_fast._nearest._CHUNK_BYTES", 3000)
            patch.setattr(neighbors, "_CHUNK_BYTES", 3000)
            assert recalls(queries, candidates, (1, 3, 30)) == pytest.approx(wanted)
        if name != "nearly the same":  # where rounding to steps decides
            found = nearest(queries, candidates, min(31, len(candidates)))
            assert recalls_of(found, (1, 3, 30)) == pytest.approx(wanted)


@pytest.mark.parametrize("name", SETS)
def test_parts_of_a_search_make_the_whole(name):
    source, target = SETS[name], SETS[name][::-1] + 0.1
    k = 7
    within = [nearest(rows, k=k + 3) for rows in (source, target)]
    across = nearest(source, target, k), nearest(target, source, k + 1)
    assert mixing_of(within[0], *across, within[1], k, seed=2) == mixing(source, target, k, seed=2)


def test_recall_needs_no_library(monkeypatch):
    for name in BACKENDS:
        monkeypatch.setitem(sys.modules, name, None)
    assert recall_at(cloud(20, 4), cloud(20, 4)) == 1


def test_backends_that_are_not_there(monkeypatch):
    rows = cloud(20, 4)
    monkeypatch.setitem(sys.modules, "faiss", None)
    np.testing.assert_array_equal(nearest(rows, k=3).indices, ordered(rows)[:, :3])
    with pytest.raises(ImportError, match=r"k-NN needs faiss: pip install 'realign-fast\[faiss\]'"):
        nearest(rows, k=3, backend="faiss")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"k-NN needs torch: pip install 'realign-fast\[torch\]'"):
        nearest(rows, k=3, backend="torch")
    with pytest.raises(ImportError, match=r"needs faiss or torch: pip install 'realign-fast\[faiss\]' or 'realign-fas"):
        nearest(rows, k=3)


def broken(row, value):
    rows = cloud(10, 4)
    rows[row:] = value
    return rows


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: nearest(x[0]), r"queries must have shape \(n, dim\) and at least one row, got \(4,\)"),
        (lambda x: nearest(x, x[:0]), r"candidates must have shape .* got \(0, 4\)"),
        (lambda x: nearest(x, x[:, :3]), r"candidates must have rows of dimension 4, got shape \(10, 3\)"),
        (lambda x: nearest(x, k=10), "k must be between 1 and 9, the number of candidates, got 10"),
        (lambda x: nearest(x, x, k=11), "k must be between 1 and 10, the number of candidates, got 11"),
        (lambda x: nearest(x, k=0), "k must be between 1 and 9"),
        (lambda x: nearest(x, k=1, num_threads=0), "num_threads must be at least 1, got 0"),
        (lambda x: nearest(x, k=1, backend="numpy"), "backend must be one of auto, faiss, torch, got 'numpy'"),
        (lambda x: nearest(x, k=1, backend="torch", exact=False), "exact=False needs faiss, got the backend 'torch'"),
        (lambda x: nearest(broken(7, 0), k=1), "queries must have finite rows .* row 7 and in all 3 of norm zero, 0 w"),
        (lambda x: mixing(x, broken(2, np.nan), k=1), "target must have .* row 2 and in all 0 of norm zero, 8 with"),
        (lambda x: mixing(x, x[:3]), r"target must have shape \(10, 4\), got \(3, 4\)"),
        (lambda x: knn_mixing(x[:, :0], x), r"source must have shape \(n, dim\)"),
        (lambda x: overlap(x, x[:4], k=3), "after must have the 10 rows of before, got 4"),
        (lambda x: overlap(x, broken(9, np.inf), k=3), "after must have finite rows .* row 9"),
        (lambda x: recalls(x, x[:4]), r"candidates must have shape \(10, 4\), got \(4, 4\)"),
        (lambda x: recalls(x, x, (1, 11)), "k must be between 1 and 10, the number of candidates, got 11"),
        (lambda x: recalls(broken(0, 0), x), "queries must have finite rows"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(cloud(10, 4))


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"queries\.dtype must be one of float16"):
        nearest(np.ones((4, 4), np.int32), k=1)
