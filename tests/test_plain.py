"""What does the work of the extension where there is none, beside the extension."""

import ast
import inspect
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import realign_fast as rf
from realign_fast import _plain
from realign_fast._dtypes import DTYPES, Rows, from_float64, storage, to_float64
from realign_fast._plain_hash import PythonXXH64

_C = pytest.importorskip("realign_fast._C", reason="there is no extension to compare with")

# None, one; around groups of eight; more than a chunk of 2^19 elements.
SHAPES = ((0, 5), (1, 1), (9, 3), (65, 255), (700, 768), (70_000, 8))
OUT_TOLERANCE = {"float16": 5e-4 + 4e-7, "bfloat16": 4e-3 + 4e-7, "float32": 4e-7, "float64": 1e-14}


def make(count, dim, dtype="float32", bad=True):
    """Return rows around a mean; some are bad, and some large and small where the dtype has such numbers."""
    rng = np.random.default_rng(count + dim)
    values = rng.normal(0.1, 1, (count, dim)) / np.sqrt(dim)
    if dtype != "float16":
        values *= 10.0 ** rng.integers(-30, 30, (count, 1))
    if bad and count > 8:
        values[3], values[5, dim - 1], values[count - 1, 0] = 0, np.nan, -np.inf
    return cast(values, dtype)


def cast(values, dtype):
    rows = Rows(np.empty(values.shape, storage(dtype)), dtype)
    from_float64(values, rows)
    return rows


def map_of(of, dim):
    rng = np.random.default_rng(dim)
    return of.RowMap(1.2, 0.5 * rng.normal(size=dim) / dim**0.5, 0.1 * rng.normal(size=dim) / dim**0.5)


def added_up(of, dim, mapped):
    sums = np.zeros(dim, np.int64)
    map_of(of, dim).add_up(mapped, sums)
    return sums


def affine_of(of, dim, out_dim):
    rng = np.random.default_rng(dim)
    matrix = rng.normal(size=(out_dim, dim)) / dim**0.5
    return of.AffineMap(matrix, rng.normal(size=dim) / dim**0.5, rng.normal(size=out_dim) / out_dim**0.5)


def assert_sums_agree(found, wanted, num_rows):
    """Each lies so close to the true mean (README, Numerics)."""
    bound = 2**27 * (1e-9 * num_rows + 8e-8 * np.sqrt(num_rows))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2 * bound)


def both(call):
    """Return what a call makes of either, of the extension second."""
    return call(_plain), call(_C)


def written(rows, dtype, function, *arguments, dim=None):
    """Return what a function writes beside the rows, and what it returns."""
    out = np.full((len(rows.values), dim or rows.values.shape[1]), 7, storage(dtype))
    found = function(rows.values, rows.bfloat16, out, dtype == "bfloat16", *arguments)
    return to_float64(Rows(out, dtype)), found


def assert_written_alike(found, wanted, dtype, atol=None):
    assert found[1] == wanted[1]
    np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=atol or OUT_TOLERANCE[dtype])


def parameters_of(function):
    return [argument.arg for argument in function.args.args if argument.arg != "self"]


def test_it_has_the_surface_that_the_stub_states():
    stub = ast.parse(Path(_plain.__file__).with_name("_C.pyi").read_text())
    assert _plain.FIXED_POINT_BITS == _C.FIXED_POINT_BITS
    functions = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    del classes["FileMap"]  # files are read
    for name, node in classes.items():
        methods = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
        functions[name] = methods["__init__"]
        made = {"XXH64": _plain.XXH64(), "RowMap": map_of(_plain, 3), "AffineMap": affine_of(_plain, 3, 2)}[name]
        assert all(hasattr(made, method) for method in methods)
    for name, node in functions.items():
        assert list(inspect.signature(getattr(_plain, name)).parameters) == parameters_of(node), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "dim"), SHAPES)
