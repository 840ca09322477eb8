"""The API reference: docstrings that say what they must, and pages that hold every public name."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from realign_fast.cli import _parser

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text().replace("\\\n", " ")
MODULES = [
    "realign_fast",
    *(f"realign_fast.{name}" for name in re.findall(r"addprefix realign_fast\.,([^)]*)\)", MAKEFILE)[0].split()),
]
# Where a docstring leaves parameters to that of another.
ELSEWHERE = re.compile(r"\b([Aa]s|of|see) `[\w.]+`|[Pp]arameters (that|are)|as transformers does", re.IGNORECASE)


def public_in(module: str) -> list[ast.FunctionDef | ast.ClassDef]:
    """Return the functions and classes that a module exports, of a package those of its modules."""
    path = ROOT.joinpath(*module.split("."))
    init = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    exported = "".join(re.findall(r"^__all__ \+?= (\[.*?\])", init.read_text(), flags=re.MULTILINE | re.DOTALL))
    trees = [ast.parse(each.read_text()) for each in (path.glob("*.py") if path.is_dir() else [init])]
    nodes = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [node for node in nodes if f'"{node.name}"' in exported]


def parameters_of(function: ast.FunctionDef) -> list[str]:
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [each.arg for each in every if each is not None and each.arg not in ("self", "cls")]


def problems_of(node: ast.FunctionDef | ast.ClassDef, where: str) -> list[str]:
    text = ast.get_docstring(node)
    if not text:
        return [f"{where} has no docstring"]
    if isinstance(node, ast.ClassDef):
        inside = [each for each in node.body if isinstance(each, ast.FunctionDef)]
        found = [problem for each in inside if each.name[0] != "_" for problem in
                 problems_of(each, f"{where}.{each.name}")]  # fmt: skip
        names = [name for each in inside if each.name == "__init__" for name in parameters_of(each)]
    else:
        found, names = [], parameters_of(node)
        names = names if len(names) > 1 else []  # of a single one the first line speaks
    left_out = [name for name in names if not re.search(rf"\b{name}\b", text)]
    if left_out and not ELSEWHERE.search(text):
        found.append(f"{where} does not say what {', '.join(left_out)} are")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_name_every_parameter(module):
    nodes = public_in(module)
    assert nodes
    assert [problem for node in nodes for problem in problems_of(node, f"{module}.{node.name}")] == []


def test_the_help_of_every_command_is_kept():
    (commands,) = [action.choices for action in _parser()._actions if action.dest == "command"]
    assert set(re.findall(r"^COMMANDS = (.*)$", MAKEFILE, flags=re.MULTILINE)[0].split()) == set(commands)


@pytest.mark.slow
def test_the_reference_is_built_without_warnings_and_holds_every_public_name(tmp_path):
    arguments = [f"BIN={Path(sys.executable).parent}", f"DOCS={tmp_path / 'docs'}", "--old-file=.venv/installed"]
    done = subprocess.run(["make", "docs", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    for module in MODULES:
        page = (tmp_path / "docs" / f"{module.replace('.', '/')}.html").read_text()
        shown = set(re.findall(r'id="([\w.]+)"', page))
        assert set(import_module(module).__all__) <= shown
        methods = {f"{node.name}.{each.name}" for node in public_in(module) if isinstance(node, ast.ClassDef)
                   for each in node.body if isinstance(each, ast.FunctionDef) and each.name[0] != "_"}  # fmt: skip
        assert methods <= shown
    said = (tmp_path / "docs" / "commands.txt").read_text()
    assert set(re.findall(r"^usage: realign (\w+)", said, flags=re.MULTILINE)) == set(
        re.findall(r"^COMMANDS = (.*)$", MAKEFILE, flags=re.MULTILINE)[0].split()
    )
