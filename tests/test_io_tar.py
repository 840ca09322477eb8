"""WebDataset tars: what other tools write is read and rewritten, what is hostile is refused in one line."""

import gc
import gzip
import io
import json
import os
import pickle
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from torch.utils.data import DataLoader

import realign_fast as rf
from realign_fast import cli
from realign_fast.alignment import apply_files
from realign_fast.data import EmbeddingDataset, EmbeddingStream
from realign_fast.io import _encoders, _tar, _tar_headers
from realign_fast.io._raw import Blocks
from realign_fast.io._tar import TarShard
from realign_fast.io._tar_headers import read_windows
from realign_fast.io.formats import open_shard
from realign_fast.io.sources import open_source
from realign_fast.io.writer import _copy, convert, rewrite, verify

DIM = 6
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
END = b"\0" * 1024


def values_of(count=20, dtype="float32", seed=0, dim=DIM):
    return np.random.default_rng(seed).normal(1, 1, size=(count, dim)).astype(dtype)


@pytest.fixture(scope="module")
def alignment():
    return rf.fit(values_of(100, seed=10), values_of(100, seed=11) - 1.5)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def member(name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def write_tar(path, members, style="pax"):
    with tarfile.open(path, "w", format=FORMATS[style]) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def samples_of(values, key=lambda i: f"{i:05}"):
    """Members as an image-text set has them."""
    for i, row in enumerate(values):
        stem = key(i)
        yield member(f"{stem}.jpg", bytes([i % 256]) * (i % 1100), mtime=i)
        yield member(f"{stem}.npy", npy(row if i % 2 else row[None]), mtime=7 + i, mode=0o600, uid=5, uname="someone")
        yield member(f"{stem}.txt", f"Ein Übel {i}".encode(), mtime=8)
        if i % 3:
            yield member(f"{stem}.json", json.dumps({"n": i}).encode())


def header(name="a.npy", size=0, kind=b"0", **fields):
    """One header of a tar, with fields given as raw bytes."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[156:157] = kind
    for place, data in fields.get("at", {}).items():
        block[place : place + len(data)] = data
    block[148:156] = b" " * 8
    block[148:156] = fields.get("checksum", b"%06o\0 " % sum(block))
    return bytes(block)


def block(data):
    return data + bytes(-len(data) % 512)


def read_by_webdataset(path, decode=True):
    wds = pytest.importorskip("webdataset")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files open
        data = wds.WebDataset(os.fspath(path), shardshuffle=False)
        samples = list(data.decode() if decode else data)
        del data
        gc.collect()
    return samples


ROW = npy(values_of(1)[0])
SOUND = header("a.npy", len(ROW)) + block(ROW)


def rows_of(path, **options):
    source = open_source(path, name="text", **options)
    return np.concatenate([batch.rows.values.copy() for batch in source.batches()])


def refused(path, match, **options):
    with pytest.raises(ValueError, match=match) as caught:
        rows_of(path, **options)
    assert Path(path).name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 3000


def refused_bytes(tmp_path, data, match, **options):
    (tmp_path / "a.tar").write_bytes(data)
    refused(tmp_path / "a.tar", match, **options)


# Reading


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_webdataset_writes_is_read_with_the_keys_that_it_reads(tmp_path, dtype):
    wds = pytest.importorskip("webdataset")
    values = values_of(700, dtype)
    with wds.TarWriter(os.fspath(tmp_path / "a.tar")) as writer:
        for i, row in enumerate(values):
            writer.write({"__key__": f"dir.x/é{i}", "npy": row, "txt": f"caption {i}", "json": {"n": i}})
    np.testing.assert_array_equal(rows_of(tmp_path / "a.tar", batch_bytes=500), values)
    theirs = read_by_webdataset(tmp_path / "a.tar")
    assert list(TarShard(tmp_path / "a.tar", None).keys()) == [sample["__key__"] for sample in theirs]
    np.testing.assert_array_equal(values, [sample["npy"] for sample in theirs])
    source = open_source(tmp_path / "a.tar", name="text")
    assert (source.dim, source.dtype, source.num_rows) == (DIM, dtype, None)


def test_keys_and_extensions_are_those_of_webdataset(tmp_path):
    names = [
        "./a.npy",
        "b.c/d.NPY",
        "__x__/skipped.npy",
        ".hidden.npy",
        "x/nodot",
        "__meta__",
        "e.npy",
        "e.TXT",
        "f..npy",
    ]
    members = [member("folder", type=tarfile.DIRTYPE), *(member(name, npy(values_of(1)[0])) for name in names)]
    write_tar(tmp_path / "a.tar", members)
    theirs = read_by_webdataset(tmp_path / "a.tar", decode=False)
    keys = [sample["__key__"] for sample in theirs]
    assert keys == ["./a", "b.c/d", "e", "f"]
    with tmp_path.joinpath("a.tar").open("rb") as file:
        found = list(TarShard(tmp_path / "a.tar", None)._grouped(file.fileno()))
    for (key, mine, _), sample in zip(found, theirs, strict=True):
        assert (key, set(mine)) == (sample["__key__"], {name for name in sample if not name.startswith("__")})


@pytest.mark.parametrize("window", [1024, 4096, 1 << 18])
@pytest.mark.parametrize("batch_bytes", [50, 1 << 20])
@pytest.mark.parametrize("style", FORMATS)
def test_tars_of_every_style_however_they_are_cut(tmp_path, monkeypatch, style, batch_bytes, window):
    monkeypatch.setattr(_tar_headers, "_WINDOW_BYTES", window)
    values = values_of(40)
    names = {"ustar": lambda i: "d" * 120 + f"/{i:05}", "gnu": lambda i: "ü" * 500 + str(i)}
    write_tar(tmp_path / "a.tar", samples_of(values, names.get(style, lambda i: f"{'é' * 900}{i}")), style)
    np.testing.assert_array_equal(rows_of(tmp_path / "a.tar", batch_bytes=batch_bytes), values)
    shard = TarShard(tmp_path / "a.tar", None)
    with tarfile.open(tmp_path / "a.tar") as tar:
        theirs = [info.name.removesuffix(".npy") for info in tar if info.name.endswith(".npy")]
    assert list(shard.keys()) == theirs
    assert shard.load().num_rows == 40


def test_byte_orders_and_shapes_and_header_versions_may_vary(tmp_path):
    values = values_of(8)
    stored = [values[0], values[1][None], values[2].astype(">f4"), values[3][None].astype(">f4"), *values[4:]]
    data = [npy(array) for array in stored]
    old = io.BytesIO()
    np.lib.format.write_array(old, values[5], (2, 0))
    data[5] = old.getvalue()
    write_tar(tmp_path / "a.tar", [member(f"{i}.npy", each) for i, each in enumerate(data)])
    np.testing.assert_array_equal(rows_of(tmp_path / "a.tar"), values)
    with pytest.raises(ValueError, match="do not lie in it as in memory"):
        EmbeddingDataset(tmp_path / "a.tar")


def test_the_embedding_is_chosen_by_its_extension(tmp_path):
    first, second = values_of(5), values_of(5, seed=1, dim=3)
    members = []
    for i in range(5):
        members += [member(f"{i}.img_emb.npy", npy(first[i])), member(f"{i}.text_emb.npy", npy(second[i]))]
    write_tar(tmp_path / "a.tar", members)
    np.testing.assert_array_equal(rows_of(tmp_path / "a.tar", column="img_emb.npy"), first)
    np.testing.assert_array_equal(rows_of(tmp_path / "a.tar", column="text_emb.npy"), second)
    refused(
        tmp_path / "a.tar", r"sample '0' has several npy members: name .* `column`; its members are .img_emb.npy, .te"
    )
    refused(tmp_path / "a.tar", "sample '0' has no member .npy; its members are", column="npy")


@pytest.mark.parametrize(
    "field",
    [
        {"size": b"%12o" % len(ROW)},
        {"size": (b"%o" % len(ROW)).ljust(12, b"\0")},
        {"size": b"\x80" + len(ROW).to_bytes(11, "big")},
        {"checksum": b"%8o" % sum(header("0.npy", len(ROW), checksum=b" " * 8))},
        {"kind": b"\0"},
        {"kind": b"7"},
        {"at": {257: bytes(8)}},  # before POSIX
    ],
)
def test_numbers_and_kinds_as_old_writers_have_them(tmp_path, field):
    fields = {"size": len(ROW), **field}
    (tmp_path / "a.tar").write_bytes(header("0.npy", **fields) + block(ROW) + SOUND + END)
    np.testing.assert_array_equal(rows_of(tmp_path / "a.tar"), np.concatenate([values_of(1)] * 2))


def test_a_checksum_of_signed_bytes_is_taken(tmp_path):
    head = bytearray(header("ä.npy", len(ROW)))
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % int(np.frombuffer(bytes(head), np.int8).sum(dtype=int))
    (tmp_path / "a.tar").write_bytes(bytes(head) + block(ROW) + END)
    assert list(TarShard(tmp_path / "a.tar", None).keys()) == ["ä"]


def test_a_size_in_a_pax_header_holds_for_members_that_are_skipped(tmp_path):
    record = b"13 size=1000\n"
    assert len(record) == 13
    video = header("./x", len(record), b"x") + block(record) + header("a.mp4", 0) + block(bytes(range(250)) * 4)
    (tmp_path / "a.tar").write_bytes(SOUND + video + header("b.npy", len(ROW)) + block(ROW) + END)
    assert len(rows_of(tmp_path / "a.tar")) == 2
    record = b"12 size=%d\n" % len(ROW)
    data = header("./x", len(record), b"x") + block(record) + header("a.npy", 0) + block(ROW) + END
    refused_bytes(tmp_path, data, "member 'a.npy' states its size in a pax header")


def test_a_header_for_all_that_states_no_name_is_passed(tmp_path):
    record = b"16 comment=1234\n"
    (tmp_path / "a.tar").write_bytes(header("g", len(record), b"g") + block(record) + SOUND + END)
    assert len(rows_of(tmp_path / "a.tar")) == 1


# What is refused


LINKS = {"1": "a hard link", "2": "a symbolic link", "3": "a device", "4": "a device", "6": "a pipe", "S": "sparse"}


@pytest.mark.parametrize("kind", LINKS)
def test_links_and_devices_are_refused(tmp_path, kind):
    data = SOUND + header("sub/evil.npy", 0, kind.encode()) + END
    refused_bytes(tmp_path, data, f"member 'sub/evil.npy' is {LINKS[kind]}, which is refused")


@pytest.mark.parametrize("name", ["/etc/passwd.npy", "../a.npy", "x/../../a.npy", "..", "a/.."])
@pytest.mark.parametrize("style", FORMATS)
def test_names_that_leave_the_folder_are_refused(tmp_path, name, style):
    long = name + "/" + "x" * 300 if style != "ustar" else name
    for each in (name, long):
        write_tar(tmp_path / "a.tar", [member("a.npy", ROW), member(each, b"x")], style)
        refused(tmp_path / "a.tar", r"member '.*\.*.*' leaves the folder: refused")
        with pytest.raises(ValueError, match="leaves the folder"):
            apply_files(rf.fit(values_of(), values_of(seed=1)), tmp_path / "a.tar", tmp_path / "out")
        assert not list(tmp_path.glob("out/*.tar*"))


def test_a_name_may_hold_dots_that_lead_nowhere(tmp_path):
    write_tar(tmp_path / "a.tar", [member("x..y/a.npy", ROW)])
    assert list(TarShard(tmp_path / "a.tar", None).keys()) == ["x..y/a"]


def pax(records, kind=b"x"):
    return header("p", len(records), kind) + block(records)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (SOUND, "it ends without the mark of its end"),
        (SOUND[:-512], "it claims"),
        (SOUND + END[:100], "it ends without the mark of its end"),
        (SOUND + END + SOUND + END, "bytes after the mark of its end: is it several tars in one"),
        (SOUND + END + b"x", "bytes after the mark of its end"),
        (header("a.npy", 1 << 30) + block(ROW) + END, r"claims 1073741824 bytes, the file has \d+ more"),
        (header("a.npy", size=b"\x80" + b"\xff" * 11) + END, "it claims 309485009821345068724781055 bytes"),
        (header("a.npy", size=b"\xff" * 12) + END, "expected an octal number"),
        (header("a.npy", size=b"0000000008\0\0") + END, "expected an octal number"),
        (header("a.npy", size=b"-0000000001\0") + END, "expected an octal number"),
        (header("a.npy", size=bytes(12)) + END, "expected an octal number"),
        (header("a.npy", checksum=b"000001\0 ") + END, "its checksum is"),
        (header("", 0) + END, "it has a name of 0 bytes"),
        (header("a.npy", kind=b"M") + END, "is of the unknown kind b'M'"),
        (header("d/", 512, b"5") + bytes(512) + END, "is a folder of 512 bytes"),
        (header("a.npy", at={0: b"\xff\xfe.npy"}) + END, "is no UTF-8"),
        (header("l", 1 << 29, b"L") + END, "an extended header claims 536870912 bytes, expected at most"),
        (header("l", 4096, b"x") + END, "an extended header claims 4096 bytes"),
        (pax(b"9 path=a\n") + END, "it ends after an extended header"),
        (pax(b"99 path=a\n") + SOUND + END, "its pax header is damaged"),
        (pax(b"0 path=a\n") + SOUND + END, "its pax header is damaged"),
        (pax(b"7 path\n") + SOUND + END, "its pax header is damaged"),
        (pax(b"-9 path=a\n") + SOUND + END, "its pax header states the number b'-9'"),
        (pax(b"12345678901234567890123 path=a\n") + SOUND + END, "its pax header is damaged"),
        (pax("²9 path=a\n".encode()) + SOUND + END, "its pax header states the number"),
        (pax(b"8 path=\n") + SOUND + END, "it has a name of 0 bytes"),
        (pax(b"5006 path=%s\n" % (b"x" * 4995)) + SOUND + END, "it has a name of 4995 bytes, expected 1 to 4096"),
        (pax(b"9 size=x\n") + SOUND + END, "its pax header states the number b'x'"),
        (pax(b"28 size=9999999999999999999\n") + SOUND + END, "it claims 9999999999999999999 bytes"),
        (pax(b"22 GNU.sparse.major=1\n") + SOUND + END, "a member is sparse, which is refused"),
        (pax(b"9 path=a\n", b"g") + SOUND + END, "a header for all members states the name or size"),
        (b"", "it ends without the mark of its end"),
        (b"x" * 512, "expected an octal number"),
        (gzip.compress(SOUND + END), "is compressed with gzip: decompress it first"),
    ],
)  # fmt: skip
def test_damaged_and_hostile_tars_are_refused_in_one_line(tmp_path, data, message):
    refused_bytes(tmp_path, data, message)


def test_a_tar_that_ends_anywhere_before_its_end_is_refused(tmp_path):
    write_tar(tmp_path / "whole.tar", samples_of(values_of(6)))
    whole = (tmp_path / "whole.tar").read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for size in (*range(0, end, 512), *range(1, end, 777)):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        refused(tmp_path / "a.tar", "damaged|cut|truncated")
    (tmp_path / "a.tar").write_bytes(whole[: end + 512])  # one block of zeros is an end
    assert len(rows_of(tmp_path / "a.tar")) == 6


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "a.TAR.BZ2"])
def test_compressed_tars_are_refused_by_name(tmp_path, name, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(gzip.compress(SOUND + END))
    refused(tmp_path / "in" / name, "compressed tars are not read: decompress it first")
    with pytest.raises(ValueError, match="compressed tars are not read"):
        open_source(tmp_path / "in", name="text")
    assert cli.main(["convert", str(tmp_path / "in" / name), "-o", str(tmp_path / "out"), "--format", "npy"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_samples_that_are_wrong_are_named_by_their_key(tmp_path):
    good = [member("a.npy", ROW), member("b.npy", ROW)]
    for members, message in (
        ([*good, member("c.txt", b"x")], r"sample 'c' has no npy member; its members are \.txt"),
        ([member("c.txt", b"x"), *good], r"sample 'c' has no npy member; its members are \.txt"),
        ([*good, member("b.NPY", ROW)], r"sample 'b' has two members \.npy"),
        ([*good, member("b.txt"), member("b.txt")], r"sample 'b' has two members \.txt"),
        ([*good, member("b.x.npy", ROW)], "sample 'b' has several npy members"),
        ([*good, member("c.x.npy", ROW)], r"sample 'c' has no member \.npy; its members are \.x\.npy"),
        ([*good, member("c.npy", npy(values_of(1, dim=5)[0]))], "sample 'c' has dimension 5 and .*, expected 6"),
        ([*good, member("c.npy", npy(values_of(1, "float16")[0]))], "sample 'c' has dimension 6 and dtype float16"),
        ([*good, member("c.npy", npy(values_of(2)))], r"'c.npy': expected an array of shape \(dim,\) or \(1, dim\)"),
        ([*good, member("c.npy", npy(np.float32(1)))], r"expected an array of shape \(dim,\) or \(1, dim\), got \(\)"),
        ([*good, member("c.npy", npy(np.zeros(0, "f4")))], "expected rows of dimension 1 to"),
        ([*good, member("c.npy", ROW + b"\0")], "member 'c.npy': expected 152 bytes for shape .* found 153"),
        ([*good, member("c.npy", ROW[:-4])], "member 'c.npy': expected 152 bytes for shape .* found 148"),
        ([*good, member("c.npy", b"")], "member 'c.npy' is no npy file"),
        ([*good, member("c.npy", npy(np.arange(6)))], "member 'c.npy': dtype must be one of float16"),
        ([*good, member("c.npy", npy(np.zeros(6, np.int8)))], "dequantise it first"),
    ):  # fmt: skip
        refused(write_tar(tmp_path / "a.tar", members), message)
    many = [member(f"a.{i}") for i in range(1001)]
    refused(write_tar(tmp_path / "a.tar", many), "sample 'a' has more than 1000 members")


def test_a_claimed_shape_takes_no_memory(tmp_path):
    text = ROW[10:128].decode().replace("(6,)", "(16000000,)").rstrip() + "\n"
    start = ROW[:8] + len(text).to_bytes(2, "little") + text.encode()
    refused(write_tar(tmp_path / "a.tar", [member("a.npy", start + ROW[128:])]), "expected 64000.* bytes for shape")


def test_a_tar_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples_of(values_of(50)))
    loaded = TarShard(path, None).load()
    data = EmbeddingDataset(path)
    os.truncate(path, 4096)
    with pytest.raises(ValueError, match=r"a\.tar was truncated while it was read"):
        list(loaded.chunks(Blocks(100, 1)))
    with pytest.raises(ValueError, match="has changed since it was opened"):
        data[40]


def members_of(path):
    with path.open("rb") as file:
        return [each for window in read_windows(path, file.fileno()) for each in window.members]


names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=120).filter(
    lambda x: x != ".."
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.lists(names, min_size=1, max_size=3), st.binary(max_size=1300), st.floats(0, 1e9)), max_size=8
    ),
    st.sampled_from(["gnu", "pax"]),
    st.sampled_from([1024, 2048, 1 << 18]),
)
def test_members_are_those_that_tarfile_finds(tmp_path, monkeypatch, files, style, window):
    monkeypatch.setattr(_tar_headers, "_WINDOW_BYTES", window)
    path = write_tar(tmp_path / "a.tar", [member("/".join(p), data, mtime=t) for p, data, t in files], style)
    found = members_of(path)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        # It takes a slash at the end of a name for that of a folder, and drops it.
        theirs = [(info.name, info.offset_data, info.size) for info in tar]
    assert [(each.name, each.data, each.size) for each in found] == theirs
    assert [whole[each.data : each.data + each.size] for each in found] == [data for _, data, _ in files]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_header_makes_anything_but_an_error_of_ours(tmp_path, data):
    """Fields of sound headers are overwritten; most get the right checksum, so that what they claim is believed."""
    blocks = [
        *([pax(b"13 path=long\n")] if data.draw(st.booleans()) else []),
        *([header("l", 9, b"L") + block(b"name.npy\0")] if data.draw(st.booleans()) else []),
        SOUND,
        header("b.npy", len(ROW)) + block(ROW),
    ]
    whole = bytearray(b"".join(blocks) + END)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(range(0, len(whole), 512)))
        place = data.draw(st.sampled_from([0, 0, 124, 124, 124, 156, 257, 345]) | st.integers(0, 511))
        new = data.draw(
            st.sampled_from(
                [b"\x80" + b"\xff" * 11, b"77777777777\0", b"\xff" * 12, b"x", b"L", b"g", b"S", b"1", b"5", b"0"]
            )
            | st.binary(min_size=1, max_size=16)
            | st.integers(0, 1 << 35).map(lambda n: b"%011o\0" % n)
            | st.integers(0, 1 << 90).map(lambda n: b"\x80" + n.to_bytes(12, "big")[1:])
        )[: 512 - place]
        whole[at + place : at + place + len(new)] = new
        if data.draw(st.integers(0, 4)):
            whole[at + 148 : at + 156] = b" " * 8
            whole[at + 148 : at + 156] = b"%06o\0 " % sum(whole[at : at + 512])
    path = tmp_path / "a.tar"
    path.write_bytes(whole)
    try:
        shard = open_shard(path)
        list(shard.chunks(Blocks(100, 2)))
        list(shard.load().chunks(Blocks(100, 2), columns=True))
    except (ValueError, OSError) as error:
        assert type(error) in (ValueError, OSError) and "a.tar" in str(error)  # noqa: PT018, PT017


# Rewriting


def contents(path):
    """Everything that a tar says of its members, and their data."""
    keys = ("name", "mtime", "mode", "uid", "gid", "uname", "gname", "type", "pax_headers")
    with tarfile.open(path) as tar:
        return [
            ({key: getattr(info, key) for key in keys}, tar.extractfile(info).read()) for info in tar if info.isreg()
        ]


@pytest.mark.parametrize("style", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_rewritten_tar_keeps_all_but_the_embeddings(tmp_path, alignment, style, dtype):
    values = values_of(60)
    path = write_tar(
        tmp_path / "a.tar", [member("README", b"hello"), *samples_of(values, lambda i: f"ä{i}.x"[:-2])], style
    )
    apply_files(alignment, path, tmp_path / "out", dtype=dtype)
    assert verify(tmp_path / "out")["ok"]
    expected = alignment.transform(values, dtype=dtype)
    before, after = contents(path), contents(tmp_path / "out" / "a.tar")
    assert [info for info, _ in before] == [info for info, _ in after]
    row = 0
    for (info, old), (_, new) in zip(before, after, strict=True):
        if not info["name"].endswith(".npy"):
            assert old == new
            continue
        old, new = np.load(io.BytesIO(old)), np.load(io.BytesIO(new))
        assert (new.shape, new.dtype) == (old.shape, np.dtype(dtype))
        np.testing.assert_array_equal(new.reshape(-1), expected[row])
        row += 1
    assert row == 60


@pytest.mark.parametrize("style", FORMATS)
def test_a_tar_of_unchanged_values_is_the_same_bytes(tmp_path, monkeypatch, style):
    monkeypatch.setattr(_encoders, "_COPY_BYTES", 700)
    path = write_tar(tmp_path / "a.tar", samples_of(values_of(90)), style)
    rewrite([path], tmp_path / "out", transform=_copy, job={})
    assert (tmp_path / "out" / "a.tar").read_bytes() == path.read_bytes()


def test_what_webdataset_writes_stays_readable_for_it(tmp_path, alignment):
    wds = pytest.importorskip("webdataset")
    values = values_of(30)
    with wds.TarWriter(os.fspath(tmp_path / "a.tar")) as writer:
        for i, row in enumerate(values):
            writer.write({"__key__": f"{i}", "cls": i, "emb.npy": row})
    apply_files(alignment, tmp_path / "a.tar", tmp_path / "out", dtype="float64")
    theirs = read_by_webdataset(tmp_path / "out" / "a.tar")
    np.testing.assert_array_equal([each["emb.npy"] for each in theirs], alignment.transform(values, dtype="float64"))
    assert [(each["__key__"], each["cls"]) for each in theirs] == [(f"{i}", i) for i in range(30)]


@pytest.mark.parametrize("target", ["parquet", "arrow", "pickle", "npy", "safetensors"])
def test_keys_and_other_members_go_along_or_beside(tmp_path, target):
    values = values_of(7)
    path = write_tar(tmp_path / "a.tar", samples_of(values))
    assert convert(path, tmp_path / "out", format=target)["notes"] == []
    np.testing.assert_array_equal(rows_of(tmp_path / "out"), values)
    match target:
        case "pickle":
            found = pickle.loads((tmp_path / "out" / "a.pkl").read_bytes())
        case "arrow":
            found = pa.ipc.open_file(tmp_path / "out" / "a.arrow").read_all().to_pylist()
        case _:
            found = parquet.read_table(tmp_path / "out" / ("a.parquet" if target == "parquet" else "a.columns.parquet"))
            assert found.schema.field("jpg").type == pa.binary()
            found = found.to_pylist()
    for i, item in enumerate(found):
        assert item["id"] == f"{i:05}"
        assert (item["jpg"], item["txt"]) == (bytes([i]) * i, f"Ein Übel {i}")
        assert item["json"] == (json.dumps({"n": i}) if i % 3 else None)
        assert set(item) - {"embedding", "embed"} == {"id", "jpg", "txt", "json"}
    assert verify(tmp_path / "out")["ok"]


def test_large_members_become_columns_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(_tar, "_COLUMNS_AT_ONCE_BYTES", 6000)
    monkeypatch.setattr(_encoders, "_GROUP_BYTES", 5000)
    values = values_of(12)
    members = [
        each for i in range(12) for each in (member(f"{i}.npy", npy(values[i])), member(f"{i}.jpg", b"x" * 2000))
    ]
    path = write_tar(tmp_path / "a.tar", members)
    assert len(list(TarShard(path, None).load().chunks(Blocks(1 << 20, 1), columns=True))) == 6
    convert(path, tmp_path / "out", format="parquet")
    assert parquet.ParquetFile(tmp_path / "out" / "a.parquet").num_row_groups > 2
    np.testing.assert_array_equal(rows_of(tmp_path / "out"), values)
    monkeypatch.setattr(_tar, "_MAX_COLUMN_BYTES", 1999)
    with pytest.raises(ValueError, match=r"member '0.jpg' of 2000 bytes is too large for a column"):
        convert(path, tmp_path / "other", format="parquet")


def test_what_fits_no_table_is_told_or_refused(tmp_path):
    stray = [member("README", b"x"), member("a.npy", ROW)]
    (note,) = convert(write_tar(tmp_path / "a.tar", stray), tmp_path / "out", format="npy")["notes"]
    assert note.endswith("a.tar: members of no sample are left out, the first is 'README'")
    for number, (members, message, options) in enumerate(
        (
            ([member("a.npy", ROW), member("a.txt", b"\xff")], "member 'a.txt' is no UTF-8 text", {}),
            ([member("a.npy", ROW), member("a.id", b"7")], r"its members \.id would be a second column 'id'", {}),
            ([member("a.npy", ROW), member("a.txt")], "would be a second column 'txt'", {"id_column": "txt"}),
            ([member("a.npy", ROW), member("b.npy", ROW), member("a.npy", ROW)],
             "key 'a' occurs twice: samples 0 and 2", {}),
        )
    ):  # fmt: skip
        path = write_tar(tmp_path / "a.tar", members)
        with pytest.raises(ValueError, match=message):
            convert(path, tmp_path / f"out{number}", format="parquet", **options)
    path = write_tar(tmp_path / "a.tar", [member("a.npy", ROW), member("a.id", b"7")])
    convert(path, tmp_path / "renamed", format="parquet", id_column="key")
    (row,) = parquet.read_table(tmp_path / "renamed" / "a.parquet").to_pylist()
    assert (row["key"], row["id"]) == ("a", b"7")


def test_no_other_format_becomes_a_tar(tmp_path, alignment):
    np.save(tmp_path / "a.npy", values_of())
    with pytest.raises(ValueError, match=r"format must be same, npy, .*got 'tar'"):
        apply_files(alignment, tmp_path / "a.npy", tmp_path / "out", format="tar")


def test_verify_looks_into_tars(tmp_path, alignment):
    path = write_tar(tmp_path / "a.tar", samples_of(values_of()))
    rewrite([path], tmp_path / "out", transform=_copy, job={}, unit_norm=True)
    (problem,) = verify(tmp_path / "out")["problems"]
    assert problem.startswith("a.tar: row 0 has length")


# Loaders


def test_rows_of_tars_by_number_and_by_key(tmp_path, alignment):
    values = values_of(200)
    write_tar(tmp_path / "a_2.tar", samples_of(values[:90], lambda i: f"ü/{i}"))
    write_tar(tmp_path / "a_10.tar", samples_of(values[90:], lambda i: f"v/{i}"))
    write_tar(tmp_path / "a_11.tar", [])
    data = EmbeddingDataset(tmp_path, alignment, index=tmp_path / "index")
    assert (len(data), data.dim, data[0]["id"], data[-1]["id"]) == (200, DIM, "ü/0", "v/109")
    order = np.random.default_rng(0).permutation(200)
    found = data.__getitems__(order.tolist())
    mapped = alignment.transform(values)
    np.testing.assert_array_equal(torch.stack([each["embedding"] for each in found]).numpy(), mapped[order])
    np.testing.assert_array_equal(data["v/3"]["embedding"].numpy(), mapped[93])
    assert [each["id"] for each in found] == [f"ü/{i}" if i < 90 else f"v/{i - 90}" for i in order]
    with pytest.raises(ValueError, match="the ids of a tar are its keys"):
        EmbeddingDataset(tmp_path, index=tmp_path / "other", id_column="txt")
    write_tar(tmp_path / "a_12.tar", samples_of(values[:5], lambda i: f"v/{i}"))
    with pytest.raises(ValueError, match=r"id 'v/\d' occurs twice: .*a_10.tar row \d and .*a_12.tar row \d"):
        EmbeddingDataset(tmp_path, index=tmp_path / "index")


def test_keys_of_tars_with_several_embeddings(tmp_path):
    values = values_of(4)
    members = [member(f"{i}.{side}.npy", npy(values[i])) for i in range(4) for side in ("a", "b")]
    write_tar(tmp_path / "a.tar", members)
    data = EmbeddingDataset(tmp_path / "a.tar", column="b.npy", index=tmp_path / "index")
    assert data["2"]["id"] == "2"


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [None, 1, 32])
def test_streams_over_tars_and_other_files(tmp_path, alignment, shuffle, batch_size):
    values = values_of(300)
    write_tar(tmp_path / "a.tar", samples_of(values[:120]))
    np.save(tmp_path / "b.npy", values[120:200])
    write_tar(tmp_path / "c.tar", samples_of(values[200:]))
    stream = EmbeddingStream(tmp_path, alignment, batch_size, shuffle, buffer_rows=64)
    loader = DataLoader(stream, batch_size=None, num_workers=2 if batch_size == 32 else 0)
    found = list(loader)
    rows = torch.cat([each["embedding"].reshape(-1, DIM) for each in found]).numpy()
    numbers = np.concatenate([np.atleast_1d(each["id"]) for each in found])
    assert sorted(numbers.tolist()) == list(range(300))
    np.testing.assert_array_equal(rows, alignment.transform(values)[numbers])
