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
    from realign_fast.kernels import _tuning, covariance, moments, noise, row_transform, whitening
    from realign_fast.kernels._tiles import dot_precision
    from realign_fast.kernels._tuning import MAX_BLOCK_D, compile_options, plan_rows, warps_of_chunk
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    TARGETS = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32)]
    TARGETS += [GPUTarget("hip", "gfx942", 64)]
else:
    TARGETS = []

# dtype, bytes an element.
DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiled(kernel, types, constants, target, num_warps, num_stages=None):
    """Compile `kernel` as its launcher does for large contiguous tensors: addresses and strides divide by 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    unspecialized = {name for name, each in zip(names, kernel.params, strict=True) if each.do_not_specialize}
    given = set(constants) | unspecialized
    aligned = [i for i, name in enumerate(names) if name not in given and types[name] != "fp32"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = compile_options(num_warps, num_stages, hip=target.backend == "hip")
    return triton.compile(source, target=target, options=options)


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


def assert_no_spills(found, tmp_path, scalars_too=True):
    if "cubin" not in found.asm:
        text = found.asm["amdgcn"]
        for what in ("vgpr_spill_count", "private_segment_fixed_size", "sgpr_spill_count")[: 3 if scalars_too else 2]:
            assert re.findall(rf"\.{what}: +(\d+)", text) == ["0"]
        return
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(found.asm["cubin"])
    report = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report) == [("0", "0")], report


def vector_accesses(found):
    """Count the 16-byte loads and stores of global memory, copies to shared memory among the loads."""
    if "ptx" in found.asm:
        text = found.asm["ptx"]
        loads, stores = (len(re.findall(rf"{what}\.global\.\S*v4\.[bf]32", text)) for what in ("ld", "st"))
        return loads + len(re.findall(r"cp\.async\.cg\.shared\.global .*, 0x10,", text)), stores
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


def noisy_of(dtype, dim, target, *, has_numbers=False):
    plan = noise.plan_noisy(4_000_000, dim, torch.device("cpu"))
    numbers = "*i64" if has_numbers else f"*{dtype}"
    types = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "number_ptr": numbers, "bad_ptr": "*i64", **MAPS, **SIZES}
    types |= {"scratch_ptr": "*fp32", "quarter": "i32", "std": "fp32", "first": "i64"}
    types |= dict.fromkeys(("seed_low", "seed_high"), "i32")
    constants = {"HAS_NUMBERS": has_numbers, "FUSED": True, "BLOCK_N": plan.block_n, "BLOCK_Q": plan.block_d // 4}
    constants |= {"CHUNK_D": plan.chunk_d}
    return compiled(noise._noisy_row_transform_kernel, types, constants, target, plan.num_warps)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "has_numbers"), [(768, False), (768, True), (1280, False)])
def test_row_transform_with_noise(tmp_path, target, dtype, dim, has_numbers):
    found = noisy_of(dtype, dim, target, has_numbers=has_numbers)
    assert_no_spills(found, tmp_path, scalars_too=False)  # AMD's masks of columns: to lanes of vectors, not to memory
    if dtype == "fp32" and target.backend == "cuda":
        assert min(vector_accesses(found)) > 0


@pytest.mark.parametrize("dim", [512, 1024, 1152, 2048, 4096])
def test_row_transform_with_noise_of_other_dimensions(tmp_path, dim):
    assert_no_spills(noisy_of("bf16", dim, TARGETS[1]), tmp_path)


def backward_of(dtype, dim, target):
    plan = row_transform.plan_backward(4_000_000, dim, torch.device("cpu"))
    types = {**dict.fromkeys(("x_ptr", "grad_out_ptr", "grad_x_ptr"), f"*{dtype}"), **MAPS, **SIZES}
    if dim > MAX_BLOCK_D:
        constants = {"CHUNK_D": row_transform._WIDE_CHUNK_D}
        wide = row_transform._row_transform_backward_wide_kernel
        return compiled(
            wide, types, constants, target, warps_of_chunk(constants["CHUNK_D"], hip=target.backend == "hip")
        )
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


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("build", [row_transform_of, backward_of])
def test_rows_too_long_for_registers(tmp_path, target, build):
    found = build("bf16", 16384, target)
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


TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# Shared memory that a program can have.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, "gfx942": 64 << 10}


def tile_constants(tile, precision, dtype, target):
    precision = dot_precision(precision, dtype, hip=target.backend == "hip")
    return {"PRECISION": precision, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}


def products_of(precision, target, monkeypatch):
    monkeypatch.setattr(_tuning, "_SHARED_BYTES", SHARED_BYTES[target.arch])
    plan = covariance.plan_covariance(4_000_000, 1280, torch.device("cpu"), precision, hip=target.backend == "hip")
    types = {"centred_ptr": f"*{NAMES[plan.dtype]}", "products_ptr": "*fp64"}
    types |= dict.fromkeys(("num_steps", "num_tiles", "dim", "width"), "i32")
    constants = tile_constants(plan.tile, precision, plan.dtype, target)
    kernel = covariance._products_kernel
    return compiled(kernel, types, constants, target, plan.tile.num_warps, plan.tile.num_stages)


def whitening_of(dtype, precision, target, monkeypatch):
    monkeypatch.setattr(_tuning, "_SHARED_BYTES", SHARED_BYTES[target.arch])
    rows_dtype = TORCH_DTYPES[dtype]
    tile = whitening.plan_whitening(
        4_000_000, 1280, torch.device("cpu"), rows_dtype, precision, hip=target.backend == "hip"
    )
    multiplied = whitening.product_dtype(rows_dtype, precision)
    types = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{NAMES[multiplied]}", "offset_ptr": "*fp32", "scale": "fp32"}
    types |= {"out_ptr": f"*{dtype}", "bad_ptr": "*i64", "dim_out": "i32", **SIZES}
    constants = tile_constants(tile, precision, multiplied, target)
    return compiled(whitening._whiten_kernel, types, constants, target, tile.num_warps, tile.num_stages)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize(
    ("dtype", "stored", "dim"), [("bf16", "bf16", 1280), ("bf16", "fp32", 768), ("fp32", "fp32", 1280)]
)
def test_centring(tmp_path, target, dtype, stored, dim):
    plan = covariance.plan_centring(4096, dim, torch.device("cpu"))
    types = {"x_ptr": f"*{dtype}", "pilot_ptr": "*fp64", "centred_ptr": f"*{stored}", "bad_ptr": "*i64"}
    types |= {"num_stored": "i32", "width": "i32", "first_row": "i64", **SIZES}
    constants = {"BLOCK_N": plan.block_n, "BLOCK_D": plan.block_d, "CHUNK_D": plan.chunk_d}
    found = compiled(covariance._centre_kernel, types, constants, target, plan.num_warps)
    assert_no_spills(found, tmp_path)
    assert min(vector_accesses(found)) > 0


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
def test_centring_of_rows_too_long_for_registers(tmp_path, target):
    types = {"x_ptr": "*bf16", "pilot_ptr": "*fp64", "centred_ptr": "*bf16", "bad_ptr": "*i64"}
    types |= {"num_stored": "i32", "width": "i32", "first_row": "i64", **SIZES}
    constants = {"CHUNK_D": covariance._WIDE_CHUNK_D}
    num_warps = warps_of_chunk(covariance._WIDE_CHUNK_D, hip=target.backend == "hip")
    found = compiled(covariance._centre_wide_kernel, types, constants, target, num_warps)
    assert_no_spills(found, tmp_path)
    assert min(vector_accesses(found)) > 0


# The tiles, and so the kernel, are the same for all dimensions from 256 on.
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("precision", ["exact", "high", "fast"])
def test_products(tmp_path, monkeypatch, target, precision):
    found = products_of(precision, target, monkeypatch)
    assert_no_spills(found, tmp_path)
    assert vector_accesses(found)[0] > 0
    assert found.metadata.shared <= SHARED_BYTES[target.arch]


MULTIPLIED = [("bf16", "high"), ("fp32", "exact"), ("fp32", "high"), ("fp32", "fast")]


@pytest.mark.parametrize(
    ("dtype", "precision", "target"),
    [(*which, target) for which in MULTIPLIED for target in TARGETS] + [("fp16", "high", t) for t in TARGETS[1:2]],
    ids=lambda value: str(getattr(value, "arch", value)),
)
def test_whitening(tmp_path, monkeypatch, target, dtype, precision):
    found = whitening_of(dtype, precision, target, monkeypatch)
    assert_no_spills(found, tmp_path)
    assert min(vector_accesses(found)) > 0
    assert found.metadata.shared <= SHARED_BYTES[target.arch]


def test_matrix_kernels_fit_in_the_shared_memory_of_small_gpus(monkeypatch):
    target = GPUTarget("cuda", 86, 32)
    for found in (products_of("fast", target, monkeypatch), whitening_of("bf16", "fast", target, monkeypatch)):
        assert found.metadata.shared <= SHARED_BYTES[86]
