"""Jobs that are killed at any moment and resumed: the bytes of an undisturbed run, every time.

The moments are told by what a job has done and not by a clock: each batch leaves a mark in a file, and the kill comes a
little after a mark drawn among all that an undisturbed run leaves.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from realign_fast.cli import main
from realign_fast.io.writer import verify

DIM = 24
# The intervals between writes are shorter than a batch takes, and samples small, so that each is quick.
DRIVER = """
import os, sys, time
from realign_fast import _checkpoint, _sample, cli
from realign_fast.io import writer
_checkpoint.INTERVAL, _checkpoint._PATIENCE = float(sys.argv[2]), 0
_sample.MAX_ROWS = 4000
marks = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def marked(owner, name):
    inner = getattr(owner, name)
    def call(*arguments):
        os.write(marks, b".")
        time.sleep(float(sys.argv[3]))
        return inner(*arguments)
    setattr(owner, name, call)
marked(_checkpoint.Checkpoint, "tick")
marked(writer._Run, "advance")
sys.exit(cli.main(sys.argv[4:]))
"""


class Job:
    """A command that leaves marks, in one process or in several."""

    def __init__(
        self, folder: Path, *arguments: object, num_ranks: int = 1, interval: float = 0, pause: float = 0
    ) -> None:
        self.marks = folder / f"marks-{os.urandom(4).hex()}"
        driver = folder / "driver.py"
        driver.write_text(DRIVER)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        command = [sys.executable, *(launcher if num_ranks > 1 else []), driver]
        command += [self.marks, interval, pause, *arguments]
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    @property
    def num_marks(self) -> int:
        return self.marks.stat().st_size if self.marks.exists() else 0

    def wait_for(self, num_marks: int) -> None:
        """Return once it has left so many marks, or has ended."""
        deadline = time.monotonic() + 100
        while self.num_marks < num_marks and self.process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.0002)

    def ranks(self) -> list[int]:
        """Return the process ids of its ranks, by number."""
        parent = self.process.pid
        found = {}
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    found[int(entry[5:])] = int(child)
        return [found[rank] for rank in sorted(found)]

    def kill(self) -> None:
        """Kill all of it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for rank in self._left():
            os.kill(rank, signal.SIGKILL)
        self.process.communicate(timeout=60)

    def _left(self) -> list[int]:
        """Return the ranks, which torchrun gives sessions of their own, that are alive."""
        return [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if str(self.marks).encode() in _contents(path)
        ]

    def end(self) -> tuple[int, str, str]:
        """Return its exit code, its stdout and its stderr."""
        stdout, stderr = self.process.communicate(timeout=100)
        return self.process.returncode, stdout, stderr

    def done(self) -> dict:
        """Return its summary; it must succeed."""
        code, stdout, stderr = self.end()
        assert code == 0, stderr
        return json.loads(stdout.splitlines()[-1])


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_shard) -> Path:
    """Return a folder of shards of all kinds, some of several batches, and an alignment."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for side, num_files in (("text", 12), ("image", 6)):
        (folder / side).mkdir()
        for number in range(num_files):
            suffix = (".npy", ".parquet", ".npy", ".pkl", ".safetensors", ".arrow")[number % 6]
            count = 110_000 if number % 3 == 0 and suffix == ".npy" else 3000 + 100 * number
            rows = (rng.normal(size=(count, DIM)) + (side == "text")).astype(np.float32)
            ids = None if suffix in (".npy", ".safetensors") else [f"{side}{number}_{row}" for row in range(count)]
            write_shard(folder / side / f"part_{number}{suffix}", rows, ids)
    return folder


@pytest.fixture(scope="module")
def marks_of_fit(data) -> int:
    """Return how many marks a fit leaves, whose alignment is then among the data."""
    job = Job(data, "fit", data / "text", data / "image", "--refine", 1, "-o", data / "a.safetensors")
    job.done()
    assert not list(data.glob(".*"))
    assert job.num_marks >= 6 + 3 * 12
    return job.num_marks


# ---- apply ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def marks_of_apply(data, marks_of_fit) -> int:
    job = Job(data, "apply", data / "a.safetensors", data / "text", "-o", data / "out")
    job.done()
    assert job.num_marks >= 12
    return job.num_marks


def seeds(num_quick: int, num_all: int) -> list:
    return [seed if seed < num_quick else pytest.param(seed, marks=pytest.mark.slow) for seed in range(num_all)]


@pytest.mark.parametrize("seed", seeds(3, 30))
def test_a_killed_apply_goes_on_to_the_same_bytes(data, tmp_path, marks_of_apply, seed, record_property):
    record_property("kills of apply", 1)
    rng = random.Random(seed)
    arguments = ("apply", data / "a.safetensors", data / "text", "-o", tmp_path / "out")
    job = Job(tmp_path, *arguments)
    job.wait_for(rng.randint(1, marks_of_apply))
    time.sleep(rng.uniform(0, 0.002))
    job.kill()
    expected = contents(data / "out")
    for path in (tmp_path / "out").glob("part_*"):  # a name is only given to whole files
        assert path.read_bytes() == expected[path.name]
    assert main(list(map(str, (*arguments, "--resume")))) == 0
    assert contents(tmp_path / "out") == expected
    assert verify(tmp_path / "out")["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_an_apply_of_two_ranks_killed_again_and_again_goes_on_to_the_same_bytes(
    data, tmp_path, marks_of_apply, seed, record_property
):
    record_property("kills of apply", 5)
    rng = random.Random(seed)
    arguments = ("apply", data / "a.safetensors", data / "text", "-o", tmp_path / "out")
    left, resume = marks_of_apply, ()
    for number in range(5):
        job = Job(tmp_path, *arguments, *resume, num_ranks=2)
        job.wait_for(rng.randint(1, max(1, left // 2)))
        time.sleep(rng.uniform(0, 0.002))
        killed = rng.choice(("one", "all"))
        ranks = job.ranks() if job.process.poll() is None else []
        if killed == "one" and len(ranks) == 2:
            os.kill(rng.choice(ranks), signal.SIGKILL)
            code, _, _ = job.end()
            assert code in (0, 1)
        else:
            job.kill()
        left -= job.num_marks
        resume = ("--resume",) if (tmp_path / "out").exists() else ()
        assert number or resume
    Job(tmp_path, *arguments, *resume, num_ranks=2).done()
    assert contents(tmp_path / "out") == contents(data / "out")


# ---- fit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", seeds(3, 16))
def test_a_killed_fit_goes_on_to_the_same_bytes(data, tmp_path, marks_of_fit, seed, record_property):
    record_property("kills of fit", 1)
    rng = random.Random(seed)
    arguments = ("fit", data / "text", data / "image", "--refine", 1, "-o", tmp_path / "a.safetensors")
    job = Job(tmp_path, *arguments)
    job.wait_for(rng.randint(1, marks_of_fit))
    time.sleep(rng.uniform(0, 0.004))
    job.kill()
    if not (tmp_path / "a.safetensors").exists():
        assert (tmp_path / ".a.safetensors.partial").exists() or job.num_marks < 3
    resumed = Job(tmp_path, *arguments, "--resume")
    resumed.done()
    assert (tmp_path / "a.safetensors").read_bytes() == (data / "a.safetensors").read_bytes()
    # The batch under way, one that it had not yet kept, and those of pickles that are decoded in other parts.
    assert resumed.num_marks <= marks_of_fit - job.num_marks + 3
    assert {path.name for path in tmp_path.glob(".*")} == set()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_fit_of_ranks_killed_again_and_again_goes_on_to_the_same_bytes(
    data, tmp_path, marks_of_fit, seed, record_property
):
    """Each time by another number of processes: 2, 1, 3, 2."""
    record_property("kills of fit", 4)
    rng = random.Random(seed)
    arguments = ("fit", data / "text", data / "image", "--refine", 1, "-o", tmp_path / "a.safetensors", "--resume")
    done = 0
    for num_ranks in (2, 1, 3, 2):
        job = Job(tmp_path, *arguments, num_ranks=num_ranks)
        job.wait_for(rng.randint(4, max(5, marks_of_fit // 4)))
        ranks = job.ranks() if num_ranks > 1 and job.process.poll() is None else []
        if len(ranks) > 1 and rng.random() < 0.5:
            os.kill(rng.choice(ranks), signal.SIGKILL)
            assert job.end()[0] == 1
        else:
            job.kill()
        done += job.num_marks
    last = Job(tmp_path, *arguments, num_ranks=2)
    last.done()
    assert (tmp_path / "a.safetensors").read_bytes() == (data / "a.safetensors").read_bytes()
    assert not list(tmp_path.glob(".*"))


# ---- SIGTERM --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", ["fit", "apply"])
def test_a_job_that_is_asked_to_end_says_so_once_and_goes_on(
    data, tmp_path, marks_of_fit, marks_of_apply, command, num_ranks
):
    """Of several ranks torchrun is asked: the same signal as that of a rank that was lost, but not the same line."""
    output = tmp_path / "a.safetensors"
    arguments = ("fit", data / "text", data / "image", "--refine", 1, "-o", output)
    if command == "apply":
        arguments = ("apply", data / "a.safetensors", data / "text", "-o", output)
    job = Job(tmp_path, *arguments, num_ranks=num_ranks, interval=1e6, pause=0.05 * num_ranks)
    job.wait_for(4)
    job.process.send_signal(signal.SIGTERM)
    code, stdout, stderr = job.end()
    assert stdout == ""
    assert code == 143 if num_ranks == 1 else code != 0
    lines = [line for line in stderr.splitlines() if line.startswith("realign ")]
    where = tmp_path / ".a.safetensors.partial" if command == "fit" else output
    what = "what was read is" if command == "fit" else "finished files are"
    assert lines == [f"realign {command}: stopped by SIGTERM: {what} kept in {where}, go on with --resume"], stderr
    assert "realign_fast/" not in stderr
    resumed = Job(tmp_path, *arguments, "--resume", num_ranks=num_ranks)
    resumed.done()
    if command == "fit":
        assert output.read_bytes() == (data / "a.safetensors").read_bytes()
        assert resumed.num_marks <= marks_of_fit - job.num_marks + 3 * num_ranks
    else:
        assert contents(output) == contents(data / "out")


@pytest.mark.slow
def test_a_fit_that_loses_a_rank_says_so_and_keeps_what_the_others_have_read(data, tmp_path, marks_of_fit):
    arguments = ("fit", data / "text", data / "image", "--refine", 1, "-o", tmp_path / "a.safetensors")
    job = Job(tmp_path, *arguments, num_ranks=3, interval=1e6, pause=0.1)
    job.wait_for(marks_of_fit // 2)  # by then each of them has finished a read
    os.kill(job.ranks()[2], signal.SIGKILL)
    code, _, stderr = job.end()
    lines = [line for line in stderr.splitlines() if line.startswith("realign ")]
    said = "another process of this job has ended: start the job again (it goes on with --resume)"
    assert (code, lines) == (1, [f"realign fit: {said}"])
    assert (tmp_path / ".a.safetensors.partial").exists()
    Job(tmp_path, *arguments, "--resume", num_ranks=2).done()
    assert (tmp_path / "a.safetensors").read_bytes() == (data / "a.safetensors").read_bytes()


@pytest.mark.slow
def test_covariances_have_the_same_bits_where_as_many_ranks_go_on(data, tmp_path):
    arguments = ("fit", data / "text", data / "image", "--method", "coral", "--threads", 1, "-o")
    Job(tmp_path, *arguments, tmp_path / "whole.safetensors", num_ranks=2).done()
    job = Job(tmp_path, *arguments, tmp_path / "a.safetensors", num_ranks=2)
    job.wait_for(12)
    os.kill(job.ranks()[0], signal.SIGKILL)
    job.end()
    Job(tmp_path, *arguments, tmp_path / "a.safetensors", "--resume", num_ranks=2).done()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
