"""The commands over several processes, as torchrun starts them: the files of one process, to the last bit."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from realign_fast import _sample
from realign_fast._sample import Sample, take_rows
from realign_fast.cli import main
from realign_fast.io._manifest import Journal, Start, load, new_head

DIM = 24
NUM_ROWS = (700, 300, 900)  # of text; 8 processes find fewer files than they are


def torchrun(num_ranks: int, *arguments: object) -> list[str]:
    """Return the command line; the processes and their store meet on this machine."""
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks))
    return [*start, "-m", "realign_fast", *map(str, arguments)]


def ok(num_ranks: int, *arguments: object) -> dict:
    """Run a command that must succeed; return its summary, all that may be on stdout."""
    done = subprocess.run(torchrun(num_ranks, *arguments), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def lines_of(stderr: str) -> list[str]:
    """Return what the processes have said; torchrun adds a report of its own."""
    return [line for line in stderr.splitlines() if line.startswith("realign ")]


def refused(num_ranks: int, *arguments: object) -> str:
    """Run a command that must fail; return its one line."""
    done = subprocess.run(torchrun(num_ranks, *arguments), capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "realign_fast/" not in done.stderr  # no traceback of ours
    lines = lines_of(done.stderr)
    assert len(lines) == 1, done.stderr
    return lines[0]


def alone(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder with three shards of text, one of images, and a place for outputs."""
    rng = np.random.default_rng(0)
    (tmp_path / "text").mkdir()
    for number, count in enumerate(NUM_ROWS):
        rows = 1 + rng.normal(size=(count, DIM))
        np.save(tmp_path / "text" / f"part_{number}.npy", rows.astype(np.float32))
    np.save(tmp_path / "image.npy", (rng.normal(size=(500, DIM)) - 0.5).astype(np.float32))
    return tmp_path


@pytest.fixture
def fitted(folder) -> Path:
    """Return an alignment in `folder`, fitted by one process, with a step that needs rows of the sample."""
    alone("fit", folder / "text", folder / "image.npy", "-o", folder / "one.safetensors", "--refine", 1)
    return folder / "one.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- fit and stats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_fit_writes_the_same_bytes_in_any_number_of_processes(folder, fitted, num_ranks):
    """With 4 and 8 some have no file of either side."""
    output = folder / "many.safetensors"
    summary = ok(num_ranks, "fit", folder / "text", folder / "image.npy", "-o", output, "--refine", 1)
    assert output.read_bytes() == fitted.read_bytes()
    assert summary["text"]["rows"] == sum(NUM_ROWS)
    assert summary["held_out"]["gap"]["refine_1"] < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["anchor", "anchor_trace", "realign", "c3", "center"])
def test_every_method_of_means_and_traces_has_the_same_bytes(folder, method):
    arguments = ("fit", folder / "text", folder / "image.npy", "--method", method, "-o")
    alone(*arguments, folder / "one.safetensors")
    ok(2, *arguments, folder / "many.safetensors")
    assert (folder / "many.safetensors").read_bytes() == (folder / "one.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ot", "coral", "whiten"])
def test_methods_of_covariances_agree(folder, method):
    from realign_fast import Alignment

    arguments = ("fit", folder / "text", folder / "image.npy", "--method", method, "-o")
    alone(*arguments, folder / "one.safetensors")
    ok(3, *arguments, folder / "many.safetensors")
    one, many = (Alignment.load(folder / f"{name}.safetensors") for name in ("one", "many"))
    rows = np.load(folder / "text" / "part_0.npy")
    np.testing.assert_allclose(many.transform(rows), one.transform(rows), atol=1e-5)


def test_stats_have_the_same_bytes(folder):
    alone("stats", folder / "text", "-o", folder / "one.safetensors")
    summary = ok(2, "stats", folder / "text", "-o", folder / "many.safetensors")
    assert summary["rows"] == sum(NUM_ROWS)
    assert (folder / "many.safetensors").read_bytes() == (folder / "one.safetensors").read_bytes()


def test_a_limit_is_refused(folder):
    line = refused(2, "stats", folder / "text", "-o", folder / "many.safetensors", "--limit", 5)
    assert "limit" in line
    assert "one process" in line


def test_a_sample_of_shares_is_the_sample_of_all(monkeypatch):
    monkeypatch.setattr(_sample, "MAX_ROWS", 100)
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=(900, DIM)), rng.choice([1, 1, 1, 80], 900), axis=0).astype(np.float32)
    # Equal rows have equal keys; a key of 0 is that of a bad row.
    _, same = np.unique(values[:, 0], return_inverse=True)
    keys = rng.integers(0, 1 << 64, 900, np.uint64)[same]
    keys[::7] = 0

    def sample_of(parts, num_rows):
        sample = Sample(DIM, "float32", num_rows)
        for part_keys, part in parts:
            sample.add(part_keys, partial(take_rows, part))
        return sample

    whole = sample_of([(keys, values)], None)
    cuts = np.sort(rng.integers(0, len(values), 3))
    parts = zip(np.split(keys, cuts), np.split(values, cuts), strict=True)
    shares = [sample_of([part], None) for part in parts]
    for num_rows in (None, len(values)):
        merged = Sample(DIM, "float32", num_rows)
        for share in shares:
            merged.merge(pickle.loads(pickle.dumps(share)))
        assert merged.num_seen == len(values)
        np.testing.assert_array_equal(merged.take(merged.ranking()).values, whole.take(whole.ranking()).values)


