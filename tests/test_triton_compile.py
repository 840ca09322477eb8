"""Every Triton kernel compiled for GPUs that are not here: its memory accesses, registers and spills are looked at."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

if os.environ.get("TRITON_INTERPRET") != "1":
    from realign_fast.kernels import moments, row_transform
    from realign_fast.kernels._tuning import MAX_BLOCK_D, compile_options, plan_rows
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    TARGETS = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32)]
    TARGETS += [GPUTarget("hip", "gfx942", 64)]
else:
    TARGETS = []

# dtype, bytes an element.
DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiled(kernel, types, constants, target, num_warps):
    """Compile `kernel` as its launcher does for large contiguous tensors: addresses and strides divide by 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [i for i, name in enumerate(names) if name not in constants]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=target, options=compile_options(num_warps, hip=target.backend == "hip"))


MAPS = {f"{name}_ptr": "*fp32" for name in ("scale", "shift", "correction")}
MAPS |= {f"{name}64_ptr": "*fp64" for name in ("scale", "shift", "correction")}
SIZES = dict.fromkeys(("num_rows", "dim", "stride_xn", "stride_on", "stride_gn", "stride_dn"), "i32")


def row_transform_of(dtype, dim, target, *, has_domain=False):
    plan = plan_rows(4_000_000, dim, torch.device("cpu"))
    kernel = row_transform._row_transform_kernel if dim <= MAX_BLOCK_D else row_transform._row_transform_wide_kernel
    domain = "*i64" if has_domain else f"*{dtype}"
    rows = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "domain_ptr": domain, "bad_ptr": "*i64"}
    types = {**rows, **MAPS, **SIZES}
    constants = {
        "HAS_DOMAIN": has_domain,
        "FUSED": True,
        "BLOCK_N": plan.block_n,
        "BLOCK_D": plan.block_d,
        "CHUNK_D": plan.chunk_d,
    }
    return compiled(kernel, types, constants, target, plan.num_warps)


def assert_no_spills(found, tmp_path):
    if "cubin" not in found.asm:
        text = found.asm["amdgcn"]
        for what in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
            assert re.findall(rf"\.{what}: +(\d+)", text) == ["0"]
        return
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(found.asm["cubin"])
    report = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report) == [("0", "0")], report


def vector_accesses(found):
    """Count the 16-byte loads and stores of global memory."""
    if "ptx" in found.asm:
        text = found.asm["ptx"]
        return tuple(len(re.findall(rf"{what}\.global\.\S*v4\.[bf]32", text)) for what in ("ld", "st"))
    text = found.asm["amdgcn"]
    return tuple(len(re.findall(f"(?:global|buffer)_{what}_dwordx4", text)) for what in ("load", "store"))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [768, 1280])
def test_row_transform(tmp_path, target, dtype, dim):
    found = row_transform_of(dtype, dim, target)
    assert_no_spills(found, tmp_path)
    loads, stores = vector_accesses(found)
    assert loads > 0
    assert stores > 0


@pytest.mark.parametrize("dim", [512, 1024, 1152, 4096, 8192, 16384])
def test_row_transform_of_other_dimensions(tmp_path, dim):
    found = row_transform_of("bf16", dim, TARGETS[1])
    assert_no_spills(found, tmp_path)
    assert min(vector_accesses(found)) > 0


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
def test_row_transform_of_many_domains(tmp_path, target):
    found = row_transform_of("bf16", 768, target, has_domain=True)
    assert_no_spills(found, tmp_path)
    assert min(vector_accesses(found)) > 0


def backward_of(dtype, dim, target):
    plan = row_transform.plan_backward(4_000_000, dim, torch.device("cpu"))
    types = {**dict.fromkeys(("x_ptr", "grad_out_ptr", "grad_x_ptr"), f"*{dtype}"), **MAPS, **SIZES}
    if dim > MAX_BLOCK_D:
        constants = {"CHUNK_D": row_transform._WIDE_CHUNK_D}
        wide = row_transform._row_transform_backward_wide_kernel
        return compiled(wide, types, constants, target, row_transform._WIDE_WARPS)
    constants = {"FUSED": True, "BLOCK_N": plan.block_n, "BLOCK_D": plan.block_d, "CHUNK_D": plan.chunk_d}
    return compiled(row_transform._row_transform_backward_kernel, types, constants, target, plan.num_warps)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [768, 1280])
def test_backward(tmp_path, target, dtype, dim):
    found = backward_of(dtype, dim, target)
    assert_no_spills(found, tmp_path)
    loads, stores = vector_accesses(found)
    assert loads > 1
    assert stores > 0


@pytest.mark.parametrize("dim", [512, 1024, 1152, 4096, 8192, 16384])
def test_backward_of_other_dimensions(tmp_path, dim):
    found = backward_of("bf16", dim, TARGETS[1])
    assert_no_spills(found, tmp_path)
    assert min(vector_accesses(found)) > 0


def moments_of(dtype, dim, target, *, mapped=False):
    plan = moments.plan_moments(4_000_000, dim, torch.device("cpu"))
    types = {"x_ptr": f"*{dtype}", "sums_ptr": "*i64", "keys_ptr": "*i64", "bad_ptr": "*i64", "first_row": "i64"}
    types |= {**MAPS, **SIZES}
    constants = {"BLOCK_N": plan.block_n, "BLOCK_D": plan.block_d, "CHUNK_D": plan.chunk_d}
    constants |= {"HAS_KEYS": not mapped, "MAPPED": mapped, "FUSED": True}
    constants |= {"keys_ptr": None} if mapped else dict.fromkeys(MAPS)
    return compiled(moments._moments_kernel, types, constants, target, plan.num_warps)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [768, 1280])
@pytest.mark.parametrize("mapped", [False, True])
def test_moments(tmp_path, target, dtype, dim, mapped):
    found = moments_of(dtype, dim, target, mapped=mapped)
    assert_no_spills(found, tmp_path)
    assert vector_accesses(found)[0] > 0


@pytest.mark.parametrize(
    ("dim", "mapped"), [(dim, m) for m in (False, True) for dim in (512, 1024, 1152, 4096)] + [(8192, False)]
)
def test_moments_of_other_dimensions(tmp_path, dim, mapped):
    assert_no_spills(moments_of("bf16", dim, TARGETS[1], mapped=mapped), tmp_path)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
def test_moments_of_rows_too_long_for_registers(tmp_path, target):
    types = {"x_ptr": "*bf16", "factor_ptr": "*fp64", "sums_ptr": "*i64", "keys_ptr": "*i64", "bad_ptr": "*i64"}
    types |= {"first_row": "i64", **SIZES}
    block = {"BLOCK_N": moments._MAX_BLOCK_N}
    first = {**block, "CHUNK_D": 128, "HAS_KEYS": True}
    assert_no_spills(compiled(moments._factors_kernel, types, first, target, 4), tmp_path)
    assert_no_spills(compiled(moments._columns_kernel, types, {**block, "BLOCK_D": 128}, target, 4), tmp_path)
