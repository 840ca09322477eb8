"""Fits and files that are stopped, lose their disk or their inputs, and go on: what is kept, what is said."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import realign_fast as rf
from realign_fast import _checkpoint, _files, _progress, _sample, _stop
from realign_fast._ranks import Ranks
from realign_fast.alignment import apply_files, gather_moments
from realign_fast.cli import main
from realign_fast.io import sources, writer

DIM = 24
NUM_FILES = 5


@pytest.fixture
def folder(tmp_path, write_shard, monkeypatch) -> Path:
    """Return a folder of shards of text and images, each of several batches; samples are smaller than they."""
    defaults = sources.open_source.__kwdefaults__ | {"batch_bytes": 10_000}
    monkeypatch.setattr(sources.open_source, "__kwdefaults__", defaults)
    monkeypatch.setattr(_sample, "MAX_ROWS", 500)
    rng = np.random.default_rng(0)
    for side in ("text", "image"):
        (tmp_path / side).mkdir()
        for number in range(NUM_FILES):
            suffix = (".npy", ".parquet", ".pkl", ".safetensors", ".arrow")[number]
            rows = (rng.normal(size=(400 + number, DIM)) + (side == "text")).astype(np.float32)
            write_shard(tmp_path / side / f"part_{number}{suffix}", rows)
    return tmp_path


@pytest.fixture
def realign(capsys):
    """Return a function that runs a command and returns its exit code and its stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        code = main([str(argument) for argument in arguments])
        return code, capsys.readouterr().err

    return run


def stopping_at(monkeypatch, number: int, owner=_checkpoint.Checkpoint, name: str = "tick") -> list[int]:
    """Ask this process to end when that function is called for the `number`-th time; return where calls are counted."""
    inner, calls = getattr(owner, name), []

    def call(*arguments):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*arguments)

    monkeypatch.setattr(owner, name, call)
    return calls


def jobs(folder: Path) -> dict[str, tuple]:
    text, image = folder / "text", folder / "image"
    return {
        "fit": ("fit", text, image, "--refine", 2),
        "coral": ("fit", text, image, "--method", "coral", "--refine", 1, "--threads", 1),
        "anchor": ("fit", text, image, "--method", "anchor", "--limit", 1234),
        "skip": ("fit", text, image, "--on-bad-rows", "skip"),
        "stats": ("stats", text),
        "covariance": ("stats", text, "--covariance", "--threads", 2),
    }


