"""Builds the one extension, `realign_fast._C`; everything else is said in pyproject.toml.

Where it cannot be built, the package is installed without it and works through NumPy. With
`REALIGN_FAST_REQUIRE_EXTENSION=1` that is an error.
"""

import os
import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

ParallelCompile("NPY_NUM_BUILD_JOBS", default=os.cpu_count() or 1).install()

# No -march and no -ffast-math: the files in csrc/simd raise the instruction set themselves and are chosen at run time.
compile_args = ["-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
if os.environ.get("REALIGN_FAST_WERROR"):
    compile_args += ["-Wall", "-Wextra", "-Werror"]

# Its code is for the compilers GCC and Clang and for POSIX.
BUILDS_EXTENSION = sys.platform != "win32"


class BuildExtension(build_ext):
    """Says what a failure means, in the line that setuptools makes of it."""

    def build_extension(self, ext: Extension) -> None:
        """Build it, or raise CompileError."""
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError) as error:
            what = "the package works without it, by NumPy, many times slower; to build it takes a C++17 compiler"
            raise CompileError(f"{what} ({error})") from error


class PlatformWheel(bdist_wheel):
    """Names a wheel without an extension after its platform: on others, pip is to build the extension instead."""

    def finalize_options(self) -> None:
        """Make it a wheel of this platform."""
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of interpreter, ABI and platform."""
        tags = super().get_tag()
        return tags if BUILDS_EXTENSION else ("py3", "none", tags[2])


extension = Pybind11Extension(
    "realign_fast._C",
    sorted(glob("csrc/**/*.cpp", recursive=True)),
    include_dirs=["csrc"],
    depends=sorted(glob("csrc/**/*.h", recursive=True)),
    cxx_std=17,
    extra_compile_args=compile_args,
    extra_link_args=["-pthread"],
    optional=not os.environ.get("REALIGN_FAST_REQUIRE_EXTENSION"),
)

setup(
    ext_modules=[extension] if BUILDS_EXTENSION else [],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": PlatformWheel},
)
