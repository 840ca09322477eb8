"""What `plan.py` predicts from a probe of this machine, against what the commands then take."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from plan import Job, commands, predict, probe, write_sides

CHECKED_BY = ("test_cli.py",)
DIM = 768
WHY = "on a machine that shares cores and memory with others, the same command may take twice as long a minute later"
# All of them are for a full run, the middle one for a short one.
COUNTS = [
    pytest.param(count, marks=[] if count == 500_000 else pytest.mark.slow) for count in (200_000, 500_000, 1_000_000)
]


@pytest.fixture
def rates(pick):
    """Of this machine as it is now: it is not the same for long."""
    return probe(Path("/dev/shm"), DIM, "float32", pick(1, 1, 3))


@pytest.mark.parametrize("count", COUNTS)
def test_prediction(measure, pick, rates, count):
    count = min(count, pick(20_000, 1_000_000, 1_000_000))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        write_sides(Path(name), count, DIM, "float32", num_shards=4)
        # The first does not count.
        took = np.median([commands(Path(name)) for _ in range(1 + pick(1, 1, 5))][1:], axis=0)
    steps = predict(Job(count, count, DIM, 4), rates)
    for command, seconds in zip(("fit", "apply"), took, strict=True):
        said = sum(step.seconds for step in steps[command])
        error = abs(said / seconds - 1)
        measure.figure(
            f"plan.py: {command} of {count:,} x {DIM} float32 takes {seconds:.2f} s, predicted",
            said,
            "s",
            "within 15%",
            error / 0.15,
            goal=1.0,
            at_most=True,
            why=WHY,
        )
