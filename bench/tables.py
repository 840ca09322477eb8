"""Bring the committed results into the README; with `--check`, say whether they are there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def machine_line(machine: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB, "
        f"{machine['instruction_set']}, {machine['system']}; {versions}."
    )


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(result: dict) -> str:
    if "columns" in result:
        lines = [result["columns"], ["---"] * len(result["columns"]), *result["table"]]
        rows = [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join(
            [machine_line(result["machine"]), "", *rows, *(["", result["words"]] if "words" in result else [])]
        )
    lines = [
        machine_line(result["machine"]),
        "",
        "| what | measured | against | ratio | goal | spread |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        cells = (
            row["what"],
            f"{number(row['ours'])} {row['unit']}",
            row["peer"],
            f"{row['ratio']:.2f}x",
            row["goal"],
            f"{row['spread']:.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    def fill(match: re.Match[str]) -> str:
        path = ROOT / "bench" / "results" / f"{match[1]}.json"
        return f"<!-- {match[1]} -->\n{table(json.loads(path.read_text()))}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    before = README.read_text()
    after = filled(before)
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if before == after else "README.md lags behind bench/results: run python bench/tables.py")
    README.write_text(after)
