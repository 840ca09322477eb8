"""`bench/gpu.py` to its end through Triton's interpreter, and the bytes it counts against those that kernels move."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    # The interpreter of Triton 3.6 takes arrays for numbers; the NumPy after 2.3 no longer does.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
if os.environ.get("TRITON_INTERPRET") == "1":
    from realign_fast.kernels import _rows, _tuning, moments, row_transform
    from triton.runtime.interpreter import InterpreterBuilder

ROOT = Path(__file__).parents[1]


def run(script, *arguments, cwd):
    command = [sys.executable, "-W", "ignore", script, *arguments, "--json", "found.json"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr, json.loads((cwd / "found.json").read_text())


def test_everything_is_checked_and_nothing_is_timed_without_a_gpu(tmp_path):
    before = sorted((ROOT / "bench" / "results").iterdir())
    status, output, found = run(ROOT / "bench" / "gpu.py", "--csv", "found.csv", cwd=tmp_path)
    assert status == 0, output
    assert "the figures mean nothing" in output
    assert sorted((ROOT / "bench" / "results").iterdir()) == before

    names = {"row transform", "row transform backward", "row transform by domain", "moments", "transformed moments"}
    checked = {(check["kernel"], check["dtype"]) for check in found["checks"]}
    assert checked >= {(name, dtype) for name in names for dtype in ("float16", "bfloat16", "float32")}
    assert ("fit and transform", "float32") in checked
    assert all(check["passed"] and check["error"] <= 1 for check in found["checks"])
    assert {row["kernel"] for row in found["rows"]} >= names | {"row transform in a CUDA graph"}
    assert {row["peer"] for row in found["rows"]} >= {"copy", "read", "eager torch", "layer_norm", "rms_norm"}
    measured = ("ours", "ratio", "spread", "median_us")
    assert all(row[name] is None for row in found["rows"] for name in measured)
    assert {goal["verdict"] for goal in found["goals"]} == {"not measured"}
    assert len(found["goals"]) > 20
    assert found["settings"]["interpreted"]
    assert set(found["settings"]["limits"].values()) == {None}
    assert found["machine"]["versions"]["torch"] == torch.__version__

    with (tmp_path / "found.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["what"] for line in lines] == [row["what"] for row in found["rows"]]
    assert all(line[name] == "" for line in lines for name in measured)


def test_a_tree_runs_without_being_installed_and_a_wrong_kernel_fails_it(tmp_path):
    for folder in ("kernels", "realign_fast", "bench"):
        (tmp_path / folder).mkdir()
        for path in (ROOT / folder).glob("*.py"):
            shutil.copy(path, tmp_path / folder)
    shutil.copy(ROOT / "setup.py", tmp_path)
    with (tmp_path / "kernels" / "moments.py").open("a") as file:
        file.write("\n\ndef moments(*arguments):\n    pass\n")
    status, output, found = run(tmp_path / "bench" / "gpu.py", "--verdict", cwd=tmp_path)
    assert status == 1, output
    assert "no extension, so `fit` and `transform` are not checked" in output
    # What is installed beside it has the right kernel.
    assert {check["kernel"] for check in found["checks"] if not check["passed"]} == {"moments"}
    assert "WRONG: moments float32" in output
    assert "moments" not in {row["kernel"] for row in found["rows"]}
    assert not (tmp_path / "bench" / "results").exists()


@pytest.fixture
def moved(monkeypatch):
    """Count the bytes that kernels load from and store to tensors: `moved["load", tensor.data_ptr()]`."""
    found, ranges = Counter(), []

    def note(kind, pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
        for first, end in ranges:
            found[kind, first] += size * int(((addresses >= first) & (addresses < end)).sum())

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(builder, pointers, mask, *rest):
        note("load", pointers, mask)
        return load(builder, pointers, mask, *rest)

    def counted_store(builder, pointers, value, mask, *rest):
        note("store", pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)

    def watch(*tensors):
        ranges.extend((x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors)
        return found

    return watch


def rows(count, dim, dtype, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def maps(dim):
    shift, correction = rows(2, dim, torch.float64).mul(0.3 / np.sqrt(dim)).split(1)
    return row_transform.Maps.of(torch.tensor([1.2], dtype=torch.float64), shift, correction)


def limit_block(monkeypatch, block):
    """Let rows of more than `block` elements count as too long for registers."""
    for module in (_tuning, moments, row_transform):
        monkeypatch.setattr(module, "MAX_BLOCK_D", block)


SHAPES = pytest.mark.parametrize(
    ("dtype", "dim", "block"),
    [
        (torch.float32, 96, 8192),
        (torch.float16, 96, 8192),
        (torch.float32, 768, 8192),
        (torch.float16, 768, 8192),
        (torch.float16, 768, 256),
    ],
)


@SHAPES
def test_the_row_transform_moves_the_bytes_of_its_plan(moved, monkeypatch, dtype, dim, block):
    limit_block(monkeypatch, block)
    x = rows(21, dim, dtype)
    out = torch.empty_like(x)
    found = moved(x, out)
    row_transform.row_transform(x, out, maps(dim), _rows.new_bad_rows(x.device))
    assert sum(found.values()) == _tuning.plan_rows(21, dim, x.device).count_bytes([x], [out])
    assert found["store", out.data_ptr()] == out.nbytes


@SHAPES
def test_its_gradient_moves_the_bytes_of_its_plan(moved, monkeypatch, dtype, dim, block):
    limit_block(monkeypatch, block)
    x, grad_out = rows(21, dim, dtype), rows(21, dim, dtype, seed=1)
    grad_x = torch.empty_like(x)
    found = moved(x, grad_out, grad_x)
    row_transform.row_transform_backward(x, grad_out, grad_x, maps(dim))
    assert sum(found.values()) == row_transform.plan_backward(21, dim, x.device).count_bytes([x, grad_out], [grad_x])
    assert found["store", grad_x.data_ptr()] == grad_x.nbytes


@SHAPES
def test_moments_move_the_bytes_of_their_plan(moved, monkeypatch, dtype, dim, block):
    limit_block(monkeypatch, block)
    x = rows(21, dim, dtype)
    found = moved(x)
    moments.moments(x, torch.zeros(dim, dtype=torch.int64), _rows.new_bad_rows(x.device))
    assert sum(found.values()) == moments.plan_moments(21, dim, x.device).count_bytes([x])