def test_moments(dtype, count, dim):
    rows = make(count, dim, dtype)

    def run(of):
        sums, keys = np.ones(dim, np.int64), np.ones(count, np.uint64)
        return sums, keys, of.moments(rows.values, rows.bfloat16, sums, keys, 2)

    found, wanted = both(run)
    assert found[2] == wanted[2]
    np.testing.assert_array_equal(found[1] == 0, wanted[1] == 0)
    if dtype == "float64":
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1], wanted[1])
    else:
        assert_sums_agree(found[0], wanted[0], count)


def test_keys_and_sums_depend_on_the_content_of_rows_alone():
    rows = make(500, 70).values
    strided = np.broadcast_to(rows[:, None, :], (500, 3, 70)).copy()[:, 1]
    keys, sums = np.empty(500, np.uint64), np.zeros(70, np.int64)
    _plain.moments(rows, False, sums, keys, 1)
    assert len(np.unique(keys)) == 500 - 3 + 1
    for some in (slice(None, None, -1), slice(7, 8), slice(100, 411)):
        again = np.empty(len(keys[some]), np.uint64)
        _plain.moments(strided[some], False, np.zeros(70, np.int64), again, 1)
        np.testing.assert_array_equal(again, keys[some])
    parts = np.zeros(70, np.int64)
    for part in np.array_split(strided, [1, 8, 200]):
        _plain.moments(part, False, parts, None, 1)
    np.testing.assert_array_equal(parts, sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "dim"), SHAPES)
def test_row_transform_and_what_reads_as_it_does(dtype, count, dim):
    rows = make(count, dim, dtype)
    for out_dtype in DTYPES:
        found, wanted = both(lambda of, out=out_dtype: written(rows, out, of.row_transform, map_of(of, dim), 2))
        assert_written_alike(found, wanted, out_dtype)
    bad = wanted[1]
    assert _plain.find_bad_rows(rows.values, rows.bfloat16, 1) == bad
    copy = rows.values.copy()
    assert _plain.row_transform(copy, rows.bfloat16, copy, rows.bfloat16, map_of(_plain, dim), 1) == bad
    np.testing.assert_array_equal(copy, written_bits(rows, map_of(_plain, dim)))

    def sums_of(of):
        mapped = np.zeros(dim + of.NUM_FACTORS, np.int64)
        bad = of.transformed_moments(rows.values, rows.bfloat16, map_of(of, dim), mapped, 2)
        return added_up(of, dim, mapped), bad

    found, wanted = both(sums_of)
    assert found[1] == wanted[1] == bad
    assert_sums_agree(found[0], wanted[0], count)


@pytest.mark.parametrize(("scale", "length"), [(0.3, 0.1), (1.0, 0.7), (1.7, 1.2), (4.0, 3.5), (70.0, 69.9)])
def test_sums_of_mapped_rows_are_added_up_by_either(scale, length):
    """As where a job goes on with another build."""
    rows, dim = make(300, 96, "float32"), 96
    shift = length * np.sign(np.random.default_rng(1).normal(size=dim)) / dim**0.5
    found = []
    for of in (_C, _plain):
        mapped = np.zeros(dim + of.NUM_FACTORS, np.int64)
        of.transformed_moments(rows.values, False, of.RowMap(scale, shift, np.zeros(dim)), mapped, 1)
        for by in (_C, _plain):
            sums = np.zeros(dim, np.int64)
            by.RowMap(scale, shift, np.zeros(dim)).add_up(mapped, sums)
            found.append(sums / 2.0**27 / 300)
    for each in found[1:]:
        np.testing.assert_allclose(each, found[0], rtol=0, atol=1e-6)


