"""What every benchmark here gets: `measure`, which times it, its peers and this machine's limit in turn.

    pytest bench                          # ten minutes
    pytest bench --size full --record     # what the README shows; adds to results/figures.csv
    pytest bench/bench_kernels.py -k float16

Each case runs in rounds: the peers once each, then what the machine can do at most (a copy, a product), then ours.
So the machine's mood falls on all of them alike. pytest-benchmark holds our times; the table at the end has the rest.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from _results import COLUMNS, FIGURES, Figure, append, cells

import realign_fast
from realign_fast import _C
from realign_fast.backends import count_threads
from realign_fast.benchmark import machine, summarise

T = TypeVar("T")
TESTS = Path(realign_fast.__file__).parents[1] / "tests"  # those of the package that is timed, see compare.py
_PAUSE_S = 0.02  # the threads of the case before look for work for some milliseconds, and hold their cores
_SCALES = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
_PACKAGES = ("scipy", "scikit-learn", "scikit-learn-intelex", "torchmetrics", "concept-erasure", "faiss-cpu", "pot")
_PACKAGES += ("pyarrow", "transformers", "matplotlib")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("realign-fast")
    group.addoption("--size", choices=("quick", "normal", "full"), default="normal", help="quick shows that it runs")
    group.addoption("--record", action="store_true", help="add the figures to results/figures.csv")
    group.addoption("--ours-only", action="store_true", help="without peers and limits: for compare.py")
    group.addoption("--unchecked", action="store_true", help="do not run the tests of the kernels first")
    group.addoption("--folder", type=Path, help="where files are written for the time of a case; default: the usual")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore")  # of the peers
    config.stash[_FOUND] = []


_FOUND = pytest.StashKey[list[Figure]]()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table, and add it to the file where asked."""
    found = config.stash[_FOUND]
    if config.option.ours_only or not found:
        return
    lines = [COLUMNS, *map(cells, found)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    terminalreporter.section("figures")
    for line in lines:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    if config.option.record:
        append(FIGURES, found, datetime.now(UTC).isoformat(timespec="seconds"), machine(_PACKAGES))


@pytest.fixture(scope="session")
def pick(request: pytest.FixtureRequest) -> Callable[[T, T, T], T]:
    """Return a function that chooses among a quick, a normal and a full size."""
    index = ("quick", "normal", "full").index(request.config.option.size)
    return lambda *sizes: sizes[index]


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Return a folder for files of gigabytes, which goes again after the case."""
    with tempfile.TemporaryDirectory(dir=request.config.option.folder) as name:
        yield Path(name)


@pytest.fixture(scope="session")
def tests_pass(request: pytest.FixtureRequest) -> Callable[[tuple[str, ...]], bool]:
    """Return whether tests pass, each of which is run once."""
    known: dict[str, bool] = {}

    def passed(names: tuple[str, ...]) -> bool:
        if new := [name for name in names if name not in known]:
            command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
            command += ["-n", "logical", *(str(TESTS / name) for name in new)]
            pass_all = subprocess.run(command, cwd=TESTS.parent, stdout=subprocess.DEVNULL).returncode == 0
            known.update(dict.fromkeys(new, pass_all))
        return all(known[name] for name in names)

    return passed


class Limits:
    """What this machine can do at most, one call at a time, over memory of its own: made when first asked for."""

    def __init__(self, num_bytes: int, side: int) -> None:
        self._num_bytes, self._side = num_bytes, side
        self._memory: dict[str, Any] = {}
        self._threads = count_threads(None)

    def calls(self, name: str) -> dict[str, tuple[Callable[[], object], float]]:
        """Return by name what to call, and how many bytes or operations that is."""
        if name == "sgemm":
            if "a" not in self._memory:
                a = np.random.default_rng(0).standard_normal((self._side, self._side), np.float32)
                self._memory |= {"a": a, "c": np.empty_like(a)}
            a, c = self._memory["a"], self._memory["c"]
            return {"sgemm": (lambda: np.matmul(a, a, out=c), 2 * float(self._side) ** 3)}
        if "source" not in self._memory:
            source = np.ones(self._num_bytes // 8)
            self._memory |= {"source": source, "target": np.zeros_like(source)}
        source, target, threads = self._memory["source"], self._memory["target"], self._threads
        if name == "read":
            return {"read": (lambda: _C.stream_read(source, threads), float(source.nbytes))}
        return {
            "copy": (lambda: _C.stream_copy(source, target, False, threads), 2.0 * source.nbytes),
            "non-temporal copy": (lambda: _C.stream_copy(source, target, True, threads), 2.0 * source.nbytes),
        }


@pytest.fixture(scope="session")
def limits(pick: Callable[[int, int, int], int]) -> Limits:
    return Limits(pick(1 << 20, 1 << 30, 1 << 30), pick(64, 2048, 2048))


class Measure:
    """Times one thing against others, or notes what was timed elsewhere; see `__call__` and `times`."""

    def __init__(self, benchmark: Any, limits: Limits, group: str, found: list[Figure], config: pytest.Config) -> None:
        self._benchmark, self._limits, self._group, self._found = benchmark, limits, group, found
        self._ours_only, self._quick = config.option.ours_only, config.option.size == "quick"

    def __call__(
        self,
        kernel: str,
        ours: Callable[[], object],
        peers: Mapping[str, Callable[[], object]] | None = None,
        *,
        limit: str = "",
        rounds: int = 5,
        calls: int = 1,
        **about: Any,
    ) -> dict[str, float]:
        """Time `ours` and each of `peers`, in turn, `rounds` times after one that does not count.

        `limit` is "read", "copy" or "sgemm". Short things are run `calls` times a round. `about` is that of `times`.
        Returns the median seconds of the peers.
        """
        rounds = 2 if self._quick else rounds
        others = {} if self._ours_only else dict(peers or {})
        bounds = {} if self._ours_only or not limit else self._limits.calls(limit)
        seconds: dict[str, list[float]] = {name: [] for name in (*others, *bounds)}

        def around() -> None:
            for name, run in others.items():
                seconds[name].append(_timed(run, calls))
            for name, (run, _) in bounds.items():
                seconds[name].append(_timed(run, 1))
            time.sleep(_PAUSE_S)

        def repeated() -> None:
            for _ in range(calls):
                ours()

        self._benchmark.extra_info["calls"] = calls
        self._benchmark.pedantic(
            ours if calls == 1 else repeated, setup=around, rounds=rounds, iterations=1, warmup_rounds=1
        )
        if self._ours_only:
            return {}
        mine = [each / calls for each in self._benchmark.stats.stats.data]
        bests = [work / summarise(seconds[name][1:])["median_s"] for name, (_, work) in bounds.items()]
        return self.times(
            kernel,
            mine,
            {name: seconds[name][1:] for name in others},
            limit=limit,
            best=max(bests, default=0.0),
            **about,
        )

    def times(
        self,
        kernel: str,
        ours: list[float],
        peers: Mapping[str, list[float]] | None = None,
        *,
        unit: str,
        work: float = 0.0,
        limit: str = "",
        best: float = 0.0,
        goals: Mapping[str, float] | None = None,
        why: Mapping[str, str] | None = None,
        dtype: str = "",
        shape: tuple[int, int] | None = None,
        threads: int | None = None,
        note: str = "",
    ) -> dict[str, float]:
        """Note seconds that were taken in turn, and return the medians of the peers.

        `unit` is "GB/s" (`work` in bytes), "GFlop/s" (in operations), "/s" of something else that `work` counts, or one
        of time. `best` is what the machine does at most, of work a second. `goals` are least ratios by peer, `why` says
        by peer what makes ours slower than it or than its goal.
        """
        mine, medians = summarise(ours), {name: summarise(each)["median_s"] for name, each in (peers or {}).items()}
        median = mine["median_s"]
        rows, dim = shape or (None, None)
        size = f"{rows:,} x {dim}" if shape else ""
        figure = Figure(
            self._group,
            kernel,
            ", ".join(part for part in (f"{kernel} {dtype}".strip(), size, note) if part),
            _value(unit, work, median),
            unit,
            mine["spread"],
            median,
            work=work or None,
            work_unit=_work_unit(unit, limit) if work else "",
            limit=limit,
            share=work / median / best if best else None,
            dtype=dtype,
            rows=rows,
            dim=dim,
            threads=threads or count_threads(None),
        )
        for name in medians or ("",):
            against = (
                {} if not name else {"peer": name, "peer_median_s": medians[name], "ratio": medians[name] / median}
            )
            goal, reason = (goals or {}).get(name), (why or {}).get(name, "")
            self._found.append(replace(figure, **against, goal=goal, why=reason))
        return medians

    def figure(self, kernel: str, value: float, unit: str, against: str, ratio: float | None, **more: Any) -> None:
        """Note what is no time: memory, an error, a count; `ratio` is `value` over what it is held against."""
        if not self._ours_only:
            self._found.append(Figure(self._group, kernel, kernel, value, unit, peer=against, ratio=ratio, **more))


def _timed(run: Callable[[], object], calls: int) -> float:
    time.sleep(_PAUSE_S)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _work_unit(unit: str, limit: str) -> str:
    if unit in _SCALES:
        return "operations" if limit == "sgemm" else "bytes"
    return {"GB/s": "bytes", "GFlop/s": "operations"}.get(unit, unit.partition("/")[0])


def _value(unit: str, work: float, seconds: float) -> float:
    if unit in _SCALES:
        return seconds * _SCALES[unit]
    return work / seconds / {"GB/s": 1e9, "GFlop/s": 1e9}.get(unit, 1.0)


@pytest.fixture
def measure(
    request: pytest.FixtureRequest, benchmark: Any, limits: Limits, tests_pass: Callable[[tuple[str, ...]], bool]
) -> Measure:
    """Return what times a case, if the tests pass that its file names in `CHECKED_BY`."""
    config = request.config
    if not config.option.unchecked and not tests_pass(request.module.CHECKED_BY):
        pytest.fail(f"no figure, since tests of it fail: {', '.join(request.module.CHECKED_BY)}", pytrace=False)
    group = request.module.__name__.rpartition(".")[2].removeprefix("bench_")
    return Measure(benchmark, limits, group, config.stash[_FOUND], config)
