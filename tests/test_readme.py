import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


# In the order of the page: a block may use what an earlier one wrote.
@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_code_blocks_run(folder, index):
    language, code = BLOCKS[index]
    command = {"python": [sys.executable, "-c", code], "sh": ["sh", "-euc", code]}[language]
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PATH": scripts}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_figures_come_from_the_committed_results():
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