def written_bits(rows, row_map):
    out = np.empty_like(rows.values)
    _plain.row_transform(rows.values, rows.bfloat16, out, rows.bfloat16, row_map, 1)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_transform_by_domain(dtype):
    rows = make(900, 100, dtype)
    domain = np.random.default_rng(0).integers(0, 3, 900)

    def run(of):
        maps = [
            map_of(of, 100),
            of.RowMap(1.0, np.zeros(100), np.zeros(100)),
            of.RowMap(0.5, np.ones(100), np.ones(100)),
        ]
        return written(rows, dtype, of.row_transform_by_domain, maps, domain, 2)

    assert_written_alike(*both(run), dtype)
    for of in (_plain, _C):
        with pytest.raises(ValueError, match=r"domain must lie in \[0, 1\), got 1 for row 2"):
            written(make(3, 9), "float32", of.row_transform_by_domain, [map_of(of, 9)], np.array([0, 0, 1]), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", ["affine", "map", "affine map"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_staged_transform(dtype, steps, noise):
    rows = make(300, 70, dtype)
    out_dim = 65 if "affine" in steps else 70
    for index in (None, np.random.default_rng(1).integers(-(2**60), 2**60, 300)):

        def run(of, index=index):
            affine = affine_of(of, 70, out_dim) if "affine" in steps else None
            row_map = map_of(of, out_dim) if "map" in steps else None
            arguments = affine, row_map, noise, 2**64 - 5, index, 2**40, 2
            return written(rows, dtype, of.staged_transform, *arguments, dim=out_dim)

        # Float32 from step to step; without a projection, elements reach 4.
        assert_written_alike(*both(run), dtype, atol={"float16": 2e-3, "bfloat16": 2e-2}.get(dtype, 4e-6))


def test_staged_transform_in_place():
    rows = make(300, 70)
    arguments = affine_of(_plain, 70, 70), map_of(_plain, 70), 0.1, 3, None, 0, 1
    wanted, _ = written(rows, "float32", _plain.staged_transform, *arguments)
    _plain.staged_transform(rows.values, False, rows.values, False, *arguments)
    np.testing.assert_array_equal(rows.values, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "dim"), SHAPES)
def test_affine_moments(dtype, count, dim):
    rows = make(count, dim, dtype)

    def run(of):
        mapped = np.zeros(dim + of.NUM_FACTORS, np.int64)
        maps = affine_of(of, dim, dim), map_of(of, dim)
        bad = of.affine_moments(rows.values, rows.bfloat16, *maps, mapped, 2)
        return added_up(of, dim, mapped), bad

    found, wanted = both(run)
    assert found[1] == wanted[1]
    np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=2e-6 * 2**27 * max(1, count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "dim"), [(0, 5), (9, 1), (300, 50), (3000, 200)])
