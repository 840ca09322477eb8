"""The benchmarks' own arithmetic, and that each of them runs to its end."""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Return a function that imports a script of `bench/`."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


MACHINE = {
    "processor": "a, b",
    "cores": 2,
    "memory_gb": 25.3,
    "instruction_set": "avx2",
    "system": "Linux",
    "vector_flags": ["avx", "avx2"],
    "versions": {"numpy": "2.4", "torch": "2.13"},
}


def test_figures_come_back_from_their_file(bench, tmp_path):
    results = bench("_results")
    path = tmp_path / "new" / "figures.csv"
    timed = results.Figure(
        "g", "moments", 'm, "x"', 12.5, "GB/s", 0.01, 0.25, "torch", 0.2, 0.8, 0.9, work=3e9, share=0.5, rows=7, dim=3
    )
    noted = results.Figure("g", "memory", "memory", 100.0, "MB", peer="600 MB", ratio=1 / 6, goal=1.0, at_most=True)
    results.append(path, [timed, noted], "2026-01-01T00:00:00+00:00", MACHINE)
    results.append(path, [timed], "2026-01-02T00:00:00+00:00", MACHINE)
    assert len(path.read_text().splitlines()) == 4
    run = results.last_runs(path)["g"]
    assert run.figures == [timed]
    assert run.machine_line().startswith(
        "a, b, 2 cores, 25 GB, avx2, Linux; numpy 2.4, torch 2.13; 2026-01-02, revision "
    )

    results.append(path, [noted], "2026-01-03T00:00:00+00:00", MACHINE)
    (back,) = results.last_runs(path)["g"].figures
    assert (back.what, back.at_most, back.median_s, back.rows) == ("memory", True, None, None)
    assert math.isclose(back.ratio, 1 / 6, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "goal", "at_most", "peer_s", "missed", "slower"),
    [
        (0.8, 0.9, False, 1.0, True, True),
        (0.95, 0.9, False, 1.0, False, True),
        (1.2, None, False, 1.0, False, False),
        (0.5, 1.0, True, None, False, False),
        (1.1, 1.0, True, None, True, False),
        (None, None, False, None, False, False),
    ],
)
def test_what_lags_is_named(bench, ratio, goal, at_most, peer_s, missed, slower):
    results, tables = bench("_results"), bench("tables")
    figure = results.Figure(
        "g", "k", "what", 1.0, "s", ratio=ratio, goal=goal, at_most=at_most, peer_median_s=peer_s, why="so"
    )
    assert (figure.missed, figure.slower) == (missed, slower)
    named = tables.behind({"g": results.Run("", "", {}, [figure])})[2:]
    assert bool(named) == (missed or slower)
    assert all(line.endswith("| so |") and "**" in line for line in named)


def test_a_comparison_names_only_what_is_surely_slower(bench):
    compare = bench("compare")
    ratio, low, high = compare.interval(np.log([0.8, 0.82, 0.81, 0.79, 0.8]))
    assert low < ratio < high
    assert math.isclose(ratio, 0.804, abs_tol=0.001)
    assert compare.verdict(ratio, low, high) == "SLOWER"
    assert compare.verdict(0.97, 0.95, 0.99) == ""
    assert compare.verdict(0.9, 0.7, 1.1) == ""
    assert compare.verdict(1.2, 1.1, 1.3) == "faster"
    assert compare.interval(np.log([0.5]))[1:] == (0.0, math.inf)


def test_a_plan_adds_up_what_bounds_each_step(bench):
    plan = bench("plan")
    rates = plan.Rates(first_read=10e9, second_read=5e9, apply=4e9, start_fit_s=0.5, start_apply_s=0.25)
    rows, size = 1_000_000, 1000 * 2
    alone = plan.predict(plan.Job(rows, rows // 2, 1000, 2), rates)
    assert [step.bound for step in alone["fit"]] == ["start", *["kernels and memory"] * 3]
    assert math.isclose(sum(step.seconds for step in alone["fit"]), 0.5 + 0.2 + 0.1 + 0.4)
    assert math.isclose(sum(step.seconds for step in alone["apply"]), 0.25 + 0.5)

    job = plan.Job(rows, rows, 1000, 2, machines=2, disk=1e9, network=4e9)
    local = plan.predict(job, rates)
    assert {step.name: step.bound for step in local["fit"]} == {
        "start": "start",
        "text, first read": "disk",
        "images": "disk",
        "text, second read": "disk",
        "sums of all machines": "network",
    }
    assert math.isclose(local["apply"][1].seconds, 2 * rows * size / 2 / 1e9)  # what is written goes to the same disk
    remote = plan.predict(plan.Job(rows, rows, 1000, 2, 2, disk=1e9, network=1e8, remote=True), rates)
    assert {step.bound for step in remote["fit"][1:]} == {"network"}
    assert remote["apply"][1].seconds_by["disk"] == rows * size / 2 / 1e9


def run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    # pytest-benchmark measures nothing in what it takes for one of many processes.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(BENCH.glob("bench_*.py")), ids=lambda path: path.stem)
def test_benchmarks_run(path):
    pytest.importorskip("concept_erasure", reason="needs the extra `peers`")
    recorded = (BENCH / "results" / "figures.csv").read_bytes()
    done = run("-m", "pytest", path, "-q", "--size", "quick", "--unchecked", "-m", "slow or not slow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "figures" in done.stdout
    assert (BENCH / "results" / "figures.csv").read_bytes() == recorded


@pytest.mark.parametrize("passes", [True, False])
def test_no_figure_where_tests_fail(tmp_path, passes):
    (tmp_path / "test_kernel.py").write_text(f"def test_it(): assert {passes}\n")
    (tmp_path / "bench_kernel.py").write_text(
        f"CHECKED_BY = ({str(tmp_path / 'test_kernel.py')!r},)\n"
        "def test_nothing(measure):\n"
        "    nothing = {'as little': lambda: None}\n"
        "    measure('nothing', lambda: None, nothing, unit='GB/s', work=1, limit='copy', rounds=2)\n"
    )
    # What `bench/` has in its conftest comes as a plugin, since the case lies elsewhere.
    code = f"import sys, pytest; sys.path.insert(0, {str(BENCH)!r}); import conftest; "
    code += "sys.exit(pytest.main(sys.argv[1:], [conftest]))"
    done = run("-c", code, tmp_path / "bench_kernel.py", "--size", "quick", "-p", "no:cacheprovider", cwd=tmp_path)
    assert (done.returncode == 0) is passes, done.stdout + done.stderr
    assert ("no figure, since tests of it fail" in done.stdout) is not passes
    assert ("as little" in done.stdout) is passes


@pytest.mark.slow
def test_a_tree_is_compared_with_its_last_revision():
    if not (ROOT / ".git").exists():
        pytest.skip("no repository")
    command = ("--rounds", "2", "--size", "quick", "--unchecked", "-k", "test_threads and moments")
    done = run(BENCH / "compare.py", "HEAD", *command)
    lines = [line for line in done.stdout.splitlines() if "test_threads" in line]
    assert lines, done.stderr
    assert all("x (" in line for line in lines), done.stdout
    assert done.returncode in (0, 1), done.stderr
