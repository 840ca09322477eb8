import json
import os
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from safetensors.numpy import save_file

import realign_fast as rf
from realign_fast.io._raw import Blocks
from realign_fast.io.formats import open_shard
from realign_fast.io.sources import open_source

DIM = 6
SUFFIXES = [".npy", ".parquet", ".arrow", ".safetensors", ".pkl", ".tar"]
ERRORS = (ValueError, TypeError, OSError)


def values_of(count=10, dtype="float32", seed=0, dim=DIM):
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(dtype)


def read_all(path, **options):
    for _ in open_source(path, name="text", **options).batches():
        pass


def assert_refused(path, message, **options):
    """The error says what is wrong, and names the file."""
    with pytest.raises(ERRORS, match=message) as caught:
        read_all(path, **options)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def write_npy(path, header, data=b"", version=(1, 0)):
    text = header if isinstance(header, bytes) else repr(header).encode()
    length = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    path.write_bytes(b"\x93NUMPY" + bytes(version) + length + text + data)
    return path


def npy_header(shape=(10, DIM), descr="<f4", fortran=False):
    return {"descr": descr, "fortran_order": fortran, "shape": shape}


def write_safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(shape=(10, DIM), code="F32", begin=0, end=240):
    return {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}


def write_table(path, table):
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    return path


# Paths


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_named(tmp_path, suffix):
    assert_refused(tmp_path / f"missing{suffix}", "missing")
    with pytest.raises(FileNotFoundError):
        open_shard(tmp_path / f"missing{suffix}")


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "holds or matches no files")


def test_a_folder_of_other_files_says_what_is_expected(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    assert_refused(tmp_path / "other", r"no file of a known suffix \(\.npy.*notes\.txt")


def test_a_glob_that_matches_nothing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing_\*\.npy"):
        open_source(str(tmp_path / "nothing_*.npy"), name="text")


def test_an_unknown_suffix_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("1,2\n")
    assert_refused(tmp_path / "a.csv", "suffix '.csv' is unknown, expected one of .npy")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_with_the_name_of_a_file_is_no_file(tmp_path, suffix):
    (tmp_path / f"a{suffix}").mkdir()
    with pytest.raises(ERRORS, match=f"a{suffix}"):
        open_shard(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_no_bytes_is_refused(tmp_path, suffix):
    (tmp_path / f"a{suffix}").touch()
    assert_refused(tmp_path / f"a{suffix}", ".")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_without_rows_alone_are_refused(tmp_path, write_shard, suffix):
    path = write_shard(tmp_path / f"a{suffix}", values_of(0))
    if suffix in (".pkl", ".tar"):
        assert_refused(path, "hold no rows")
        return
    with pytest.raises(ValueError, match=r"text has 0 usable rows"):
        rf.fit(path, values_of())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_cut_is_refused_wherever_it_ends(tmp_path, write_shard, suffix):
    path = write_shard(tmp_path / f"a{suffix}", values_of(4))
    whole = path.read_bytes()
    if suffix == ".tar":  # zeros alone at its end are nothing that could be missed
        whole = whole.rstrip(b"\0")
    for size in range(0, len(whole), 1 + len(whole) // 150):
        path.write_bytes(whole[:size])
        assert_refused(path, ".")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_with_the_content_of_another_format_is_refused(tmp_path, write_shard, suffix):
    for other in set(SUFFIXES) - {suffix}:
        path = write_shard(tmp_path / f"a{other}", values_of()).rename(tmp_path / f"a{suffix}")
        assert_refused(path, ".")


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".arrow", ".tar"])
def test_a_file_that_shrinks_between_opening_and_reading_is_noticed(tmp_path, write_shard, suffix):
    path = write_shard(tmp_path / f"a{suffix}", values_of(100))
    source = open_source(path, name="text")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ERRORS, match=f"a{suffix}"):
        list(source.batches())