def test_covariance(dtype, count, dim):
    rows = make(count, dim, dtype)
    pilot = np.random.default_rng(0).normal(size=dim) / dim

    def run(of):
        sums, keys, products = np.zeros(dim, np.int64), np.empty(count, np.uint64), np.zeros((dim, dim))
        return products, sums, of.covariance(
            rows.values, rows.bfloat16, pilot, sums, keys, products, 0, False, 2
        )  # fmt: skip

    found, wanted = both(run)
    assert found[2] == wanted[2]
    assert not np.triu(found[0], 1).any()
    assert np.linalg.norm(found[0] - wanted[0]) <= 2e-7 * np.linalg.norm(wanted[0])
    assert_sums_agree(found[1], wanted[1], count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_row_transform_backward(dtype, grad_dtype):
    rows, grad = make(300, 100, dtype), make(300, 100, grad_dtype, bad=False)
    if grad_dtype != "float16":
        grad = cast(np.random.default_rng(3).normal(size=(300, 100)), grad_dtype)

    def run(of):
        out = np.empty_like(rows.values)
        of.row_transform_backward(rows.values, rows.bfloat16, grad.values, grad.bfloat16, out, map_of(of, 100), 2)
        return to_float64(Rows(out, dtype))

    found, wanted = both(run)
    scale = np.abs(wanted).max(axis=1, keepdims=True)
    assert (np.abs(found - wanted) <= {"float16": 1e-3, "bfloat16": 8e-3}.get(dtype, 2e-5) * scale).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mapped", [False, True])
def test_take_rows(dtype, mapped):
    rows = make(300, 100, dtype)
    numbers = np.random.default_rng(0).integers(300, size=500)

    def run(of):
        out = np.empty((500, 100), rows.values.dtype)
        found = of.take_rows(rows.values, rows.bfloat16, numbers, out, map_of(of, 100) if mapped else None, 2)
        return found, to_float64(Rows(out, dtype))

    found, wanted = both(run)
    assert found[0] == wanted[0]
    if mapped:
        bound = {"float16": 1e-3, "bfloat16": 8e-3}.get(dtype, 4e-7)
        np.testing.assert_allclose(found[1], wanted[1], rtol=0, atol=bound)
    else:
        np.testing.assert_array_equal(found[1], wanted[1])


@pytest.mark.parametrize("length", [200, 1_000_000])
def test_files_are_read_and_mapped(tmp_path, length):
    rows = make(1000, 60)
    path = tmp_path / "a"
    path.write_bytes(bytes(24) + rows.values.tobytes()[: length if length < 200_000 else None])
    order = np.random.default_rng(0).permutation(1000)
    with path.open("rb") as file:
        fds, offsets = np.full(1000, file.fileno(), np.int32), 24 + order * 240

        def run(of):
            a, b, c, d = (np.zeros((1000, 60), np.float32) for _ in range(4))
            found = [
                of.read_file(file.fileno(), a, 24, 2),
                of.read_rows(fds, offsets, b, 240, 2),
                of.read_file_transform(file.fileno(), 24, c, False, map_of(of, 60), 2),
                of.read_rows_transform(fds, offsets, d, False, map_of(of, 60), 2),
            ]
            return found, a, b, c, d

        found, wanted = both(run)
    if length > 200:
        assert found[0] == wanted[0]
        np.testing.assert_array_equal(found[1], wanted[1])
        np.testing.assert_array_equal(found[2], wanted[2])
        np.testing.assert_allclose(found[3], wanted[3], rtol=0, atol=4e-7)
        np.testing.assert_allclose(found[4], wanted[4], rtol=0, atol=4e-7)
    else:  # what is short makes no more of it than where
        assert [first[0] if isinstance(first, tuple) else first for first in found[0]] == [
            first[0] if isinstance(first, tuple) else first for first in wanted[0]
        ]


def test_streams_touch_every_byte():
    source = np.random.default_rng(0).integers(0, 256, 1003, np.uint8)
    target = np.zeros_like(source)
    _plain.stream_copy(source, target, True, 1)
    np.testing.assert_array_equal(target, source)
    _plain.stream_read(source, 1)


@given(st.lists(st.binary(max_size=100), max_size=8), st.integers(0, 2**64 - 1))
def test_xxh64(parts, seed):
    for found in (PythonXXH64(seed), _plain.XXH64(seed)):
        wanted = _C.XXH64(seed)
        for part in parts:
            found.update(part)
            wanted.update(part)
            assert found.intdigest() == wanted.intdigest()
        assert found.hexdigest() == wanted.hexdigest()


def test_xxh64_of_much():
    data = np.random.default_rng(0).integers(0, 256, 1_000_003, np.uint8)
    found, wanted = PythonXXH64(), _C.XXH64()
    for part in np.split(data, [1, 200_000, 200_031]):
        found.update(part)
        wanted.update(part)
    assert found.hexdigest() == wanted.hexdigest()


def test_ids():
    ids = [f"ü-{i % 900}" for i in range(1000)] + ["", "x" * 100]
    encoded = [each.encode() for each in ids]
    offsets = np.cumsum([0, *map(len, encoded)])
    text = b"".join(encoded)
    hashes = [np.empty(len(ids), np.uint64) for _ in range(2)]
    for of, each in zip((_plain, _C), hashes, strict=True):
        of.hash_ids(offsets, text, each)
    np.testing.assert_array_equal(*hashes)
    order = np.argsort(hashes[0], kind="stable")
    wanted = [*ids, "missing", "x"]
    rng = np.random.default_rng(0)
    damaged = offsets.copy()
    damaged[rng.integers(0, len(offsets), 50)] = rng.integers(-5, 10**6, 50)
    for table in (offsets, damaged):
        for rows in (order, np.where(rng.random(len(order)) < 0.1, rng.integers(-9, 2000, len(order)), order)):
            found = [np.empty(len(wanted), np.int64) for _ in range(2)]
            missing = [
                of.find_ids(wanted, hashes[0][order], rows, table, text, each)
                for of, each in zip((_plain, _C), found, strict=True)
            ]
            np.testing.assert_array_equal(*found)
            assert missing[0] == missing[1] == int(np.argmax(found[0] < 0))
    for wrong in (7, "\udc00"):
        with pytest.raises(TypeError, match="ids must be text, got"):
            _plain.find_ids([wrong], hashes[0], order, offsets, text, np.empty(1, np.int64))


def verdict(of, data):
    try:
        of.scan_pickle(data)
    except ValueError as error:
        return str(error)
    return "good"


def test_pickles_get_the_same_verdict_in_the_same_words():
    """Whole, cut anywhere, and with bytes and pieces changed; what runs code is refused by either."""
    row = {"id": "a", "embed": np.arange(3, dtype=np.float32), "more": (None, True, 1.5, [10**20, b"x", "y" * 300])}
    wholes = [pickle.dumps(each, protocol) for protocol in range(6) for each in ([row, row], [{}], 7, [[(1, [2])]])]
    wholes += [
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"]\x94h\x00a.",
    ]
    rng, seen = random.Random(0), {}
    for whole in wholes:
        cases = [whole[:size] for size in range(len(whole) + 1)]
        for _ in range(400):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 1, 2, 5))):
                begin = rng.randrange(len(data))
                piece = rng.choice(wholes)
                piece = piece[rng.randrange(len(piece)) :][: rng.choice((1, 1, 1, 9))]
                data[begin : begin + rng.choice((0, 1, 1, 9))] = rng.choice((piece, rng.randbytes(1)))
                if not data:
                    break
            cases.append(bytes(data))
        for data in cases:
            found = verdict(_plain, data)
            assert found == verdict(_C, data), data
            seen[found.partition(": ")[2]] = data
    assert len(seen) > 30


