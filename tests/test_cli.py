import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import realign_fast as rf
from realign_fast import _files
from realign_fast.cli import main

DIM = 64


def cloud(count, seed, dim=DIM):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=dim) + 0.8 * rng.normal(size=(count, dim))).astype(np.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Text and image shards in the current directory."""
    monkeypatch.chdir(tmp_path)
    for seed, side in enumerate(("text", "image")):
        (tmp_path / side).mkdir()
        for shard in range(3):
            np.save(tmp_path / side / f"part_{shard}.npy", cloud(100 + shard, seed)[: 100 + shard] + shard / 100)
    return tmp_path


@pytest.fixture
def fitted(folder, capsys):
    assert main(["fit", "text", "image", "-o", "a.safetensors"]) == 0
    capsys.readouterr()
    return folder


def run(capsys, *argv):
    """Return exit code, the JSON summary (None on failure) and what went to stderr."""
    code = main([str(part) for part in argv])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == (1 if lines else 0)
    return code, json.loads(lines[-1]) if lines else None, captured.err


def fails(capsys, *argv):
    """Return the one line in which a command with wrong data ends."""
    code, summary, error = run(capsys, *argv)
    assert (code, summary) == (1, None)
    lines = [line for line in error.splitlines() if not line.startswith(("read ", "apply:"))]
    assert len(lines) == 1, error
    assert lines[0].startswith(f"realign {argv[0]}: ")
    assert "Traceback" not in error
    return lines[0]


def test_fit_apply_verify_inspect(folder, capsys):
    code, summary, error = run(capsys, "fit", "text", "image", "-o", "a.safetensors", "--refine", 2, "--encoder", "toy")
    assert code == 0
    assert summary["text"]["rows"] == summary["image"]["rows"] == 303
    assert summary["held_out"]["gap"]["centroid"] < summary["gap"]["before"]
    assert "held-out rows" in error

    code, summary, _ = run(capsys, "apply", "a.safetensors", "text", "-o", "out")
    assert (code, summary["files"], summary["rows"]) == (0, 3, 303)
    alignment = rf.Alignment.load("a.safetensors")
    for shard in range(3):
        name = f"part_{shard}.npy"
        np.testing.assert_array_equal(np.load(f"out/{name}"), alignment.transform(np.load(f"text/{name}")))

    assert run(capsys, "verify", "out")[:2] == (0, {"command": "verify", "directory": "out", **_ok(3, 303, summary)})
    code, summary, _ = run(capsys, "inspect", "a.safetensors")
    assert (summary["kind"], summary["dim"], summary["encoder"]) == ("alignment", DIM, "toy")
    assert run(capsys, "inspect", "text/part_0.npy")[1]["rows"] == 100


def _ok(files, rows, summary):
    return {"ok": True, "problems": [], "files": files, "rows": rows, "bytes": summary["bytes"]}


@pytest.mark.parametrize("method", ["anchor", "anchor_trace", "realign"])
def test_methods(folder, capsys, method):
    assert run(capsys, "fit", "text", "image", "-o", "a.safetensors", "--method", method)[1]["method"] == method
    np.testing.assert_array_equal(
        rf.Alignment.load("a.safetensors").shift, rf.fit("text", "image", method=method).shift
    )


@pytest.mark.parametrize("file_format", ["same", "npy", "parquet", "safetensors", "pickle"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_apply_writes_every_format_and_dtype(fitted, capsys, file_format, dtype):
    code, summary, _ = run(
        capsys, "apply", "a.safetensors", "text", "-o", "out", "--format", file_format, "--dtype", dtype
    )
    assert (code, summary["rows"]) == (0, 303)
    assert run(capsys, "verify", "out")[1]["ok"]
    described = run(capsys, "inspect", "out")[1]
    assert described["rows"] in (303, None)
    assert (described["dim"], described["dtype"]) == (DIM, dtype)


def test_bfloat16_lies_in_safetensors(fitted, capsys):
    assert run(capsys, "apply", "a.safetensors", "text", "-o", "out", "--format", "safetensors", "--dtype", "bfloat16")[
        1
    ]["rows"]
    assert run(capsys, "inspect", "out")[1]["dtype"] == "bfloat16"
    assert "safetensors" in fails(capsys, "apply", "a.safetensors", "text", "-o", "o2", "--dtype", "bfloat16")


def test_the_target_side_is_brought_to_unit_length(fitted, capsys):
    assert run(capsys, "apply", "a.safetensors", "image", "-o", "out", "--side", "target")[0] == 0
    rows, image = np.load("out/part_0.npy"), np.load("image/part_0.npy")
    np.testing.assert_allclose(rows, image / np.linalg.norm(image, axis=1, keepdims=True), atol=1e-6)


def test_convert_keeps_values(fitted, capsys):
    assert run(capsys, "convert", "text", "-o", "tables", "--format", "parquet")[1]["rows"] == 303
    assert run(capsys, "convert", "tables", "-o", "back", "--format", "npy")[1]["rows"] == 303
    for shard in range(3):
        np.testing.assert_array_equal(np.load(f"back/part_{shard}.npy"), np.load(f"text/part_{shard}.npy"))


def test_moments_of_parts_add_up_to_those_of_the_whole(folder, capsys):
    for shard in range(3):
        assert (
            run(capsys, "stats", f"text/part_{shard}.npy", "-o", f"{shard}.safetensors", "--threads", shard + 1)[0] == 0
        )
    assert run(capsys, "merge", "2.safetensors", "0.safetensors", "1.safetensors", "-o", "all.safetensors")[0] == 0
    code, summary, _ = run(capsys, "stats", "text", "-o", "whole.safetensors")
    assert (code, summary["rows"]) == (0, 303)
    assert rf.Moments.load("all.safetensors") == rf.Moments.load("whole.safetensors")
    assert run(capsys, "inspect", "all.safetensors")[1]["kind"] == "moments"


def test_limit(folder, capsys):
    summary = run(capsys, "fit", "text", "image", "-o", "a.safetensors", "--limit", 150)[1]
    assert summary["text"]["rows"] == summary["image"]["rows"] == 150


def test_an_output_folder_that_is_not_empty_is_refused_resumed_or_replaced(fitted, capsys):
    apply = ("apply", "a.safetensors", "text", "-o", "out")
    assert run(capsys, *apply)[0] == 0
    line = fails(capsys, *apply)
    assert "not empty" in line
    assert run(capsys, *apply, "--resume")[1]["skipped_files"] == 3
    assert run(capsys, *apply, "--overwrite")[1]["skipped_files"] == 0
    run(capsys, "fit", "image", "text", "-o", "a.safetensors")
    assert "alignment" in fails(capsys, *apply, "--resume")


def test_verify_finds_a_changed_byte(fitted, capsys):
    run(capsys, "apply", "a.safetensors", "text", "-o", "out")
    path = fitted / "out" / "part_1.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    code, summary, error = run(capsys, "verify", "out")
    assert code == 1
    assert not summary["ok"]
    assert "part_1.npy has changed" in error


@pytest.mark.parametrize("policy", ["raise", "skip", "zero"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_bad_rows(folder, capsys, policy, bad):
    rows = np.load("text/part_1.npy")
    rows[7] = bad
    np.save("text/part_1.npy", rows)
    fit = ("fit", "text", "image", "-o", "a.safetensors", "--on-bad-rows", policy)
    if policy == "raise":
        line = fails(capsys, *fit)
        assert "part_1.npy" in line
        assert "row 7" in line
        return
    assert run(capsys, *fit)[1]["text"]["bad_rows"] == 1
    line = fails(capsys, "apply", "a.safetensors", "text", "-o", "out")
    assert "part_1.npy" in line
    assert "row 7" in line
    code, summary, _ = run(capsys, "apply", "a.safetensors", "text", "-o", "out", "--resume", "--on-bad-rows", "raise")
    assert code == 1
    code, summary, _ = run(capsys, "apply", "a.safetensors", "text", "-o", "out2", "--on-bad-rows", "zero")
    assert (code, summary["bad_rows"]) == (0, 1)
    assert not np.load("out2/part_1.npy")[7].any()
    assert run(capsys, "verify", "out2")[0] == 0


def test_wrong_data_ends_in_one_line(folder, capsys):
    fit = ("-o", "a.safetensors")
    assert "nowhere does not exist" in fails(capsys, "fit", "nowhere", "image", *fit)
    (folder / "empty").mkdir()
    assert "no files" in fails(capsys, "fit", "text", "empty", *fit)
    np.save("wide.npy", cloud(50, 1, dim=DIM + 1))
    line = fails(capsys, "fit", "text", "wide.npy", *fit)
    assert "64" in line
    assert "65" in line
    np.save("bytes.npy", np.zeros((10, DIM), np.int8))
    line = fails(capsys, "fit", "bytes.npy", "image", *fit)
    assert "int8" in line
    assert "dequantise" in line
    np.save("one.npy", cloud(1, 0))
    assert "at least 2" in fails(capsys, "fit", "one.npy", "image", *fit)
    np.save("equal.npy", np.ones((50, DIM), np.float32))
    assert "text" in fails(capsys, "fit", "equal.npy", "image", *fit)
    assert "directory" in fails(capsys, "fit", "text", "image", "-o", "text")
    assert "nowhere" in fails(capsys, "fit", "text", "image", "-o", "nowhere/a.safetensors")
    assert "method" in fails(capsys, "fit", "text", "image", *fit, "--method", "magic")
    assert not (folder / "a.safetensors").exists()


def test_wrong_alignments_end_in_one_line(fitted, capsys, monkeypatch):
    data = (fitted / "a.safetensors").read_bytes()
    (fitted / "cut.safetensors").write_bytes(data[: len(data) // 2])
    assert "cut.safetensors" in fails(capsys, "apply", "cut.safetensors", "text", "-o", "out")
    monkeypatch.setattr(_files, "FORMAT_VERSION", 99)
    rf.Alignment.load("a.safetensors").save("newer.safetensors")
    monkeypatch.undo()
    monkeypatch.chdir(fitted)
    assert "newer" in fails(capsys, "apply", "newer.safetensors", "text", "-o", "out")
    save_file({"shift": torch.zeros(4)}, "other.safetensors")
    assert "other.safetensors" in fails(capsys, "apply", "other.safetensors", "text", "-o", "out")
    assert "folder of the input" in fails(capsys, "apply", "a.safetensors", "text", "-o", "text")
    assert "folder of the input" in fails(capsys, "apply", "a.safetensors", "text", "-o", ".")
    np.save("wide.npy", cloud(50, 1, dim=DIM + 1))
    assert "wide.npy" in fails(capsys, "apply", "a.safetensors", "wide.npy", "-o", "out")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["unknown"],
        ["fit", "text"],
        ["fit", "text", "image"],
        ["fit", "text", "image", "-o", "a", "--refine", "-1"],
        ["fit", "text", "image", "-o", "a", "--threads", "0"],
        ["apply", "a", "text", "-o", "out", "--resume", "--overwrite"],
        ["apply", "a", "text", "-o", "out", "--on-bad-rows", "skip"],
        ["convert", "text", "-o", "out"],
    ],
)
def test_wrong_usage_ends_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: realign" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "stats", "merge", "apply", "inspect", "verify", "convert", "bench", "demo"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: realign {command}" in capsys.readouterr().out


def test_as_a_module_in_a_process_of_its_own(folder):
    command = [sys.executable, "-m", "realign_fast", "fit", "text", "image", "-o", "a.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["command"] == "fit"
    done = subprocess.run([*command[:4], "missing", *command[5:]], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == ["realign fit: missing does not exist"]


def test_bench_writes_its_figures(folder, capsys, monkeypatch):
    monkeypatch.setattr("realign_fast.benchmark._QUICK_BYTES", 1 << 20)
    code, summary, error = run(capsys, "bench", "--quick", "--json", "bench.json")
    assert code == 0
    assert {line["kernel"] for line in summary["kernels"]} == {"moments", "row_transform"}
    assert json.loads((folder / "bench.json").read_text())["kernels"] == summary["kernels"]
    assert "GB/s" in error
