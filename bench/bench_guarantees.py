"""What must hold and is no speed: how often it was tried and held, or by how much it is missed at most."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import realign_fast
from realign_fast import Moments, fit, reference
from realign_fast.benchmark import rows_of

TESTS = Path(realign_fast.__file__).parents[1] / "tests"
CHECKED_BY = ("test_moments.py", "test_alignment.py")
DIM = 768
DIMS = (1, 3, 127, 255, 512, 768, 1024, 1152, 1280, 4096)
METRICS = ("metrics", "spectra", "frame", "two_sample", "neighbors", "centroids")


def run_tests(folder: Path, *arguments: str) -> Iterator[tuple[bool, dict[str, int]]]:
    """Run tests, the slow ones too; yield of each that ran whether it passed, and what it recorded."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "slow or not slow"]
    subprocess.run(
        [*command, f"--junitxml={report}", *arguments], cwd=TESTS.parent, stdout=subprocess.DEVNULL, check=False
    )
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is None:
            recorded = {each.attrib["name"]: int(each.attrib["value"]) for each in case.iter("property")}
            yield case.find("failure") is None and case.find("error") is None, recorded


@pytest.mark.slow
def test_kills(measure, folder):
    """Each at a random moment; what is written in the end is compared with an undisturbed run, byte for byte."""
    cases = list(run_tests(folder, str(TESTS / "test_kills.py"), "-k", "killed"))
    for command in ("apply", "fit"):
        name = f"kills of {command}"
        tried = sum(recorded.get(name, 0) for _, recorded in cases)
        held = sum(recorded.get(name, 0) for passed, recorded in cases if passed)
        what = f"{name}, in 1 process and in several, resumed to the bytes of an undisturbed run"
        measure.figure(what, held, "", f"{tried} kills", held / tried, goal=1.0)


@pytest.mark.slow
def test_metrics(measure, folder):
    cases = list(run_tests(folder, *(str(TESTS / f"test_{name}.py") for name in METRICS)))
    passed = sum(good for good, _ in cases)
    what = "tests of the metrics against SciPy, POT, scikit-learn or plain loops that pass"
    measure.figure(what, passed, "", f"{len(cases)} tests", passed / len(cases), goal=1.0)


def test_outputs(measure, pick):
    largest = 0.0
    for dim in DIMS:
        rows = rows_of(pick(65, 10_007, 10_007), dim, "float32")
        alignment = fit(rows + np.float32(0.1), -rows)
        wanted = reference.row_transform(
            rows.astype(np.float64), alignment.scale, alignment.shift, alignment.correction
        )
        largest = max(largest, float(np.abs(alignment.transform(rows) - wanted).max()))
    what = f"float32 outputs, dimensions {DIMS[0]} to {DIMS[-1]}: largest error of an element"
    measure.figure(what, largest, "", "2e-7", largest / 2e-7, goal=1.0, at_most=True)


def test_refinement(measure, pick):
    rows = rows_of(pick(2000, 50_000, 50_000), DIM, "float32")
    text, image = rows + np.float32(0.02), rows - np.float32(0.01)
    alignment = fit(text, image, refine=3)
    gap = float(np.linalg.norm(Moments(DIM).update(alignment.transform(text)).mean - Moments(DIM).update(image).mean))
    measure.figure("refine=3: gap on the rows of the fit", gap, "", "1e-7", gap / 1e-7, goal=1.0, at_most=True)


def test_merge(measure, pick):
    """Parts of all sizes, empty ones too, merged in another order."""
    # No row twice: what is rounded in one would be rounded alike in the other.
    rows = np.random.default_rng(0).standard_normal((pick(2000, 200_000, 200_000), DIM), np.float32) + np.float32(1)
    whole = Moments(DIM, covariance=True).update(rows)
    cuts = np.sort(np.random.default_rng(0).integers(0, len(rows), 36))
    parts = [Moments(DIM, covariance=True).update(part) for part in np.split(rows, [0, *cuts])]
    merged = Moments(DIM, covariance=True)
    for part in reversed(parts):
        merged.merge(part)
    wrong = int((merged.mean != whole.mean).sum()) + (merged.count != whole.count)
    what = f"moments of {len(parts)} parts merged: elements of count and mean that differ from those of all rows"
    measure.figure(what, wrong, "", f"{DIM + 1} elements", wrong / (DIM + 1), goal=0.0, at_most=True)
    error = float(np.linalg.norm(merged.covariance - whole.covariance) / np.linalg.norm(whole.covariance))
    what = f"covariance of {len(parts)} parts merged: relative difference (Frobenius)"
    measure.figure(what, error, "", "1e-7", error / 1e-7, goal=1.0, at_most=True)


def num_code_lines(source: str) -> int:
    """Return how many lines hold code: no blank ones, comments or docstrings."""
    tree = ast.parse(source)
    words: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            words.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    ignored += (tokenize.ENDMARKER, tokenize.ENCODING)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in ignored:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - words)


def test_the_trainer_is_thin(measure):
    files = (Path(realign_fast.__file__).parent / "revision").glob("*.py")
    count = sum(num_code_lines(path.read_text()) for path in files)
    measure.figure("lines of code in revision/", count, "lines", "900", count / 900, goal=1.0, at_most=True)