WITHOUT = {**os.environ, "REALIGN_FAST_NO_EXTENSION": "1"}


def test_commands_give_what_they_give_with_the_extension(tmp_path):
    rng = np.random.default_rng(0)
    for side in ("text", "image"):
        (tmp_path / side).mkdir()
        centre = rng.normal(size=64)
        for shard in range(2):
            values = centre + rng.normal(size=(3000, 64))
            np.save(tmp_path / side / f"part_{shard}.npy", values.astype(np.float32))
    for name, environment in (("with", os.environ), ("without", WITHOUT)):
        for command in (
            ["fit", "text", "image", "-o", f"{name}.safetensors"],
            ["apply", "with.safetensors", "text", "-o", name],
            ["verify", name],
        ):
            process = [sys.executable, "-m", "realign_fast", *command]
            done = subprocess.run(process, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            lines = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
            assert len(lines) == (name == "without")
            for line in lines:
                assert "the compiled extension realign_fast._C is missing" in line
                assert "install a wheel for this platform, or a C++17 compiler and realign-fast anew" in line
                assert line.count("\n") == 0
    found, wanted = (rf.Alignment.load(tmp_path / f"{name}.safetensors") for name in ("without", "with"))
    bound = 2 * (1e-9 + 8e-8 / np.sqrt(6000))
    np.testing.assert_allclose(found.shift, wanted.shift, rtol=0, atol=3 * bound)
    np.testing.assert_allclose(found.correction, wanted.correction, rtol=0, atol=3 * bound)
    assert found.scale == pytest.approx(wanted.scale, abs=1e-6)
    for shard in range(2):
        found, wanted = (np.load(tmp_path / name / f"part_{shard}.npy") for name in ("without", "with"))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-7)
    # Either reads what the other has written.
    process = [sys.executable, "-m", "realign_fast", "verify", "with"]
    assert subprocess.run(process, cwd=tmp_path, env=WITHOUT, capture_output=True).returncode == 0


def test_importing_alone_says_nothing():
    code = "import realign_fast, realign_fast.cli"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=WITHOUT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
