"""The command line: what it prints, what it writes, and how it ends."""

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import realign_fast as rf
from realign_fast import _files
from realign_fast.cli import main
from realign_fast.io.formats import open_shard
from realign_fast.io.sources import open_source

DIM = 19
COMMANDS = ("fit", "stats", "merge", "apply", "convert", "inspect", "verify", "bench", "demo", "embed", "export")


def cloud(count: int, seed: int, dim: int = DIM) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=dim) + 0.8 * rng.normal(size=(count, dim))).astype(np.float32)


def values_of(path: Path) -> np.ndarray:
    return np.concatenate([batch.rows.values.copy() for batch in open_source(path, name="x").batches()])


@pytest.fixture
def realign(capsys):
    """Return a function that runs a command and returns its exit code, its summary and its stderr."""

    def run(*arguments: object) -> tuple[int, dict | None, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        lines = out.splitlines()
        assert len(lines) <= 1  # words go to stderr
        return code, json.loads(lines[0]) if lines else None, err

    return run


@pytest.fixture
def ok(realign):
    """Return a function that runs a command which must succeed and returns its summary."""

    def run(command: str, *arguments: object) -> dict:
        code, summary, err = realign(command, *arguments)
        assert code == 0, err
        assert summary["command"] == command
        return summary

    return run


@pytest.fixture
def refused(realign):
    """Return a function that runs a command whose data are wrong; its one line of error must hold the words given."""

    def run(command: str, *arguments: object, says: tuple[object, ...]) -> None:
        code, summary, err = realign(command, *arguments)
        assert (code, summary) == (1, None), err
        *progress, line = err.splitlines()
        assert line.startswith(f"realign {command}: "), err
        assert not [other for other in progress if other.startswith("realign")]
        for word in says:
            assert str(word) in line

    return run


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder with `text` (three shards), `image.npy` and a place for outputs."""
    (tmp_path / "text").mkdir()
    for name, part in zip(("a_1", "a_2", "a_10"), np.array_split(cloud(300, 1), [120, 130]), strict=True):
        np.save(tmp_path / "text" / f"{name}.npy", part)
    np.save(tmp_path / "image.npy", cloud(200, 2))
    return tmp_path


@pytest.fixture
def fitted(folder) -> Path:
    """Return an alignment in `folder`."""
    path = folder / "a.safetensors"
    rf.fit(folder / "text", folder / "image.npy", encoder="clip").save(path)
    return path


def spoil(path: Path, row: int, value: float = np.nan) -> None:
    values = np.load(path)
    values[row] = value
    np.save(path, values)


# ---- Usage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "")
    assert out.startswith(f"usage: realign {command}")


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"realign-fast {rf.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "nothing",
        "fit text image",
        "fit text -o a",
        "fit text image -o a --refine -1",
        "fit text image -o a --refine two",
        "fit text image -o a --limit 0",
        "fit text image -o a --on-bad-rows ignore",
        "stats text -o a --threads 0",
        "merge -o all",
        "apply a text -o out --format csv",
        "apply a text -o out --dtype int8",
        "apply a text -o out --side left",
        "apply a text -o out --on-bad-rows skip",
        "apply a text -o out --resume --overwrite",
        "convert in -o out",
        "convert in -o out --format same",
        "inspect",
        "verify a b",
    ],
)
def test_wrong_usage_ends_with_2(realign, arguments):
    code, summary, err = realign(*arguments.split())
    assert (code, summary) == (2, None)
    assert err.splitlines()[-1].startswith("realign")
    assert ": error: " in err.splitlines()[-1]


# ---- fit ------------------------------------------------------------------------------------------------------------


def test_fit_writes_what_the_function_finds(folder, ok):
    summary = ok("fit", folder / "text", folder / "image.npy", "-o", folder / "a.safetensors", "--encoder", "clip")
    found = rf.Alignment.load(folder / "a.safetensors")
    expected = rf.fit(folder / "text", folder / "image.npy")
    assert found.fingerprint == expected.fingerprint
    assert found.encoder == "clip"
    assert summary["output"] == str(folder / "a.safetensors")
    assert summary["text"]["rows"] == 300
    assert summary["image"]["rows"] == 200
    assert summary["gap"]["before"] > 0.1
    assert summary["held_out"]["noise_floor"] > 0


@pytest.mark.parametrize("method", ["anchor", "anchor_trace", "realign"])
def test_fit_takes_every_method(folder, ok, method):
    options = ("--refine", 2) if method == "realign" else ()
    output = folder / "a.safetensors"
    ok("fit", folder / "text", folder / "image.npy", "-o", output, "--method", method, *options, "--threads", 1)
    assert rf.Alignment.load(output).method == method


def test_fit_reads_no_more_than_the_limit(folder, ok):
    summary = ok("fit", folder / "text", folder / "image.npy", "-o", folder / "a.safetensors", "--limit", 125)
    assert (summary["text"]["rows"], summary["image"]["rows"]) == (125, 125)
    first = np.concatenate([np.load(folder / "text" / f"a_{i}.npy") for i in (1, 2)])[:125]
    expected = rf.fit(first, np.load(folder / "image.npy")[:125])
    assert rf.Alignment.load(folder / "a.safetensors").fingerprint == expected.fingerprint


def test_fit_of_few_rows_says_that_none_are_held_out(tmp_path, realign):
    for name, seed in (("text", 1), ("image", 2)):
        np.save(tmp_path / f"{name}.npy", cloud(5, seed))
    code, summary, err = realign("fit", tmp_path / "text.npy", tmp_path / "image.npy", "-o", tmp_path / "a.safetensors")
    assert (code, summary["held_out"]) == (0, None)
    assert "too few rows for a held-out check" in err


@pytest.mark.parametrize("side", ["text", "image"])
def test_fit_of_one_row_is_refused(tmp_path, refused, side):
    for name, seed in (("text", 1), ("image", 2)):
        np.save(tmp_path / f"{name}.npy", cloud(1 if name == side else 50, seed))
    output = tmp_path / "a.safetensors"
    refused("fit", tmp_path / "text.npy", tmp_path / "image.npy", "-o", output, says=("2",))
    assert not output.exists()


@pytest.mark.parametrize("side", ["text", "image"])
def test_fit_of_equal_rows_is_refused(tmp_path, refused, side):
    for name, seed in (("text", 1), ("image", 2)):
        values = cloud(50, seed)
        np.save(tmp_path / f"{name}.npy", np.tile(values[:1], (50, 1)) if name == side else values)
    output = tmp_path / "a.safetensors"
    refused("fit", tmp_path / "text.npy", tmp_path / "image.npy", "-o", output, says=("equal",))
    assert not output.exists()


def test_fit_of_different_dimensions_is_refused(folder, refused):
    np.save(folder / "image.npy", cloud(200, 2, DIM + 1))
    arguments = ("fit", folder / "text", folder / "image.npy", "-o", folder / "a.safetensors")
    refused(*arguments, says=(DIM, DIM + 1, "text", "image", "dimension"))


def test_fit_with_an_option_of_another_method_is_refused(folder, refused):
    output = folder / "a.safetensors"
    options = ("--method", "anchor", "--refine", 1)
    refused("fit", folder / "text", folder / "image.npy", "-o", output, *options, says=("refine", "anchor"))
    refused("fit", folder / "text", folder / "image.npy", "-o", output, "--method", "none", says=("none", "realign"))


def test_fit_refuses_an_output_that_cannot_be_before_it_reads(tmp_path, refused):
    missing = ("fit", tmp_path / "text.npy", tmp_path / "image.npy", "-o")
    refused(*missing, tmp_path, says=(tmp_path, "directory"))
    refused(*missing, tmp_path / "nowhere" / "a.safetensors", says=(tmp_path / "nowhere",))


def test_fit_names_file_and_row_of_a_bad_row(folder, refused):
    spoil(folder / "text" / "a_2.npy", 7)
    arguments = ("fit", folder / "text", folder / "image.npy", "-o", folder / "a.safetensors")
    refused(*arguments, says=(folder / "text" / "a_2.npy", "row 7", "NaN"))


@pytest.mark.parametrize(("policy", "rows"), [("skip", 298), ("zero", 300)])
def test_fit_leaves_bad_rows_out_or_counts_them(folder, ok, policy, rows):
    spoil(folder / "text" / "a_2.npy", 7)
    spoil(folder / "text" / "a_10.npy", 3, 0)
    output = folder / "a.safetensors"
    summary = ok("fit", folder / "text", folder / "image.npy", "-o", output, "--on-bad-rows", policy)
    assert (summary["text"]["rows"], summary["text"]["bad_rows"]) == (rows, 2)


# ---- stats and merge ------------------------------------------------------------------------------------------------


def test_merged_parts_are_the_whole(folder, ok):
    whole, merged = folder / "whole.safetensors", folder / "merged.safetensors"
    summary = ok("stats", folder / "text", "-o", whole)
    parts = []
    for i in (10, 2, 1):
        parts.append(folder / f"part_{i}.safetensors")
        ok("stats", folder / "text" / f"a_{i}.npy", "-o", parts[-1], "--threads", i)
    again = ok("merge", *parts, "-o", merged)
    assert merged.read_bytes() == whole.read_bytes()
    assert (again["rows"], again["dim"], again["trace"]) == (300, DIM, summary["trace"])
    assert rf.Moments.load(merged) == rf.Moments(DIM).update(values_of(folder / "text"))


def test_parts_with_a_covariance_are_merged(folder, ok, refused):
    whole, merged, plain = (folder / f"{name}.safetensors" for name in ("whole", "merged", "plain"))
    assert ok("stats", folder / "text", "-o", whole, "--covariance")["covariance"] is True
    parts = [folder / f"part_{i}.safetensors" for i in (1, 2, 10)]
    for part, i in zip(parts, (1, 2, 10), strict=True):
        ok("stats", folder / "text" / f"a_{i}.npy", "-o", part, "--covariance", "--precision", "exact")
    ok("merge", *parts, "-o", merged)
    found, wanted = rf.Moments.load(merged), rf.Moments.load(whole)
    np.testing.assert_array_equal(found.mean, wanted.mean)
    assert np.linalg.norm(found.covariance - wanted.covariance) < 1e-7 * np.linalg.norm(wanted.covariance)
    assert ok("inspect", merged)["covariance"] is True
    ok("stats", folder / "text", "-o", plain)
    refused("merge", plain, whole, "-o", folder / "no.safetensors", says=("--covariance",))


def test_parts_are_taken_out_of_a_sum(folder, ok, refused):
    parts = {i: folder / f"part_{i}.safetensors" for i in (1, 2, 10)}
    for i, part in parts.items():
        ok("stats", folder / "text" / f"a_{i}.npy", "-o", part)
    rest, both = folder / "rest.safetensors", folder / "both.safetensors"
    ok("merge", parts[1], parts[10], "-o", both)
    before = ok("merge", *parts.values(), "-o", rest, "--subtract", parts[2])
    assert rest.read_bytes() == both.read_bytes()
    assert before["rows"] == rf.Moments.load(both).count
    assert ok("merge", *parts.values(), "-o", rest, "--subtract", parts[1], parts[2])["rows"] > 0
    assert rest.read_bytes() == parts[10].read_bytes()

    none, other = folder / "none.safetensors", folder / "other.safetensors"
    whole = rf.Moments.load(parts[10])
    refused("merge", parts[2], "-o", none, "--subtract", parts[10], says=(f"{parts[10]}: ", "no part of", "more rows"))
    (rf.Moments(DIM) + rf.Moments(DIM).update(-values_of(folder / "text" / "a_10.npy"))).save(other)
    refused("merge", parts[10], "-o", none, "--subtract", other, says=(f"{other}: ", "no part of", whole.count))
    refused("merge", parts[10], "-o", none, "--subtract", parts[10], says=("nothing is left", none))
    rf.Moments(3).update(cloud(9, 1, 3)).save(other)
    refused("merge", parts[10], "-o", none, "--subtract", other, says=(f"{other}: ", "dimension"))
    refused("merge", parts[10], other, "-o", none, says=(f"{other}: ", "dimension"))
    refused("merge", parts[10], "-o", none, "--subtract", folder / "no", says=(folder / "no",))
    assert not none.exists()


def test_a_window_is_inspected(folder, ok):
    window, path = rf.MomentsWindow(DIM, 5), folder / "w.safetensors"
    window.save(path)
    assert ok("inspect", path)["parts"] == 0
    window.push(rf.Moments(DIM).update(cloud(9, 1)), "monday")
    window.save(path)
    found = ok("inspect", path)
    assert (found["kind"], found["size"], found["names"], found["rows"]) == ("window", 5, ["monday"], 9)


def test_stats_reads_no_more_than_the_limit(folder, ok):
    assert ok("stats", folder / "text", "-o", folder / "m.safetensors", "--limit", 7)["rows"] == 7


@pytest.mark.parametrize(("policy", "rows"), [("skip", 9), ("zero", 10)])
def test_stats_leaves_bad_rows_out_or_counts_them(folder, ok, refused, policy, rows):
    path = folder / "text" / "a_2.npy"
    spoil(path, 4)
    refused("stats", path, "-o", folder / "m.safetensors", says=(path, "row 4"))
    assert not (folder / "m.safetensors").exists()
    summary = ok("stats", path, "-o", folder / "m.safetensors", "--on-bad-rows", policy)
    assert (summary["rows"], summary["bad_rows"]) == (rows, 1)


def test_stats_of_nothing_but_skipped_rows_is_refused(folder, refused):
    path = folder / "text" / "a_2.npy"
    spoil(path, slice(None))
    refused("stats", path, "-o", folder / "m.safetensors", "--on-bad-rows", "skip", says=(path, "no"))


def test_merge_of_different_dimensions_is_refused(tmp_path, refused):
    for dim in (3, 4):
        rf.Moments(dim).update(cloud(9, 1, dim)).save(tmp_path / f"{dim}.safetensors")
    parts = (tmp_path / "3.safetensors", tmp_path / "4.safetensors")
    refused("merge", *parts, "-o", tmp_path / "all.safetensors", says=("dimension", 3, 4))
    assert not (tmp_path / "all.safetensors").exists()


def test_merge_of_what_are_no_moments_is_refused(folder, fitted, refused):
    output = folder / "all.safetensors"
    refused("merge", fitted, "-o", output, says=(fitted, "alignment", "moments"))
    refused("merge", folder / "image.npy", "-o", output, says=(folder / "image.npy",))
    refused("merge", folder / "missing.safetensors", "-o", output, says=(folder / "missing.safetensors",))


# ---- apply ----------------------------------------------------------------------------------------------------------

SUFFIXES = {"same": "npy", "npy": "npy", "parquet": "parquet", "safetensors": "safetensors", "pickle": "pkl"}


@pytest.mark.parametrize("form", SUFFIXES)
def test_apply_writes_every_format(folder, fitted, ok, form):
    summary = ok("apply", fitted, folder / "text", "-o", folder / "out", "--format", form)
    assert (summary["files"], summary["rows"], summary["bad_rows"]) == (3, 300, 0)
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {f"a_{i}.{SUFFIXES[form]}" for i in (1, 2, 10)} | {"realign-manifest.json"}
    expected = rf.Alignment.load(fitted).transform(values_of(folder / "text"))
    np.testing.assert_array_equal(values_of(folder / "out"), expected)
    assert ok("verify", folder / "out")["ok"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_apply_writes_every_dtype(folder, fitted, ok, dtype):
    ok("apply", fitted, folder / "text", "-o", folder / "out", "--format", "safetensors", "--dtype", dtype)
    assert open_shard(folder / "out" / "a_1.safetensors").dtype == dtype
    assert ok("inspect", folder / "out" / "a_1.safetensors")["dtype"] == dtype
    assert ok("verify", folder / "out")["ok"]


def test_apply_refuses_bfloat16_where_the_format_has_none(folder, fitted, refused):
    refused("apply", fitted, folder / "text", "-o", folder / "out", "--dtype", "bfloat16", says=("bfloat16",))


def test_apply_maps_either_side(folder, fitted, ok):
    ok("apply", fitted, folder / "image.npy", "-o", folder / "out", "--side", "target", "--threads", 1)
    image = np.load(folder / "image.npy").astype(np.float64)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    np.testing.assert_allclose(np.load(folder / "out" / "image.npy"), image, rtol=0, atol=1e-6)


def test_apply_keeps_ids_and_other_columns(folder, fitted, ok):
    table = folder / "table"
    ok("convert", folder / "text" / "a_2.npy", "-o", table, "--format", "parquet")
    columns = pq.read_table(table / "a_2.parquet")
    columns = columns.append_column("id", [[f"row {i}" for i in range(10)]])
    pq.write_table(columns.rename_columns(["vector", "id"]), table / "a_2.parquet")
    ok("apply", fitted, table / "a_2.parquet", "-o", folder / "out", "--text-column", "vector")
    written = pq.read_table(folder / "out" / "a_2.parquet")
    assert written.column_names == ["vector", "id"]
    assert written["id"].to_pylist() == [f"row {i}" for i in range(10)]


def test_apply_resumes_where_it_ended(folder, fitted, ok, refused):
    arguments = ("apply", fitted, folder / "text", "-o", folder / "out")
    ok(*arguments)
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    refused(*arguments, says=(folder / "out", "not empty"))
    (folder / "out" / "a_2.npy").unlink()
    assert ok(*arguments, "--resume")["skipped_files"] == 2
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before


def test_apply_does_not_resume_another_job(folder, fitted, refused, ok):
    arguments = ("apply", fitted, folder / "text", "-o", folder / "out")
    ok(*arguments)
    refused(*arguments, "--resume", "--dtype", "float16", says=(folder / "out", "dtype", "float16"))
    np.save(folder / "text" / "a_2.npy", cloud(10, 9))
    refused(*arguments, "--resume", says=("a_2.npy", "has changed"))
    assert ok(*arguments, "--overwrite")["skipped_files"] == 0
    assert ok("verify", folder / "out")["ok"]


def test_apply_names_file_and_row_of_a_bad_row(folder, fitted, refused, ok):
    spoil(folder / "text" / "a_10.npy", 150, np.inf)
    arguments = ("apply", fitted, folder / "text", "-o", folder / "out")
    refused(*arguments, says=(folder / "text" / "a_10.npy", "row 150", "NaN or infinity"))
    assert not (folder / "out" / "a_10.npy").exists()
    assert ok(*arguments, "--overwrite", "--on-bad-rows", "zero")["bad_rows"] == 1
    assert not np.load(folder / "out" / "a_10.npy")[150].any()
    assert ok("verify", folder / "out")["ok"]


def test_apply_to_rows_of_another_dimension_is_refused(folder, fitted, refused):
    np.save(folder / "wide.npy", cloud(9, 1, DIM + 1))
    says = (folder / "wide.npy", DIM, DIM + 1, "dimension")
    refused("apply", fitted, folder / "wide.npy", "-o", folder / "out", says=says)


def test_an_output_folder_that_is_the_input_is_refused(folder, fitted, refused):
    before = {path.name: path.read_bytes() for path in (folder / "text").iterdir()}
    for how in ((), ("--overwrite",), ("--resume",)):
        refused("apply", fitted, folder / "text", "-o", folder / "text", *how, says=(folder / "text", "output"))
        convert = ("convert", folder / "text", "-o", folder / "text", "--format", "parquet", *how)
        refused(*convert, says=(folder / "text", "output"))
    assert {path.name: path.read_bytes() for path in (folder / "text").iterdir()} == before


def test_an_output_folder_that_is_a_file_is_refused(folder, fitted, refused):
    refused("apply", fitted, folder / "text", "-o", folder / "image.npy", says=(folder / "image.npy", "folder"))


# ---- The alignment file ---------------------------------------------------------------------------------------------


def test_a_damaged_alignment_is_refused(folder, fitted, refused):
    whole = fitted.read_bytes()
    for data in (b"", whole[:7], whole[:100], whole[:-1], b"\xff" * len(whole), whole[:40] + b"\xff" + whole[41:]):
        fitted.write_bytes(data)
        refused("apply", fitted, folder / "text", "-o", folder / "out", says=(fitted,))
        assert not (folder / "out").exists()
        refused("inspect", fitted, says=(fitted,))


def test_an_alignment_of_a_newer_format_is_refused(folder, fitted, refused, monkeypatch):
    monkeypatch.setattr(_files, "FORMAT_VERSION", 0)
    says = (fitted, "version 1", "upgrade realign-fast")
    refused("apply", fitted, folder / "text", "-o", folder / "out", says=says)
    refused("inspect", fitted, says=says)


def test_moments_are_no_alignment(folder, refused):
    path = folder / "m.safetensors"
    rf.Moments(DIM).update(cloud(9, 1)).save(path)
    refused("apply", path, folder / "text", "-o", folder / "out", says=(path, "moments", "alignment"))


# ---- inspect, verify, convert ---------------------------------------------------------------------------------------


def test_inspect_says_what_a_file_holds(folder, fitted, ok, realign):
    found = ok("inspect", fitted)
    assert (found["kind"], found["dim"], found["encoder"], found["method"]) == ("alignment", DIM, "clip", "realign")
    assert found["fingerprint"] == rf.Alignment.load(fitted).fingerprint
    rf.Moments(DIM).update(cloud(9, 1)).save(folder / "m.safetensors")
    found = ok("inspect", folder / "m.safetensors")
    assert (found["kind"], found["dim"], found["rows"]) == ("moments", DIM, 9)
    rf.Whitener.fit(cloud(99, 1), "pca", n_components=2).save(folder / "w.safetensors")
    found = ok("inspect", folder / "w.safetensors")
    assert (found["kind"], found["whitening"], found["out_dim"], found["rows"]) == ("whitener", "pca", 2, 99)
    code, found, err = realign("inspect", folder / "text" / "a_2.npy")
    assert code == 0
    assert (found["kind"], found["rows"], found["dim"], found["dtype"]) == ("embeddings", 10, DIM, "float32")
    assert "rows: 10\n" in err


def test_verify_finds_what_has_changed(folder, fitted, ok, realign, refused):
    refused("verify", folder / "text", says=(folder / "text", "manifest"))
    ok("apply", fitted, folder / "text", "-o", folder / "out")
    shard = folder / "out" / "a_2.npy"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (folder / "out" / "more.npy").write_bytes(b"")
    code, summary, err = realign("verify", folder / "out")
    assert (code, summary["ok"], len(summary["problems"])) == (1, False, 2)
    assert all(line.startswith("realign verify: ") for line in err.splitlines())
    assert "a_2.npy" in err
    assert "more.npy" in err


@pytest.mark.parametrize("form", ["npy", "parquet", "safetensors", "pickle"])
def test_convert_there_and_back_changes_nothing(folder, ok, form):
    ok("convert", folder / "text", "-o", folder / "there", "--format", form)
    assert ok("convert", folder / "there", "-o", folder / "back", "--format", "npy")["rows"] == 300
    np.testing.assert_array_equal(values_of(folder / "back"), values_of(folder / "text"))
    assert ok("verify", folder / "there")["ok"]
    assert ok("convert", folder / "there", "-o", folder / "back", "--format", "npy", "--resume")["skipped_files"] == 3
    assert ok("convert", folder / "there", "-o", folder / "back", "--format", "npy", "--overwrite")["files"] == 3


# ---- Inputs that are wrong for every command ------------------------------------------------------------------------


def reading(folder: Path, path: Path) -> dict[str, tuple]:
    """Return the arguments by which each command reads embeddings from `path`."""
    return {
        "fit": (path, folder / "image.npy", "-o", folder / "new.safetensors"),
        "stats": (path, "-o", folder / "new.safetensors"),
        "apply": (folder / "a.safetensors", path, "-o", folder / "out"),
        "convert": (path, "-o", folder / "out", "--format", "parquet"),
        "inspect": (path,),
    }


@pytest.mark.parametrize("command", ["fit", "stats", "apply", "convert", "inspect"])
def test_a_wrong_input_is_named(folder, fitted, refused, command):
    for name in ("missing.npy", "missing_*.npy", "missing/"):
        refused(command, *reading(folder, folder / name)[command], says=("missing",))
    (folder / "empty").mkdir()
    refused(command, *reading(folder, folder / "empty")[command], says=(folder / "empty",))
    (folder / "notes.txt").write_text("no embeddings")
    refused(command, *reading(folder, folder / "notes.txt")[command], says=(folder / "notes.txt",))
    for name, values in (
        ("int8", np.ones((9, DIM), np.int8)),
        ("flat", np.ones(9, np.float32)),
        ("objects", np.array([[None] * DIM])),
    ):
        path = folder / f"{name}.npy"
        np.save(path, values)
        refused(command, *reading(folder, path)[command], says=(path,))
    whole = (folder / "image.npy").read_bytes()
    for name, data in (("short", whole[:-1]), ("head", whole[:20]), ("none", b""), ("other", b"x" * 999)):
        path = folder / f"{name}.npy"
        path.write_bytes(data)
        refused(command, *reading(folder, path)[command], says=(path,))
    for suffix in ("parquet", "safetensors", "pkl", "arrow"):
        path = folder / f"damaged.{suffix}"
        path.write_bytes(whole)
        shutil.rmtree(folder / "out", ignore_errors=True)  # where a job that began has left its journal
        refused(command, *reading(folder, path)[command], says=(path,))
        assert not list(folder.glob("out/damaged*"))
    assert not (folder / "new.safetensors").exists()


@pytest.mark.parametrize("command", ["fit", "stats", "apply", "convert"])
def test_shards_of_different_dimension_or_dtype_are_refused(folder, fitted, refused, command):
    odd = folder / "text" / "a_2.npy"
    for values in (cloud(9, 1, DIM + 1), cloud(9, 1).astype(np.float16)):
        np.save(odd, values)
        refused(command, *reading(folder, folder / "text")[command], says=(odd,))
        shutil.rmtree(folder / "out", ignore_errors=True)


def test_a_missing_column_is_named(folder, refused, ok):
    ok("convert", folder / "text", "-o", folder / "table", "--format", "parquet")
    path = folder / "table" / "a_1.parquet"
    arguments = ("stats", path, "-o", folder / "m.safetensors", "--embedding-column", "nothing")
    refused(*arguments, says=(path, "nothing"))


# ---- As a program ---------------------------------------------------------------------------------------------------


def program(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "realign_fast", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_program_prints_one_object_and_its_progress_elsewhere(folder):
    done = program("fit", "text/*.npy", "image.npy", "-o", "a.safetensors", cwd=folder)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["output"] == "a.safetensors"
    assert "read text (3 of 3): 300 of 300 rows" in done.stderr
    assert "gap before" in done.stderr
    done = program("apply", "a.safetensors", "text", "-o", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 300


def test_the_program_ends_with_1_and_2(folder):
    done = program("stats", "missing.npy", "-o", "m.safetensors", cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    said = [line for line in done.stderr.splitlines() if "extension" not in line]  # one that is missing is named too
    assert said == ["realign stats: missing.npy does not exist"]
    done = program("stats", "missing.npy", cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_a_file_that_must_not_be_read_or_written_is_named(folder, refused, monkeypatch):
    def no(*_, **__):
        raise PermissionError(13, "Permission denied", str(folder / "m.safetensors"))

    monkeypatch.setattr(_files, "replacing", no)
    refused("stats", folder / "text", "-o", folder / "m.safetensors", says=("Permission denied", "m.safetensors"))


def test_an_interrupted_command_says_so(folder, realign, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(_files, "replacing", interrupted)
    code, summary, err = realign("stats", folder / "text", "-o", folder / "m.safetensors")
    assert (code, summary) == (130, None)
    assert err.splitlines()[-1] == "realign stats: interrupted"


def test_bench_prints_a_table_and_writes_its_figures(folder, ok, monkeypatch):
    monkeypatch.setattr("realign_fast.benchmark._QUICK_BYTES", 1 << 20)
    summary = ok("bench", "--quick", "--json", folder / "bench.json")
    assert {line["kernel"] for line in summary["kernels"]} == {"moments", "row_transform"}
    assert json.loads((folder / "bench.json").read_text())["kernels"] == summary["kernels"]


def test_a_log_file_receives_what_is_said_and_the_summary(folder, realign):
    log = folder / "log.txt"
    _, summary, err = realign("stats", folder / "text", "-o", folder / "m.safetensors", "--log-file", log)
    *said, told, end = map(json.loads, log.read_text().splitlines())
    assert [each["message"] for each in said] == err.splitlines()
    assert {each["event"] for each in said} == {"message"}
    assert (told["event"], told["summary"]) == ("summary", summary)
    assert (end["event"], end["exit_code"], end["command"]) == ("end", 0, "stats")
    assert datetime.fromisoformat(end["time"]).tzinfo == UTC
    code, _, failure = realign("stats", folder / "nowhere", "-o", folder / "m.safetensors", "--log-file", log)
    assert code == 1
    *_, why, end = map(json.loads, log.read_text().splitlines())
    assert (why["message"], end["exit_code"]) == (failure.strip(), 1)


def test_a_log_file_that_cannot_be_is_named(folder, refused):
    log = folder / "nowhere" / "log.txt"
    refused("inspect", folder / "image.npy", "--log-file", log, says=("--log-file", log))


# ---- Other maps -----------------------------------------------------------------------------------------------------


def test_other_maps_and_their_options(folder, ok, refused):
    target = folder / "a.safetensors"
    for arguments, wanted in [
        (("--method", "c3", "--sigma", "0.05"), {"sigma": 0.05}),
        (("--method", "coral", "--shrinkage", "0.1", "--refine", "1"), {"shrinkage": 0.1, "refine": 1}),
        (("--method", "bca", "--shrinkage", "oas", "--energy", "0.9"), {"shrinkage": "oas", "energy": 0.9}),
        (("--method", "ot", "--strength", "0.5"), {"strength": 0.5}),
        (("--method", "whiten", "--kind", "pca"), {"kind": "pca"}),
        (("--method", "debias", "-k", "2"), {"k": 2}),
        (("--method", "center"), {}),
    ]:
        assert ok("fit", folder / "text", folder / "image.npy", "-o", target, *arguments)["options"] == wanted
        described = ok("inspect", target)
        assert described["matrix"] is (arguments[1] in ("coral", "bca", "ot", "whiten", "debias"))
    refused("fit", folder / "text", folder / "image.npy", "-o", target, "--sigma", 1, says=("takes no option 'sigma'",))
    refused(
        "fit", folder / "text", folder / "image.npy", "-o", target, "--method", "ot", "--strength", 2, says=("[0, 1]",)
    )


def test_a_strength_that_was_chosen_is_said(folder, ok, capsys):
    summary = ok("fit", folder / "text", folder / "image.npy", "-o", folder / "a.safetensors", "--method", "ot")
    assert set(summary["options"]) == {"strength", "shrinkage"}
    assert len(summary["selection"]["candidates"]) == 66


def test_noise_by_flags(folder, ok):
    target = folder / "a.safetensors"
    ok("fit", folder / "text", folder / "image.npy", "-o", target, "--method", "c3")
    alignment = rf.Alignment.load(target)
    ok("apply", target, folder / "text", "-o", folder / "out", "--noise-std", "0.2", "--seed", 3)
    first = sorted((folder / "text").iterdir(), key=lambda path: int(path.stem.split("_")[1]))[0]
    wanted = alignment.transform(np.load(first), noise_std=0.2, seed=3)
    np.testing.assert_array_equal(np.load(folder / "out" / first.name), wanted)