# Several files


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (values_of(dim=DIM + 1), "b.* has dimension 7 and dtype float32, .*a.* has 6 and float32"),
        (values_of(dtype="float16"), "b.* has dimension 6 and dtype float16, .*a.* has 6 and float32"),
    ],
)
def test_files_of_different_dimension_or_dtype_are_both_named(tmp_path, write_shard, suffix, other, message):
    write_shard(tmp_path / f"a{suffix}", values_of())
    write_shard(tmp_path / f"b{suffix}", other)
    with pytest.raises(ValueError, match=message):
        read_all(tmp_path)


# Dtypes


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_quantised_embeddings_say_how_to_dequantise(tmp_path, write_shard, suffix, dtype):
    assert_refused(write_shard(tmp_path / f"a{suffix}", np.ones((3, DIM), dtype)), "dequantise it first")


@pytest.mark.parametrize("dtype", ["int16", "int64", "uint32"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_integers_are_refused(tmp_path, write_shard, suffix, dtype):
    assert_refused(write_shard(tmp_path / f"a{suffix}", np.ones((3, DIM), dtype)), "float16")


@pytest.mark.parametrize("dtype", ["complex64", "bool", "U3", "S3", "M8[s]", "longdouble", "f4,f4", "V2"])
@pytest.mark.parametrize("suffix", [".npy", ".pkl"])
def test_arrays_of_other_dtypes_are_refused(tmp_path, write_shard, suffix, dtype):
    assert_refused(write_shard(tmp_path / f"a{suffix}", np.zeros((3, DIM), dtype)), ".")


def npy_of(path, values):
    np.save(path, values)
    return path


def test_npy_of_objects_is_refused_and_not_unpickled(tmp_path):
    assert_refused(npy_of(tmp_path / "a.npy", np.array([[Trap()] * DIM], object)), "float64, got object")
    assert Trap.sprung == 0


@pytest.mark.parametrize("code", ["I8", "U8", "BOOL", "I64", "F8_E4M3", "F8_E5M2", "C64"])
def test_safetensors_of_other_dtypes_are_refused(tmp_path, code):
    header = {"embedding": tensor((10, 8), code, 0, 80)}
    assert_refused(write_safetensors(tmp_path / "a.safetensors", header, bytes(80)), ".", column="embedding")


# npy headers


@pytest.mark.parametrize(
    "shape",
    [(11, DIM), (9, DIM), (10, DIM + 1), (0, DIM), (10, 0), (10,), (10, DIM, 1), (2, 5, DIM), (), (-10, -DIM)],
)
@pytest.mark.parametrize("fortran", [False, True])
def test_npy_whose_shape_is_not_that_of_its_data_is_refused(tmp_path, shape, fortran):
    write_npy(tmp_path / "a.npy", npy_header(shape, fortran=fortran), bytes(240))
    assert_refused(tmp_path / "a.npy", "expected")


@pytest.mark.parametrize(
    "shape",
    [(1 << 62, DIM), (1 << 40, 1 << 24), (1 << 64, 1 << 64), (1 << 500, DIM), (10**4290, 1 << 24), (4, 1 << 60)],
)
def test_npy_that_claims_a_huge_shape_is_refused(tmp_path, shape):
    assert_refused(write_npy(tmp_path / "a.npy", npy_header(shape), bytes(240)), "expected")


@pytest.mark.parametrize("shape", ["ten", [10, DIM], (10.0, DIM), (True, DIM), ("10", DIM), None])
def test_npy_whose_shape_is_no_pair_of_numbers_is_refused(tmp_path, shape):
    assert_refused(write_npy(tmp_path / "a.npy", npy_header(shape), bytes(240)), "expected an array of shape")


@pytest.mark.parametrize(
    "descr", ["<f3", "O", "|O8", "<c8", "<i4", "f" * 5000, "", 4, None, [("a", "<f4")], ("<f4", (3,)), "<f4,<f4", "5f4"]
)
def test_npy_of_a_damaged_dtype_is_refused(tmp_path, descr):
    assert_refused(write_npy(tmp_path / "a.npy", npy_header(descr=descr), bytes(240)), ".")


@pytest.mark.parametrize(
    "header",
    [
        b"", b"{", b"[]", b"0", b"{'descr': '<f4'}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (10, 6), 'x': 1}",
        b"__import__('os').abort()", b"{'descr': '<f4', 'fortran_order': False, 'shape': (10, 2 * 3)}",
        b"(" * 5000, b"-" * 9000, b"{" * 300, b"\xff" * 100, b"\0" * 100, b"9" * 9000, b"1+" * 4000 + b"1",
        b"[" * 90 + b"]" * 90,
    ],
)  # fmt: skip
@pytest.mark.parametrize("version", [1, 2, 3])
def test_npy_of_a_damaged_header_is_refused(tmp_path, header, version):
    assert_refused(write_npy(tmp_path / "a.npy", header, bytes(240), (version, 0)), "npy")


@pytest.mark.parametrize("length", [11_000, 1 << 31, (1 << 32) - 1])
def test_npy_that_claims_a_long_header_is_refused(tmp_path, length):
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x02\0" + struct.pack("<I", length) + b" " * 20_000)
    assert_refused(tmp_path / "a.npy", f"header claims {length} bytes")


@pytest.mark.parametrize("version", [0, 4, 255])
def test_npy_of_an_unknown_version_is_refused(tmp_path, version):
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY" + bytes([version]) + bytes(200))
    assert_refused(tmp_path / "a.npy", f"version {version} is unknown")


def test_npy_with_bytes_after_its_end_is_refused(tmp_path):
    write_npy(tmp_path / "a.npy", npy_header(), bytes(241))
    assert_refused(tmp_path / "a.npy", r"expected \d+ bytes for shape \(10, 6\) of float32, found")


# Tables


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_table_without_the_column_says_which_it_has(tmp_path, suffix):
    path = write_table(tmp_path / f"a{suffix}", pa.table({"id": [1], "vec": [[1.0]]}))
    assert_refused(path, r"no columns 'embedding'; it has \['id', 'vec'\]")
    assert_refused(path, "no columns 'other'", column="other")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_table_with_two_columns_of_the_name_is_refused(tmp_path, suffix):
    array = pa.array([[1.0, 2.0]])
    path = write_table(tmp_path / f"a{suffix}", pa.Table.from_arrays([array, array], ["embedding"] * 2))
    assert_refused(path, "2 columns 'embedding'")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    "array",
    [
        pa.array([1.0, 2.0]), pa.array(["a"]), pa.array([["a"]]), pa.array([[[1.0]]]), pa.array([{"x": 1.0}]),
        pa.array([[True]]), pa.array([[(("k"), 1.0)]], pa.map_(pa.string(), pa.float64())), pa.array([b"1234"]),
    ],
    ids=lambda array: str(array.type),
)  # fmt: skip
def test_a_column_that_holds_no_lists_of_floats_is_refused(tmp_path, suffix, array):
    path = write_table(tmp_path / f"a{suffix}", pa.table({"embedding": array}))
    assert_refused(path, "must hold lists of float16, float32 or float64")


@pytest.mark.parametrize("make", [pa.list_, pa.large_list])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("odd", [[], [1.0], [1.0, 2.0, 3.0]])
def test_rows_of_different_length_are_located(tmp_path, suffix, make, odd):
    rows = pa.array([[1.0, 2.0]] * 20 + [odd] + [[3.0, 4.0]], make(pa.float32()))
    path = write_table(tmp_path / f"a{suffix}", pa.table({"embedding": rows}))
    message = f"row 20 has {len(odd)} elements, expected 2 as in row 0"
    assert_refused(path, message)
    assert_refused(path, message, batch_bytes=32)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 2)])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("row", [0, 7])
