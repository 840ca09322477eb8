"""What the compiler makes of the kernels, and kernels of processors that this machine is not."""

import ast
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
# What the kernels need beside those of an instruction set.
DRIVERS = [
    CSRC / name for name in ("covariance.cpp", "dispatch.cpp", "moments.cpp", "parallel.cpp", "row_transform.cpp")
]
TEST_PROGRAM = ROOT / "tests" / "cpp" / "test_kernels.cpp"
SIMDE = Path("/usr/include/simde")

needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="not an x86-64 processor")


def tool(*names: str) -> str:
    for name in names:
        if name and shutil.which(name):
            return name
    pytest.skip(f"there is no {names[-1]}")


def compiler() -> str:
    return tool(os.environ.get("CXX", ""), "g++", "c++")


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def compile_args() -> list[str]:
    """Return the flags that setup.py gives the compiler, without running it."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "compile_args":
            return ast.literal_eval(statement.value)
    raise AssertionError("setup.py no longer assigns compile_args")


@pytest.fixture
def compiled(tmp_path):
    """Return a function that compiles a C++ file as the extension's build does, and returns the object."""

    def compile_(name: str) -> Path:
        tool("objdump")
        path = tmp_path / f"{Path(name).name}.o"
        source = CSRC / f"{name}.cpp"
        run(compiler(), "-std=c++17", *compile_args(), f"-I{CSRC}", "-c", source, "-o", path)
        return path

    return compile_


def instructions_beyond_the_baseline(path: Path) -> list[str]:
    """Return the lines of the disassembly that need AVX: wide registers, or an instruction of its encoding (v...)."""
    lines = run("objdump", "-d", "--no-show-raw-insn", path).splitlines()
    assert len(lines) > 10
    return [line for line in lines if re.search(r"%[tyz]mm|:\s+v[a-z]", line)]


@needs_x86
@pytest.mark.parametrize(
    "name", ["simd/baseline", "covariance", "dispatch", "moments", "parallel", "pickle_scan", "row_transform", "stages"]
)
def test_what_runs_on_every_processor_needs_no_avx(compiled, name):
    assert instructions_beyond_the_baseline(compiled(name)) == []


@needs_x86
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "register"),
    [("simd/avx2", "%ymm"), ("simd/avx512", "%zmm"), ("simd/avx512bf16", "%zmm"), ("simd/amx", "%tmm")],
)
def test_the_wide_kernels_use_their_registers(compiled, name, register):
    assert register in "\n".join(instructions_beyond_the_baseline(compiled(name)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["simd/baseline", "simd/avx2", "simd/avx512", "simd/avx512bf16", "simd/amx", "simd/neon"]
)
def test_no_function_of_an_instruction_set_is_shared_by_the_linker(compiled, name):
    symbols = run("objdump", "-t", "-C", compiled(name)).splitlines()
    weak = [line for line in symbols if re.match(r"[0-9a-f]+ .?w|[0-9a-f]+ u", line)]
    code = [line for line in symbols if re.match(r"[0-9a-f]+ g.*\.text", line)]
    assert weak + code == []


@pytest.mark.slow
def test_neon_kernels_on_an_emulated_processor(tmp_path):
    cross_compiler, emulator = tool("aarch64-linux-gnu-g++"), tool("qemu-aarch64", "qemu-aarch64-static")
    program = tmp_path / "test_kernels"
    sources = [TEST_PROGRAM, *DRIVERS, *CSRC.glob("simd/*.cpp")]
    run(
        cross_compiler,
        "-std=c++17",
        *compile_args(),
        "-Wall",
        "-Wextra",
        "-static",
        f"-I{CSRC}",
        *sources,
        "-o",
        program,
    )
    said = run(emulator, program)
    assert "kernels: baseline passed\n" in said
    assert "kernels: neon passed\n" in said


@needs_x86
@pytest.mark.slow
def test_avx512_kernels_without_such_a_processor(tmp_path):
    if not (SIMDE / "x86" / "avx512.h").exists():
        pytest.skip(f"there is no SIMDe at {SIMDE}")
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-ffp-contract=off", "-fsanitize=address", f"-I{CSRC}"]
    emulation = ["-DREALIGN_EMULATED", f"-I{TEST_PROGRAM.parent / 'emulated'}", f"-I{SIMDE.parent}"]
    objects = []
    for name in ("avx512", "avx512bf16", "amx"):
        # With these pragmas the compiler itself would use instructions that this processor may lack.
        source, count = re.subn(
            r"(?m)^#pragma (GCC (target|push|pop)|clang attribute).*(\\\n.*)*",
            "",
            (CSRC / "simd" / f"{name}.cpp").read_text(),
        )
        assert count >= 3
        neutral = tmp_path / f"{name}.cpp"
        neutral.write_text(source)
        objects.append(tmp_path / f"{name}.o")
        run(compiler(), *flags, *emulation, "-c", neutral, "-o", objects[-1])
    program = tmp_path / "test_kernels"
    others = [path for path in CSRC.glob("simd/*.cpp") if not path.stem.startswith(("avx512", "amx"))]
    tables = ["-DREALIGN_TEST_TABLE=kAvx512", "-DREALIGN_TEST_FAST"]
    run(compiler(), *flags, *tables, TEST_PROGRAM, *DRIVERS, *others, *objects, "-o", program)
    said = run(program)
    assert "kernels: fast passed\n" in said
    assert "kernels: avx512 passed\n" in said
