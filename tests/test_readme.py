import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)


def test_code_blocks_run_in_the_order_of_the_page(tmp_path):
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    assert len(BLOCKS) > 4
    for language, code in BLOCKS:
        command = {"python": [sys.executable, "-c", code], "sh": ["sh", "-euc", code]}[language]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PATH": scripts}, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stderr}"


def test_figures_come_from_the_committed_results():
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
