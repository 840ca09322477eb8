"""What every script here shares: a row a figure, a table on the screen, a JSON file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, says nothing of speed")
    return parser


def row(what: str, ours: float, peer: str, ratio: float, goal: str, spread: float, unit: str) -> dict[str, Any]:
    return {"what": what, "ours": ours, "unit": unit, "peer": peer, "ratio": ratio, "goal": goal, "spread": spread}


def write_json(path: Path, **parts: Any) -> None:
    path.write_text(json.dumps(parts, indent=1) + "\n")


def report(rows: list[dict[str, Any]], path: Path | None, machine: dict[str, Any], **settings: Any) -> None:
    for line in rows:
        print(
            f"{line['what']:58} {line['ours']:9.3g} {line['unit']:6} {line['ratio']:7.2f} x {line['peer']:40} "
            f"goal {line['goal']:22} spread {line['spread']:.1%}"
        )
    if path is not None:
        write_json(path, machine=machine, settings=settings, rows=rows)