# ---- SIGTERM --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fit", "coral", "anchor", "skip", "stats", "covariance"])
def test_a_job_that_is_stopped_again_and_again_has_the_bytes_of_one_that_is_not(folder, realign, name, monkeypatch):
    job = (*jobs(folder)[name], "-o")
    with monkeypatch.context() as patch:
        calls = stopping_at(patch, 0)
        assert realign(*job, folder / "whole.safetensors")[0] == 0
        total = len(calls)
    output, partial = folder / "a.safetensors", folder / ".a.safetensors.partial"
    done, flag = 0, ()
    for number in (3, 1, total // 4, total // 3):
        with monkeypatch.context() as patch:
            calls = stopping_at(patch, number)
            code, err = realign(*job, output, *flag)
        assert code == 143
        said = f"what was read is kept in {partial}, go on with --resume"
        assert err.splitlines()[-1] == f"realign {job[0]}: stopped by SIGTERM: {said}"
        assert sum(line.startswith("realign ") for line in err.splitlines()) == 1
        assert (partial.exists(), output.exists()) == (True, False)
        done += len(calls)
        flag = ("--resume",)
    calls = stopping_at(monkeypatch, 0)
    assert realign(*job, output, "--resume")[0] == 0
    assert output.read_bytes() == (folder / "whole.safetensors").read_bytes()
    # No batch is read twice; the ends of reads are counted too, and batches of what is decoded may be cut anew.
    assert total <= done + len(calls) <= total + 4
    assert not list(folder.glob(".*"))


def test_a_job_stopped_before_it_has_gone_on_loses_nothing(folder, realign, monkeypatch):
    job = (*jobs(folder)["fit"], "-o", folder / "a.safetensors")
    with monkeypatch.context() as patch:
        stopping_at(patch, 75)  # among the fourth read
        assert realign(*job)[0] == 143
    before = (folder / ".a.safetensors.partial").read_bytes()
    assert _files.load_all(folder / ".a.safetensors.partial", "partial")[1]["number"] == 3
    for number in (1, 2, 3):
        with monkeypatch.context() as patch:
            stopping_at(patch, number, _checkpoint.Checkpoint, "replay")
            code, err = realign(*job, "--resume")
        assert code == 143
        assert "go on with --resume" in err.splitlines()[-1]
        assert (folder / ".a.safetensors.partial").read_bytes() == before
    assert realign(*job, "--resume")[0] == 0
    assert realign(*jobs(folder)["fit"], "-o", folder / "b.safetensors")[0] == 0
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_job_stopped_between_reads_keeps_those_that_are_finished(folder, realign, monkeypatch, number):
    job = (*jobs(folder)["fit"], "-o", folder / "a.safetensors")
    with monkeypatch.context() as patch:
        stopping_at(patch, number, _checkpoint.Checkpoint, "finish")
        code, err = realign(*job)
    assert (code, "go on with --resume" in err.splitlines()[-1]) == (143, True)
    with monkeypatch.context() as patch:
        calls = stopping_at(patch, 0)
        assert realign(*job, "--resume")[0] == 0
        resumed = len(calls)
        assert realign(*job)[0] == 0
    assert 0 < resumed < len(calls) - resumed


def test_a_job_stopped_before_its_first_batch_says_to_start_again(folder, realign, monkeypatch):
    stopping_at(monkeypatch, 1, _checkpoint.Checkpoint, "_open")
    code, err = realign("stats", folder / "text", "-o", folder / "a.safetensors")
    assert (code, err.splitlines()[-1]) == (143, "realign stats: stopped by SIGTERM: start it again")
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("command", ["apply", "convert"])
def test_files_that_are_finished_when_a_job_is_stopped_stay(folder, realign, command, monkeypatch):
    rf.fit(folder / "text", folder / "image").save(folder / "a.safetensors")
    job = ("convert", folder / "text", "--format", "npy")
    if command == "apply":
        job = ("apply", folder / "a.safetensors", folder / "text")
    assert realign(*job, "-o", folder / "whole")[0] == 0
    with monkeypatch.context() as patch:
        stopping_at(patch, 3, writer._Run, "advance")
        code, err = realign(*job, "-o", folder / "out")
    said = f"finished files are kept in {folder / 'out'}, go on with --resume"
    assert (code, err.splitlines()[-1]) == (143, f"realign {command}: stopped by SIGTERM: {said}")
    left = {path.name for path in (folder / "out").iterdir()}
    assert ".realign-journal" in left
    assert not [name for name in left if ".tmp" in name]
    assert not left & {"part_4.npy", "part_4.arrow", "realign-manifest.json"}
    assert realign(*job, "-o", folder / "out", "--resume")[0] == 0
    whole = {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == whole


def test_the_handler_is_that_of_before_once_a_command_is_done(folder, realign):
    before = signal.getsignal(signal.SIGTERM)
    assert realign("stats", folder / "text", "-o", folder / "a.safetensors")[0] == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_nothing_handles_signals():
    def run() -> None:
        with _stop.stoppable():
            seen.append(signal.getsignal(signal.SIGTERM))

    seen: list[object] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_what_is_held_together_is_not_torn_apart():
    done = []

    def work() -> None:
        with _stop.holding():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("first")
            with _stop.holding():
                done.append("second")
            done.append("third")
        done.append("never")

    with _stop.stoppable(), pytest.raises(_stop.Stopped):
        work()
    assert done == ["first", "second", "third"]


# ---- What is kept ---------------------------------------------------------------------------------------------------


def test_nothing_is_written_before_the_first_interval(folder, realign, monkeypatch):
    kinds, inner = [], _files.save
    monkeypatch.setattr(_files, "save", lambda path, kind, *a, **k: kinds.append(kind) or inner(path, kind, *a, **k))
    assert realign(*jobs(folder)["fit"], "-o", folder / "a.safetensors")[0] == 0
    assert kinds == ["alignment"]


def test_no_write_costs_more_than_a_part_of_the_time(folder, realign, monkeypatch):
    kinds, inner = [], _files.save
    monkeypatch.setattr(_files, "save", lambda path, kind, *a, **k: kinds.append(kind) or inner(path, kind, *a, **k))
    monkeypatch.setattr(_checkpoint, "INTERVAL", 0)
    monkeypatch.setattr(_checkpoint, "_PATIENCE", 1e6)
    assert realign(*jobs(folder)["stats"], "-o", folder / "a.safetensors")[0] == 0
    assert kinds == ["partial", "partial", "moments"]  # at the first batch, and at the end of the read


@pytest.fixture
def stopped(folder, realign, monkeypatch) -> tuple:
    """Return a fit of text and images that was stopped among its first text, less the flags of its output."""
    job = jobs(folder)["fit"]
    with monkeypatch.context() as patch:
        stopping_at(patch, 30)
        assert realign(*job, "-o", folder / "a.safetensors")[0] == 143
    return job


def test_files_that_are_done_are_not_read_again(folder, stopped, realign, monkeypatch):
    opened, inner = [], sources.chunks_from
    monkeypatch.setattr(sources, "chunks_from", lambda shard, *a: opened.append(shard.path) or inner(shard, *a))
    assert realign(*stopped, "-o", folder / "a.safetensors", "--resume")[0] == 0
    assert {path.parent.name for path in opened} == {"text"}  # all of the images were done
    names = [path.name for path in opened]
    assert names[-NUM_FILES:] == [path.name for path in sorted((folder / "text").iterdir())]
    assert len(names) < 4 * NUM_FILES


def test_without_resume_what_was_kept_is_replaced(folder, stopped, realign):
    assert realign(*stopped, "-o", folder / "a.safetensors")[0] == 0
    assert realign(*stopped, "-o", folder / "b.safetensors")[0] == 0
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()
    assert not list(folder.glob(".*"))


def test_resuming_what_was_not_begun_says_so_and_begins(folder, realign):
    code, err = realign("stats", folder / "text", "-o", folder / "a.safetensors", "--resume")
    assert code == 0
    partial = folder / ".a.safetensors.partial"
    assert err.splitlines()[0] == f"there is no {partial} to go on from: stats begins at the start"


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


CHANGES = {
    "options": (None, ("--refine", 3), "options was {'refine': 2}, now it is {'refine': 3}"),
    "method": (None, ("--method", "coral"), "method was 'realign', now it is 'coral'"),
    "policy": (None, ("--on-bad-rows", "skip"), "on_bad_rows was 'raise', now it is 'skip'"),
    "limit": (None, ("--limit", 9), "limit was None, now it is 9"),
    "encoder": (None, ("--encoder", "clip"), "encoder was None, now it is 'clip'"),
    "touched": (lambda folder: touch(folder / "text" / "part_0.npy"), (), "of text, part_0.npy has changed"),
    "one less": (lambda folder: (folder / "image" / "part_4.arrow").unlink(), (), "image had 5 files, now it has 4"),
    "renamed": (
        lambda folder: (folder / "text" / "part_0.npy").rename(folder / "text" / "part_00.npy"),
        (),
        "of text, part_0.npy is now part_00.npy",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_kept_of_another_job_is_refused(folder, stopped, realign, change):
    act, flags, message = CHANGES[change]
    partial = folder / ".a.safetensors.partial"
    before = partial.read_bytes()
    if act is not None:
        act(folder)
    code, err = realign(*stopped, *flags, "-o", folder / "a.safetensors", "--resume")
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith(f"realign fit: {partial} ")
    assert message in line
    assert partial.read_bytes() == before


def test_what_is_no_checkpoint_is_refused(folder, stopped, realign):
    partial = folder / ".a.safetensors.partial"
    data = partial.read_bytes()
    tensors, fields = _files.load_all(partial, "partial")

    def refused(says: str) -> None:
        code, err = realign(*stopped, "-o", folder / "a.safetensors", "--resume")
        (line,) = err.splitlines()
        assert (code, str(partial) in line, says in line) == (1, True, True), line

    for damaged in (b"", data[:50], data[:-1]):
        partial.write_bytes(damaged)
        refused("damaged")
    rf.Moments(DIM).save(partial)
    refused("holds 'moments', expected 'partial'")
    own = {name: value for name, value in fields.items() if name not in ("format", "kind", "package")}
    for name, other in (
        ("token", 7), ("number", 9), ("size", None), ("finished", 3), ("read", []), ("map", None), ("inputs", 1),
    ):  # fmt: skip
        _files.save(partial, "partial", tensors, own | {name: other})
        refused("damaged")
    for name, tensor in tensors.items():
        _files.save(partial, "partial", {key: each for key, each in tensors.items() if key != name}, own)
        refused("damaged")
        if tensor.size and name.split(".")[1] not in ("rows", "keys"):
            _files.save(partial, "partial", tensors | {name: np.full_like(tensor, -(1 << 62))}, own)
            refused("damaged")


def test_sets_in_memory_are_not_kept_and_not_resumed(folder):
    rows = np.random.default_rng(0).normal(size=(100, DIM))
    with pytest.raises(ValueError, match="resume: text lies in memory, and such a read is not kept"):
        rf.fit(rows, folder / "image", output=folder / "a.safetensors", resume=True)
    with pytest.raises(ValueError, match="resume needs an output"):
        gather_moments(folder / "text", resume=True)
    alignment = rf.fit(rows, folder / "image", output=folder / "a.safetensors")
    assert rf.Alignment.load(folder / "a.safetensors").fingerprint == alignment.fingerprint


def test_rows_that_were_all_left_out_leave_no_pilot():
    """One that was kept would give other bits."""
    moments = rf.Moments(3, covariance=True).update(np.full((4, 3), np.nan), on_bad_rows="skip")
    again = rf.Moments.of_state("state", *moments.state())
    rows = np.random.default_rng(0).normal(size=(50, 3))
    assert again.update(rows) == moments.update(rows)
    assert again.num_skipped == 4


def test_rests_of_a_write_that_was_killed_are_removed(folder, realign):
    for name in ("..a.safetensors.partial.0123abcd.tmp", "..a.safetensors.partial-3.0123abcd.tmp"):
        (folder / name).write_bytes(b"half")
    (folder / "..b.safetensors.partial.0123abcd.tmp").write_bytes(b"another's")
    assert realign("stats", folder / "text", "-o", folder / "a.safetensors")[0] == 0
    assert [path.name for path in folder.glob(".*")] == ["..b.safetensors.partial.0123abcd.tmp"]


# ---- Full disks -----------------------------------------------------------------------------------------------------


def test_a_disk_too_full_for_what_was_read_is_said_once_and_the_fit_goes_on(folder, realign, monkeypatch):
    inner = _files.replacing

    def full(path):
        if path.name.endswith(".partial"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return inner(path)

    monkeypatch.setattr(_files, "replacing", full)
    monkeypatch.setattr(_checkpoint, "INTERVAL", 0)
    code, err = realign(*jobs(folder)["fit"], "-o", folder / "a.safetensors")
    assert code == 0
    assert [line for line in err.splitlines() if "No space left" in line] == [
        f"what is read is not kept: [Errno 28] No space left on device: '{folder / '.a.safetensors.partial'}'"
    ]


LIMITED = """
import resource, sys
from realign_fast import _checkpoint
_checkpoint.INTERVAL = 0
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from realign_fast.cli import main
sys.exit(main(sys.argv[2:]))
"""


def test_an_alignment_that_does_not_fit_on_the_disk_leaves_nothing_half_written(folder):
    if resource.getrlimit(resource.RLIMIT_FSIZE)[1] != resource.RLIM_INFINITY:
        pytest.skip("files have a limit here already")
    output = folder / "a.safetensors"
    command = [sys.executable, "-c", LIMITED, "1000", *map(str, jobs(folder)["fit"]), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"realign fit: [Errno 27] File too large: '{output}'"
    assert not list(folder.glob("*.safetensors"))
    assert not list(folder.glob(".*"))


@pytest.fixture
def disk(tmp_path):
    """Return a disk of 100 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can have a disk of its own")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_fit_on_a_full_disk_ends_in_one_line_and_goes_on_where_there_is_room(folder, disk, realign, monkeypatch):
    job = (*jobs(folder)["fit"], "-o", disk / "a.safetensors")
    assert realign(*job[:-1], folder / "a.safetensors")[0] == 0
    expected = (folder / "a.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(_checkpoint, "INTERVAL", 0)
        patch.setattr(_checkpoint, "_PATIENCE", 0)
        stopping_at(patch, 3)  # what is kept then fits
        assert realign(*job)[0] == 143
    kept = (disk / ".a.safetensors.partial").read_bytes()
    filler = disk / "filler"
    filler.write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    full = f"[Errno 28] No space left on device: '{disk / '.a.safetensors.partial'}'"
    with monkeypatch.context() as patch:
        stopping_at(patch, 2)
        code, err = realign(*job, "--resume")
    said = f"what was read could not be kept ({full}), go on with --resume from what was kept before"
    assert (code, err.splitlines()[-1]) == (143, f"realign fit: stopped by SIGTERM: {said}")
    code, err = realign(*job, "--resume")
    assert code == 1
    assert err.splitlines()[-1] == f"realign fit: [Errno 28] No space left on device: '{disk / 'a.safetensors'}'"
    assert {path.name for path in disk.iterdir()} == {"filler", ".a.safetensors.partial"}
    assert (disk / ".a.safetensors.partial").read_bytes() == kept
    filler.unlink()
    assert realign(*job, "--resume")[0] == 0
    assert (disk / "a.safetensors").read_bytes() == expected


def test_an_apply_on_a_full_disk_ends_in_one_line_and_goes_on_where_there_is_room(folder, disk, realign, monkeypatch):
    rf.fit(folder / "text", folder / "image").save(folder / "a.safetensors")
    job = ("apply", folder / "a.safetensors", folder / "text", "-o")
    assert realign(*job, folder / "whole")[0] == 0
    monkeypatch.setattr(writer, "_check_space", lambda *_: None)  # as where another fills it meanwhile
    code, err = realign(*job, disk / "out")
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("realign")]
    assert line.startswith(f"realign apply: [Errno 28] No space left on device: '{disk / 'out'}")
    assert not [path for path in (disk / "out").iterdir() if ".tmp" in path.name]
    whole = {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}
    for path in (disk / "out").glob("part_*"):
        assert path.read_bytes() == whole[path.name]
    subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
    assert realign(*job, disk / "out", "--resume")[0] == 0
    assert {path.name: path.read_bytes() for path in (disk / "out").iterdir()} == whole


# ---- Files that change ----------------------------------------------------------------------------------------------


def test_a_file_that_changes_while_a_fit_reads_it_is_named(folder, realign, monkeypatch):
    path, calls = folder / "text" / "part_0.npy", []
    inner = _checkpoint.Checkpoint.tick

    def tick(checkpoint):
        calls.append(1)
        if len(calls) == 25:  # long after the images
            rows = np.load(path)
            np.save(path, rows[::-1])
        return inner(checkpoint)

    monkeypatch.setattr(_checkpoint.Checkpoint, "tick", tick)
    code, err = realign(*jobs(folder)["fit"], "-o", folder / "a.safetensors")
    assert code == 1
    assert err.splitlines()[-1].startswith(f"realign fit: {path} has changed while it was read")
    assert not (folder / "a.safetensors").exists()


@pytest.mark.parametrize("name", ["part_0.npy", "part_1.parquet", "part_2.pkl", "part_4.arrow"])
def test_a_file_that_changes_while_it_is_rewritten_is_named(folder, name, monkeypatch):
    alignment = rf.fit(folder / "text", folder / "image")
    path, inner = folder / "text" / name, writer._Lane._map

    def changing(lane, output, *arguments):
        inner(lane, output, *arguments)
        if output.target.source == path:
            touch(path)

    monkeypatch.setattr(writer._Lane, "_map", changing)
    with pytest.raises(ValueError, match=rf"{name} has changed since the job began"):
        apply_files(alignment, folder / "text", folder / "out")
    assert not (folder / "out" / name).exists()
    assert not [each for each in (folder / "out").iterdir() if ".tmp" in each.name]


# ---- Progress -------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose only element is the time."""
    now = [0.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    return now


def test_rows_done_before_are_no_part_of_the_rate(capsys, clock):
    with _progress.progress("read", 1000, 500) as advance:
        clock[0] = 20.0
        advance(100)
    assert capsys.readouterr().err == "read: 600 of 1,000 rows, 5.0 rows/s, 80 s left\n"


def test_without_a_total_no_time_is_left(capsys, clock):
    with _progress.progress("read", None, 500) as advance:
        clock[0] = 20.0
        advance(1000)
    assert capsys.readouterr().err == "read: 1,500 rows, 50 rows/s\n"


def test_a_line_is_one_write(monkeypatch, clock):
    """Processes share stderr: what Python writes in two parts, where it does not buffer, has another's line between."""
    written = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, isatty=lambda: False))
    with _progress.progress("read", 1000) as advance:
        clock[0] = 20.0
        advance(1000)
    assert main(["stats", "nowhere", "-o", "moments.safetensors"]) == 1
    assert [text[:7] for text in written] == ["read: 1", "realign"]
    assert all(text.index("\n") == len(text) - 1 for text in written)


def test_a_bar_begins_where_the_last_run_ended(monkeypatch):
    made = []

    class Bar:
        def __init__(self, **options):
            made.append(options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("tqdm.tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with _progress.progress("read", 1000, 500):
        pass
    assert (made[0]["total"], made[0]["initial"], made[0]["desc"]) == (1000, 500, "read")


def test_a_resumed_fit_counts_what_was_done_and_names_its_reads(folder, stopped, realign, monkeypatch):
    shown = []
    inner = _progress.progress

    def show(description, total, initial=0, **options):
        shown.append((description, total, initial))
        return inner(description, total, initial, **options)

    monkeypatch.setattr("realign_fast._reader.show_progress", show)
    assert realign(*stopped, "-o", folder / "a.safetensors", "--resume")[0] == 0
    first, *others = shown
    assert first[0] == "read text (2 of 5)"
    assert first[2] > 0
    assert [(name, initial) for name, _, initial in others if name != "read sample"] == [
        (f"read text ({number} of 5)", 0) for number in (3, 4, 5)
    ]


def test_a_resumed_apply_counts_what_was_done(folder, monkeypatch, capsys):
    alignment = rf.fit(folder / "text", folder / "image")
    (folder / "text" / "part_2.pkl").unlink()  # pickles do not say how many rows they have
    apply_files(alignment, folder / "text", folder / "out")
    manifest = json.loads((folder / "out" / "realign-manifest.json").read_text())
    files = manifest.pop("files")
    lines = [json.dumps(line) + "\n" for line in ({**manifest, "former": []}, *files[:2])]
    (folder / "out" / "realign-manifest.json").unlink()
    (folder / "out" / ".realign-journal").write_text("".join(lines))
    shown = []
    monkeypatch.setattr(
        "realign_fast.alignment.show_progress",
        lambda *arguments: shown.append(arguments) or _progress.progress(*arguments),
    )
    capsys.readouterr()
    apply_files(alignment, folder / "text", folder / "out", resume=True, progress=True)
    done = 400 + 401
    assert shown == [("apply", done + 403 + 404, done)]


class OneOfTwo(Ranks):
    """The first of two processes, the other of which reads nothing."""

    size = 2


def test_the_first_of_several_processes_says_that_it_shows_its_share(folder, capsys):
    gather_moments(folder / "text" / "part_0.npy", progress=True, ranks=OneOfTwo())
    apply_files(
        rf.fit(folder / "text", folder / "image"),
        folder / "text" / "part_0.npy",
        folder / "out",
        progress=True,
        ranks=OneOfTwo(),
    )
    err = capsys.readouterr().err
    assert "read data, share 1 of 2: 400 of 400 rows, " in err
    assert "apply, share 1 of 2: 400 of 400 rows, " in err