@pytest.mark.parametrize("null", [None, [1.0, None]])
def test_nulls_are_located(tmp_path, suffix, kind, row, null):
    rows = [[1.0, 2.0]] * 10
    rows[row] = null
    path = write_table(tmp_path / f"a{suffix}", pa.table({"embedding": pa.array(rows, kind)}))
    assert_refused(path, f"row {row} (is null|holds a null)")
    assert_refused(path, f"row {row} (is null|holds a null)", batch_bytes=24)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_lists_of_no_elements_are_refused(tmp_path, suffix):
    path = write_table(tmp_path / f"a{suffix}", pa.table({"embedding": pa.array([[], []], pa.list_(pa.float32()))}))
    assert_refused(path, "rows of dimension 1 to")


def test_parquet_that_is_encrypted_or_has_a_damaged_footer_is_refused(tmp_path, write_shard):
    path = write_shard(tmp_path / "a.parquet", values_of())
    whole = path.read_bytes()
    for tail in (b"PARE", b"PAR2", b"\0\0\0\0"):
        path.write_bytes(whole[:-4] + tail)
        assert_refused(path, "a.parquet is damaged")
    path.write_bytes(whole[:-8] + b"\xff\xff\xff\x7fPAR1")
    assert_refused(path, "a.parquet is damaged")


