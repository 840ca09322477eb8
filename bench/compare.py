"""Compare this tree with another revision: both timed in turn, with an interval for the ratio.

    python bench/compare.py main                 # all cases that take no longer than `make bench`
    python bench/compare.py v0.1.0 -k moments

The other revision is checked out and built in a folder of its own; the benchmarks are those of this tree for both, and
a case that does not run there is left out. In each round every side runs all cases once, in a process of its own; which
goes first alternates. A ratio is time there over time here, its interval that of Student's t on the rounds'
logarithms. A case whose tests fail has no figure. The exit code is 1 where something has become slower by more than 5%.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _intervals import interval as interval_of_mean

ROOT = Path(__file__).parents[1]
SLOWER = 0.05


def build(revision: str, folder: Path) -> None:
    """Check a revision out into `folder` and build its extension there."""
    subprocess.run(["git", "worktree", "add", "--detach", "--quiet", folder, revision], cwd=ROOT, check=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def timed(tree: Path, more: list[str], result: Path, checked: bool) -> dict[str, float]:
    """Run this tree's benchmarks on the package of `tree`; return the median seconds of each case that ran."""
    # The package of the folder goes before an installed one; `-P` keeps the present folder out.
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-P", "-m", "pytest", str(ROOT / "bench"), "-q", "--ours-only"]
    command += [f"--benchmark-json={result}", *([] if checked else ["--unchecked"]), *more]
    subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, check=False)
    if not result.exists():
        return {}
    text = result.read_text()
    result.unlink()
    cases = json.loads(text)["benchmarks"] if text else []
    return {case["fullname"].rpartition("/")[2]: case["stats"]["median"] for case in cases}


def interval(logs: np.ndarray) -> tuple[float, float, float]:
    """Return the ratio and the ends of its 95% interval."""
    mean, low, high = (float(np.exp(value)) for value in interval_of_mean(logs))
    return mean, low, high


def verdict(ratio: float, low: float, high: float) -> str:
    """Say "slower" only where the whole interval says so, and the ratio by more than 5%."""
    if ratio < 1 - SLOWER and high < 1:
        return "SLOWER"
    return "faster" if ratio > 1 + SLOWER and low > 1 else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the other revision")
    parser.add_argument("--rounds", type=int, default=5)
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = folder / "base"
        build(options.base, base)
        try:
            sides = {"here": ROOT, "there": base}
            found: dict[str, dict[str, list[float]]] = {"here": {}, "there": {}}
            for number in range(options.rounds):
                for side in ("here", "there") if number % 2 else ("there", "here"):
                    times = timed(sides[side], more, folder / f"{side}.json", checked=number == 0)
                    print(f"round {number + 1}, {side}: {len(times)} cases", file=sys.stderr, flush=True)
                    for case, seconds in times.items():
                        found[side].setdefault(case, []).append(seconds)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", base], cwd=ROOT, check=True)
    slower = []
    for case, here in found["here"].items():
        there = found["there"].get(case, [])
        if len(here) == len(there) == options.rounds:
            ratio, low, high = interval(np.log(there) - np.log(here))
            said = verdict(ratio, low, high)
            print(f"{case:70} {ratio:6.3f}x ({low:.3f} to {high:.3f}) {said}")
            slower += [case] if said == "SLOWER" else []
        else:
            print(f"{case:70} not compared: it did not run, or its tests fail, on a side")
    if slower:
        sys.exit(f"slower than {options.base} by more than {SLOWER:.0%}: {', '.join(slower)}")
