"""Run a command; print its seconds and the peak of its resident memory in bytes.

A small process of its own: a child begins with the peak of its parent.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

# An installed package is compiled: a variable of this machine must not make each start compile it anew.
environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
if process.returncode:
    sys.exit(f"{' '.join(sys.argv[1:])} ended with {process.returncode}")
print(time.perf_counter() - start, usage.ru_maxrss * 1024)