def test_a_heap_of_equal_rows_in_one_share_bounds_the_sample_of_all(monkeypatch):
    monkeypatch.setattr(_sample, "MAX_ROWS", 100)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(190, DIM)).astype(np.float32)
    keys = rng.integers(1, 1 << 64, 190, np.uint64)
    keys[:120], values[:120] = 5, values[0]  # below any bound
    keys[120:130] = np.arange(1, 11, dtype=np.uint64) << 58
    whole, merged = Sample(DIM, "float32", 190), Sample(DIM, "float32", 190)
    whole.add(keys, partial(take_rows, values))
    for part in (slice(0, 130), slice(130, 190)):
        share = Sample(DIM, "float32", None)
        share.add(keys[part], partial(take_rows, values[part]))
        merged.merge(share)
    np.testing.assert_array_equal(merged.take(merged.ranking()).values, whole.take(whole.ranking()).values)


# ---- apply ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_ranks", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_apply_writes_the_folder_of_one_process(folder, fitted, num_ranks):
    arguments = ("apply", fitted, folder / "text", "--noise-std", 0.1, "-o")
    alone(*arguments, folder / "one")
    summary = ok(num_ranks, *arguments, folder / "many")
    assert (summary["files"], summary["rows"], summary["skipped_files"]) == (3, sum(NUM_ROWS), 0)
    assert contents(folder / "many") == contents(folder / "one")


# ---- Failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["fit", "apply"])
def test_a_bad_row_that_one_process_sees_ends_all_in_one_line(folder, fitted, command):
    path = folder / "text" / "part_1.npy"  # the largest goes to the first process, the others to the second
    rows = np.load(path)
    rows[123] = np.nan
    np.save(path, rows)
    if command == "fit":
        line = refused(2, "fit", folder / "text", folder / "image.npy", "-o", folder / "many.safetensors")
        assert not (folder / "many.safetensors").exists()
    else:
        line = refused(2, "apply", fitted, folder / "text", "-o", folder / "many")
        assert not (folder / "many" / "part_1.npy").exists()
    assert line.startswith(f"realign {command}: {path}: row 123 is bad")


def test_what_all_processes_see_is_said_once(folder):
    line = refused(2, "fit", folder / "nothing", folder / "image.npy", "-o", folder / "many.safetensors")
    assert line.endswith("nothing does not exist")


@pytest.fixture
def much(folder, write_shard) -> Path:
    """Return a folder of pickles, which take a while."""
    (folder / "much").mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        write_shard(folder / "much" / f"part_{number}.pkl", rng.normal(size=(15_000, DIM)).astype(np.float32))
    return folder / "much"


def process_of(parent: int, rank: int) -> int:
    """Return the process id of a rank that torchrun has started."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.parametrize(
    ("killed", "num_ranks"),
    [(1, 1), pytest.param(0, 2, marks=pytest.mark.slow), pytest.param(1, 3, marks=pytest.mark.slow)],
)
def test_a_killed_process_ends_all_and_resume_finishes(folder, fitted, much, killed, num_ranks):
    out = folder / "many"
    arguments = ("apply", fitted, much)
    alone(*arguments, "-o", folder / "one")
    job = subprocess.Popen(
        torchrun(2, *arguments, "-o", out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    journals = [out / ".realign-journal", out / ".realign-journal-1"]
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.read_bytes().count(b"\n") > 1 for path in journals):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process_of(job.pid, killed), signal.SIGKILL)
    stdout, stderr = job.communicate(timeout=60)
    assert (job.returncode, stdout) == (1, "")
    assert lines_of(stderr) == [
        "realign apply: another process of this job has ended: start the job again (it goes on with --resume)"
    ]
    assert "realign_fast/" not in stderr
    assert not (out / "realign-manifest.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.pkl")}
    finished = sum(path.read_bytes().count(b"\n") - 1 for path in journals)
    assert 2 <= finished < 12
    if num_ranks == 1:
        alone(*arguments, "-o", out, "--resume")
    else:
        assert ok(num_ranks, *arguments, "-o", out, "--resume")["skipped_files"] == finished
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.pkl")}
    assert sum(after[name] == before[name] for name in before) == finished  # nothing is written twice
    assert contents(out) == contents(folder / "one")


def test_a_part_of_a_journal_counts_for_its_own_job_alone(tmp_path):
    inputs = [{"name": f"{name}.npy", "fingerprint": name} for name in "abc"]
    old, new = (new_head({"side": side}, inputs) for side in ("target", "source"))

    def entry(name):
        shape = {"rows": 1, "dim": 2, "dtype": "float32", "size": 3, "bad_rows": 0}
        return {"name": name, "input": name, "column": None, "xxh64": "", "sidecar": None, **shape}

    first = Journal(tmp_path, Start(new, {"a.npy": entry("a.npy")}, set()))
    Journal(tmp_path, first.start, 1).add(entry("b.npy"))
    Journal(tmp_path, Start(old, {}, set()), 2).add(entry("c.npy"))
    assert list(load(tmp_path).files) == ["a.npy", "b.npy"]
    resumed = Journal(tmp_path, Start(new, load(tmp_path).files, set()))
    assert [path.name for path in tmp_path.iterdir()] == [".realign-journal"]
    assert list(load(tmp_path).files) == ["a.npy", "b.npy"]
    Journal(tmp_path, resumed.start, 1).add(entry("c.npy"))
    resumed.entries |= load(tmp_path).files
    resumed.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["realign-manifest.json"]
    assert list(load(tmp_path).files) == ["a.npy", "b.npy", "c.npy"]


def test_one_process_meets_nobody_and_loads_no_torch(folder):
    code = "import sys; from realign_fast.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "stats", str(folder / "text"), "-o", str(folder / "a.safetensors")]
    alone_under_torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(command, env=os.environ | alone_under_torchrun, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False"
