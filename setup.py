"""Builds the one extension, `realign_fast._C`; everything else is said in pyproject.toml."""

import os
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile("NPY_NUM_BUILD_JOBS", default=os.cpu_count() or 1).install()

# No -march and no -ffast-math: the files in csrc/simd raise the instruction set themselves and are chosen at run time.
compile_args = ["-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
if os.environ.get("REALIGN_FAST_WERROR"):
    compile_args += ["-Wall", "-Wextra", "-Werror"]

setup(
    ext_modules=[
        Pybind11Extension(
            "realign_fast._C",
            sorted(glob("csrc/**/*.cpp", recursive=True)),
            include_dirs=["csrc"],
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            cxx_std=17,
            extra_compile_args=compile_args,
            extra_link_args=["-pthread"],
        )
    ]
)
