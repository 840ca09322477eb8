"""What the scripts here share: their arguments, a row a figure, a JSON file."""

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
