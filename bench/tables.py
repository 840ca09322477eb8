"""Bring the committed results into the README, and draw the plots of the kernels; with `--check`, say if README lags.

`<!-- NAME -->` to `<!-- end -->` holds the last run of that group in `results/figures.csv`, or the study
`results/NAME.json`; `<!-- behind -->` what misses its goal or a peer, with the reason.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _results import COLUMNS, ROOT, Run, cells, last_runs, number

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"


def machine_line(machine: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB, "
        f"{machine['instruction_set']}, {machine['system']}; {versions}."
    )


def lines_of(header: tuple[str, ...] | list[str], rows: list) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]


def of_study(result: dict) -> list[str]:
    """Return the table of a study: its own columns, or a row a figure."""
    if "columns" in result:
        return [*lines_of(result["columns"], result["table"]), *(["", result["words"]] if "words" in result else [])]
    rows = [
        (row["what"], f"{number(row['ours'])} {row['unit']}", row["peer"], f"{row['ratio']:.2f}x", row["goal"])
        for row in result["rows"]
    ]
    return lines_of(["what", "measured", "against", "ratio", "goal"], rows)


def behind(runs: dict[str, Run]) -> list[str]:
    """Return what misses its goal or is slower than a peer, in all groups, and why."""
    found = [figure for run in runs.values() for figure in run.figures if figure.missed or figure.slower]
    return lines_of(["what", "against", "ratio", "goal", "why"], [(*_some(cells(each)), each.why) for each in found])


def _some(line: tuple[str, ...]) -> tuple[str, ...]:
    return (line[0], *line[4:])


def filled(text: str) -> str:
    runs = last_runs()

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name == "behind":
            lines = behind(runs)
        elif name in runs:
            lines = [runs[name].machine_line(), "", *lines_of(COLUMNS, [cells(each) for each in runs[name].figures])]
        else:
            result = json.loads((RESULTS / f"{name}.json").read_text())
            lines = [machine_line(result["machine"]), "", *of_study(result)]
        return "\n".join([f"<!-- {name} -->", *lines, "<!-- end -->"])

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    before = README.read_text()
    after = filled(before)
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if before == after else "README.md lags behind bench/results: run python bench/tables.py")
    README.write_text(after)
    from _plots import draw

    draw(last_runs(), RESULTS / "kernels.png")