# Safetensors headers


@pytest.mark.parametrize(
    "header",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b'{"embedding": 1}',
        {"embedding": {}}, {"embedding": {"dtype": "F32", "shape": [10, 6]}},
        {"embedding": {**tensor(), "shape": 60}}, {"embedding": {**tensor(), "shape": [10, -6]}},
        {"embedding": {**tensor(), "shape": [10, 6.0]}}, {"embedding": {**tensor(), "shape": ["10", 6]}},
        {"embedding": {**tensor(), "dtype": 3}}, {"embedding": {**tensor(), "data_offsets": [0]}},
        {"embedding": {**tensor(), "data_offsets": [0, 240, 0]}}, {"embedding": {**tensor(), "data_offsets": "ab"}},
        {"embedding": tensor(begin=240, end=0)}, {"embedding": tensor(begin=-240, end=0)},
        {"embedding": tensor(begin=1, end=241)}, {"embedding": tensor(end=239)}, {"embedding": tensor(end=1 << 62)},
        {"embedding": tensor(), "b": tensor()}, {"embedding": tensor(), "b": tensor((1,), "U8", 241, 242)},
        {"embedding": tensor((11, DIM))}, {"embedding": tensor((1 << 40, 1 << 24))},
        {"embedding": tensor((1 << 62, 4))}, {"embedding": tensor((10**4290, 1 << 24))},
        {"embedding": tensor((60,))}, {"embedding": tensor((10, 6, 1))}, {"embedding": tensor((0, 0), end=0)},
        {"__metadata__": {"a": 1}, "embedding": tensor()}, {"__metadata__": [], "embedding": tensor()}, {},
        {"embedding": {**tensor(), "data_offsets": [0, 10**4290]}},
        b'{"embedding": {"dtype": "F32", "shape": [10, 6], "data_offsets": [0, 240]}, "embedding": 1}',
        b'{"embedding": {"dtype": "F32", "shape": [NaN, 6], "data_offsets": [0, 240]}}',
        b'{"embedding": {"dtype": "F32", "shape": [1' + b"0" * 5000 + b', 6], "data_offsets": [0, 240]}}',
    ],
    ids=lambda header: str(header)[:60],
)  # fmt: skip
def test_safetensors_of_a_damaged_header_are_refused(tmp_path, header):
    assert_refused(write_safetensors(tmp_path / "a.safetensors", header, bytes(240)), ".")


@pytest.mark.parametrize("length", [0, 1, 1000, 1 << 30, 1 << 62, (1 << 64) - 1])
def test_safetensors_that_lie_about_the_length_of_the_header_are_refused(tmp_path, length):
    write_safetensors(tmp_path / "a.safetensors", {"embedding": tensor()}, bytes(240), length)
    assert_refused(tmp_path / "a.safetensors", ".")


