"""A figure, the file that figures are added to, and how they are written for people.

`results/figures.csv` is only ever added to: a line a figure, with the machine it was measured on. What is shown of a
group (a file of benchmarks) are the figures of its last run.
"""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "bench" / "results" / "figures.csv"
MACHINE = ("processor", "cores", "memory_gb", "instruction_set", "system", "vector_flags", "versions")


@dataclass(frozen=True)
class Figure:
    """What was measured of one thing against one other.

    `value` is in `unit`; `ratio` is how many times as fast as the peer (of what is no time: the value over what it is
    held against), and `goal` what it should reach, or `at_most` be. `share` is the speed over that of this machine at
    `limit`, measured in the same rounds.
    """

    group: str
    kernel: str
    what: str
    value: float
    unit: str
    spread: float = 0.0
    median_s: float | None = None
    peer: str = ""
    peer_median_s: float | None = None
    ratio: float | None = None
    goal: float | None = None
    at_most: bool = False
    work: float | None = None
    work_unit: str = ""
    limit: str = ""
    share: float | None = None
    dtype: str = ""
    rows: int | None = None
    dim: int | None = None
    threads: int | None = None
    why: str = ""

    @property
    def missed(self) -> bool:
        if self.ratio is None or self.goal is None:
            return False
        return self.ratio > self.goal if self.at_most else self.ratio < self.goal

    @property
    def slower(self) -> bool:
        """Whether a peer takes less time, by more than ours varies."""
        return self.peer_median_s is not None and self.ratio is not None and self.ratio < 1 - self.spread


def revision() -> str:
    """Return the commit, with a "+" where files differ from it."""
    named = subprocess.run(
        ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return named.stdout.strip() or "unknown"


def append(path: Path, figures: Iterable[Figure], time: str, machine: dict[str, Any]) -> None:
    """Add figures of one run to a file that is made where there is none."""
    stamp = {"time": time, "revision": revision()}
    on = {name: machine[name] for name in MACHINE}
    on["vector_flags"] = " ".join(machine["vector_flags"])
    on["versions"] = named_versions(machine)
    lines = [stamp | asdict(figure) | on for figure in figures]
    names = [*stamp, *(field.name for field in fields(Figure)), *MACHINE]
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({name: _text(value) for name, value in line.items()} for line in lines)


def named_versions(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in machine["versions"].items())


def machine_line(on: dict[str, Any]) -> str:
    """Return a machine in words, its versions given in words too."""
    memory = f"{float(on['memory_gb']):.0f} GB"
    parts = [on["processor"], f"{on['cores']} cores", memory, on["instruction_set"], on["system"]]
    return f"{', '.join(parts)}; {on['versions']}"


def _text(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Run:
    """The figures of a group from its last run, and the machine they are of."""

    time: str
    revision: str
    machine: dict[str, str]
    figures: list[Figure]

    def machine_line(self) -> str:
        return f"{machine_line(self.machine)}; {self.time[:10]}, revision {self.revision}."


def last_runs(path: Path = FIGURES) -> dict[str, Run]:
    """Return the last run of each group."""
    found: dict[str, Run] = {}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            group, time = line["group"], line["time"]
            if group not in found or found[group].time != time:
                found[group] = Run(time, line["revision"], {name: line[name] for name in MACHINE}, [])
            found[group].figures.append(Figure(**{field.name: _value(field, line) for field in fields(Figure)}))
    return found


def _value(field: Any, line: dict[str, str]) -> Any:
    text, kind = line[field.name], field.type
    if "None" in kind and not text:
        return None
    return text == "True" if kind == "bool" else {"str": str, "float": float, "int": int}[kind.split(" ")[0]](text)


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


COLUMNS = ("what", "measured", "spread", "of the machine's limit", "against", "ratio", "goal")


def cells(figure: Figure) -> tuple[str, ...]:
    """Return a line of a table; a ratio that misses its goal is bold, and so is one below a peer's."""
    ratio = "" if figure.ratio is None else f"{figure.ratio:.{2 if figure.ratio >= 0.1 else 5}f}x"
    if figure.missed or figure.slower:
        ratio = f"**{ratio}**"
    goal = "" if figure.goal is None else f"{figure.goal:.3g}x{' at most' if figure.at_most else ''}"
    share = "" if figure.share is None else f"{figure.share:.0%} of {figure.limit}"
    measured = f"{number(figure.value)} {figure.unit}".strip()
    return (figure.what, measured, f"{figure.spread:.0%}" if figure.spread else "", share, figure.peer, ratio, goal)
