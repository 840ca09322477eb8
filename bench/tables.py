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
from _results import COLUMNS, ROOT, Run, cells, last_runs, machine_line, named_versions, number

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"


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
    rows = []
    for figure in found:
        what, _, _, _, *against = cells(figure)
        rows.append((what, *against, figure.why))
    return lines_of(["what", "against", "ratio", "goal", "why"], rows)


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
            on = result["machine"]
            lines = [f"{machine_line(on | {'versions': named_versions(on)})}.", "", *of_study(result)]
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