def test_safetensors_of_several_matrices_ask_for_a_name(tmp_path):
    save_file({"a": values_of(), "b": values_of()}, tmp_path / "a.safetensors")
    assert_refused(tmp_path / "a.safetensors", r"name the tensor.*'a': 'F32 \[10, 6\]'")
    assert_refused(tmp_path / "a.safetensors", "no tensor 'c'", column="c")


# Pickles


class Trap:
    """Runs code when it is unpickled."""

    sprung = 0

    def __reduce__(self):
        return spring, ()


def spring():
    Trap.sprung += 1
    return []


class Call:
    """Calls anything when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["list", "row", "embedding", "id", "key", "object array"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run_it(tmp_path, protocol, place):
    marker = tmp_path / "marker"
    hostile = Call(os.mkdir, str(marker))
    content = {
        "list": hostile,
        "row": [hostile],
        "embedding": [{"id": 0, "embed": hostile}],
        "id": [{"id": hostile, "embed": values_of(1)[0]}],
        "key": [{"id": 0, "embed": values_of(1)[0], Call(os.mkdir, str(marker)): 1}],
        "object array": [{"id": 0, "embed": np.array([hostile], object)}],
    }[place]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    assert_refused(tmp_path / "a.pkl", "refused")
    assert not marker.exists()


@pytest.mark.parametrize(
    "function",
    [eval, exec, getattr, print, open, __import__, os.system, subprocess.run, pickle.loads, np.load, np.empty,
     np.fromfile, bytearray, zlib.decompress, sys.exit, type, object.__new__, complex, set, range],
    ids=lambda function: function.__qualname__,
)  # fmt: skip
def test_a_pickle_that_names_any_other_function_is_refused(tmp_path, function):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([{"id": 0, "embed": Call(function, "1")}]))
    assert_refused(tmp_path / "a.pkl", "refused")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "names os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", "names os.system"),
        (b"(ios\nsystem\n.", "opcode 0x69"),
        (b"(cos\nsystem\no.", "opcode 0x6f"),
        (b"\x80\x02cos\nsystem\n)\x81.", "opcode 0x81"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.", "names numpy.ndarray.dumps"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0cf2py.os.path\x93.", "names numpy"),
        (b"cnumpy.core.multiarray\nscalar\n}S'__wrapped__'\nI1\nsb.", "adds to a value of another kind"),
        (b"\x80\x02\x82\x01.", "opcode 0x82"),
        (b"P1\n.", "opcode 0x50"),
        (b"\x80\x05\x97.", "opcode 0x97"),
    ],
)
def test_a_pickle_by_hand_that_reaches_for_code_is_refused(tmp_path, data, message):
    (tmp_path / "a.pkl").write_bytes(data)
    assert_refused(tmp_path / "a.pkl", message)


def test_a_pickle_of_a_tensor_says_what_to_pickle_instead(tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([{"id": 0, "embed": torch.ones(3)}]))
    assert_refused(tmp_path / "a.pkl", "torch tensor: pickle tensor")


NESTED_ARRAY = (
    b"\x80\x04(cnumpy\ndtype\n%s\x85R\x94cnumpy.core.multiarray\n_reconstruct\n"
    b"cnumpy\nndarray\n)C\x01b\x87R(K\x01%sh\x00\x89C\x04\0\0\0\0tbl."
)


def nested_tuples(depth=20, width=20):
    """A tuple of tuples in few bytes which, followed down every path, is as large as `width ** depth`."""
    return b"\x80\x04()\x94" + b"".join(b"(" + width * (b"h" + bytes([i])) + b"t\x94" for i in range(depth))


def many_copies(count, size, byte_order, kind):
    """`count` arrays that all name the same bytes."""
    text = {"text": b"X", "bytes": b"B"}[kind] + struct.pack("<I", size) + b"a" * size + b"\x94"
    dtype = (
        b"cnumpy\ndtype\n(U\x02f4\x89\x88tR(K\x03U\x01" + byte_order + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x94"
    )
    state = b"(K\x01(J" + struct.pack("<i", size // 4) + b"th\x01\x89h\x00t\x94"
    array = b"cnumpy.core.multiarray\n_reconstruct\nU\x01x)U\x01b\x87Rh\x02b"
    return b"\x80\x04(" + text + dtype + state + count * array + b"l."


BOMBS = {
    "a list of lists in a list": b"\x80\x04" + b"]" * 10_000 + b"a" * 9999 + b".",
    "a tuple in a tuple": b")" + b"\x85" * 100_000 + b".",
    "dicts in dicts": b"(" * 100_000 + b"d" * 100_000 + b".",
    "a list that holds itself": b"]\x94h\x00a.",
    "a list that holds itself by another": b"]\x94(h\x00lh\x00a.",
    "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
    "a byte array that is not there": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "a frame that is not there": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b".",
    "text that is not there": b"X\xff\xff\xff\x7f.",
    "a memo index far off": b"]r\xff\xff\xff\x7f.",
    "a memo index far off in digits": b"]p2000000000\n.",
    "a number of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "a number of a million bytes": b"\x8b" + struct.pack("<i", 1_000_000) + b"\xff" * 1_000_000 + b".",
    "a number of negative length": b"\x8b\xff\xff\xff\xff.",
    "nested tuples as a dtype": nested_tuples() + b"cnumpy\ndtype\nh\x14\x85Rl.",
    "nested tuples as a shape": NESTED_ARRAY % (b"U\x02f4", b"(" + nested_tuples()[3:] + b"h\x14t"),
    "text that many arrays name": many_copies(2000, 4_000_000, b"<", "text"),
    "bytes that many arrays name": many_copies(2000, 4_000_000, b">", "bytes"),
    "an array whose shape is not that of its bytes": NESTED_ARRAY % (b"U\x02f4", b"(J\xff\xff\xff\x7ft"),
    "an array of shape zero times much": NESTED_ARRAY
    % (b"U\x02f4", b"(K\x00\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7ft"),
    "an array of negative shape": NESTED_ARRAY % (b"U\x02f4", b"(J\xff\xff\xff\xfft"),
    "an array of objects": NESTED_ARRAY % (b"U\x01O", b"K\x01\x85"),
    "an array of large strings": NESTED_ARRAY % (b"U\x07S999999", b"K\x01\x85"),
}

READ_IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from realign_fast.io._raw import Blocks
from realign_fast.io.formats import open_shard
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (256 << 20),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
for path in sys.argv[1:]:
    try:
        for chunk in open_shard(Path(path)).chunks(Blocks(1 << 20, 3)):
            pass
    except (ValueError, TypeError, OSError) as error:
        print(str(error).replace(chr(10), " "))
    else:
        print("read")
"""


limits_memory = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone limits the memory of a process so")


def read_in_little_memory(*paths):
    result = subprocess.run(
        [sys.executable, "-c", READ_IN_LITTLE_MEMORY, *map(str, paths)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(paths)
    return lines


@limits_memory
def test_pickles_that_would_exhaust_memory_or_time_are_refused(tmp_path):
    paths = [tmp_path / f"{index}.pkl" for index in range(len(BOMBS))]
    for path, data in zip(paths, BOMBS.values(), strict=True):
        path.write_bytes(data)
    found = dict(zip(BOMBS, read_in_little_memory(*paths), strict=True))
    assert {name: line for name, line in found.items() if "refused" not in line} == {}


@limits_memory
def test_a_pickle_with_nested_tuples_as_a_key_is_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(nested_tuples() + b"}h\x14K\x01sl.")
    assert "refused" in read_in_little_memory(tmp_path / "a.pkl")[0]


@limits_memory
def test_headers_that_claim_much_allocate_nothing(tmp_path):
    huge = {"embedding": tensor((1 << 30, 1 << 20), end=1 << 52)}
    paths = [
        write_npy(tmp_path / "a.npy", npy_header((1 << 40, 1 << 20)), bytes(240)),
        write_npy(tmp_path / "b.npy", npy_header((1, 1 << 24)), bytes(240)),
        write_safetensors(tmp_path / "a.safetensors", huge, bytes(240)),
        write_safetensors(tmp_path / "b.safetensors", huge, bytes(240), 1 << 40),
        write_table(
            tmp_path / "a.parquet", pa.table({"embedding": pa.array([], pa.list_(pa.float32(), (1 << 31) - 1))})
        ),
        write_table(tmp_path / "a.arrow", pa.table({"embedding": pa.array([], pa.list_(pa.float32(), (1 << 31) - 1))})),
    ]
    assert [line for line in read_in_little_memory(*paths) if line == "read"] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"embed": [1.0]}, "expected a list of dicts, got dict"),
        ("text", "expected a list of dicts, got str"),
        ([[1.0, 2.0]], "item 0 must be a dict, got list"),
        ([{"id": 0}], "row 0 has no 'embedding' or 'embed'; its keys are"),
        ([{"embed": [1.0]}, {"id": 1}], "row 1 has no 'embed'; its keys are"),
        ([{"embed": [1.0, 2.0]}, {"embed": [1.0]}], "row 1 has dimension 1 and dtype float64, expected 2 and float64"),
        ([{"embed": np.ones(2, "f4")}, {"embed": np.ones(2, "f2")}], "row 1 has dimension 2 and dtype float16"),
        ([{"embed": []}], "row 0 must be an array of shape"),
        ([{"embed": None}], "row 0 must be .*, got NoneType"),
        ([{"embed": "1 2 3"}], "row 0 must be .*, got str"),
        ([{"embed": [1.0, "2"]}], "row 0 must be .*, got list"),
        ([{"embed": [1.0, None]}], "row 0 must be .*, got list"),
        ([{"embed": [[1.0], [2.0]]}], "row 0 must be .*, got list"),
        ([{"embed": np.ones((2, 2))}], r"row 0 must be .*, got shape \(2, 2\)"),
        ([{"embed": np.ones(())}], "row 0 must be"),
        ([{"embed": [1, 2]}], "row 0 must be one of float16"),
        ([{"embed": np.ones(2, "i1")}], "row 0 is int8: dequantise it first"),
        ([{"embed": [1.0, 1.0]}, {"embed": [1 << 300, 1 << 200]}], "row 1 must be one of"),
    ],
)
def test_pickles_of_other_things_than_rows_are_refused(tmp_path, content, message):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    assert_refused(tmp_path / "a.pkl", message)


def test_two_pickles_in_one_file_are_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(2 * pickle.dumps([{"id": 0, "embed": [1.0]}]))
    assert_refused(tmp_path / "a.pkl", "bytes follow its end")


# Bad rows


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0])
def test_bad_rows_are_located_by_file_and_row(tmp_path, write_shard, suffix, bad):
    for index in range(3):
        values = values_of(300, seed=index)
        if index == 1:
            values[217, 3:] = bad
            values[217, :3] = 0
        write_shard(tmp_path / f"part_{index}{suffix}", values)
    with pytest.raises(ValueError, match=rf"part_1\{suffix}: row 217 is bad"):
        rf.fit(tmp_path, values_of(50, seed=9))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_of_another_dimension_than_the_images_are_refused(tmp_path, write_shard, suffix):
    path = write_shard(tmp_path / f"a{suffix}", values_of())
    with pytest.raises(ValueError, match="text has dimension 6, image has dimension 5"):
        rf.fit(path, values_of(dim=5))


def test_a_batch_size_below_one_byte_is_refused(tmp_path, write_shard):
    with pytest.raises(ValueError, match="batch_bytes must be at least 1"):
        open_source(write_shard(tmp_path / "a.npy", values_of()), name="text", batch_bytes=0)


def test_blocks_take_at_least_a_row():
    assert Blocks(1, 3).num_rows(4096) == 1
