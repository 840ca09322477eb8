"""The kernels against torch on the same bytes, in turn, in one process."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _tables import arguments, report, row

from realign_fast import _C
from realign_fast._dtypes import empty
from realign_fast.alignment import fit
from realign_fast.benchmark import interleave, kernel_cases, machine, rows_of, summarise
from realign_fast.nn import ReAlign

ROW_TRANSFORM_GOALS = {
    "float32": {"avx512": 1.15, "avx2": 0.9, "baseline": 0.4},
    "float16": {"avx512": 0.9},
    "bfloat16": {"avx512": 0.9},
}
MOMENTS_GOALS = {"float32": 0.9, "float16": 0.8}


def with_instruction_set(name, run):
    def call():
        _C.use_instruction_set(name)
        run()
        _C.use_instruction_set("auto")

    return call


def large(count: int, rounds: int) -> list[dict]:
    lines = []
    threads = torch.get_num_threads()
    for dtype in ("float32", "float16", "bfloat16"):
        rows = rows_of(count, 768, dtype)
        out = empty(rows.shape, rows.dtype)
        out.fill(0)
        source, target = (torch.from_numpy(a.view(np.int16) if dtype != "float32" else a) for a in (rows, out))
        as_float32 = torch.ones(rows.nbytes // 4)
        kernels = kernel_cases(rows, out, dtype, threads)
        cases = {"copy_": lambda s=source, t=target: t.copy_(s), "sum": lambda f=as_float32: f.sum()}
        for name in _C.instruction_sets():
            for kernel in ("row_transform", "moments"):
                cases[f"{kernel} {name}"] = with_instruction_set(name, kernels[kernel])
        found = {name: summarise(times) for name, times in interleave(cases, rounds).items()}
        for name in _C.instruction_sets():
            mine = found[f"row_transform {name}"]
            goal = ROW_TRANSFORM_GOALS[dtype].get(name)
            lines.append(
                row(
                    f"row transform {dtype}, {count:,} x 768, {name}",
                    2 * rows.nbytes / mine["median_s"] / 1e9,
                    "torch.Tensor.copy_",
                    found["copy_"]["median_s"] / mine["median_s"],
                    f"{goal}x" if goal else "none",
                    mine["spread"],
                    "GB/s",
                )
            )
        best = _C.instruction_set()
        mine = found[f"moments {best}"]
        goal = MOMENTS_GOALS.get(dtype)
        lines.append(
            row(
                f"moments {dtype}, {count:,} x 768, {best}",
                rows.nbytes / mine["median_s"] / 1e9,
                "torch.sum of the bytes as float32",
                found["sum"]["median_s"] / mine["median_s"],
                f"{goal}x" if goal else "none",
                mine["spread"],
                "GB/s",
            )
        )
    return lines


def many_domains(count: int, rounds: int) -> list[dict]:
    lines = []
    rng = np.random.default_rng(0)
    row_maps = [_C.RowMap(1.1, *(f * rng.normal(size=768) / 28 for f in (0.5, 0.1))) for _ in range(64)]
    domain = rng.integers(0, 64, count)
    threads = torch.get_num_threads()
    for dtype in ("float32", "float16"):
        rows = rows_of(count, 768, dtype)
        out = empty(rows.shape, rows.dtype)
        out.fill(0)
        cases = {
            "one": lambda r=rows, o=out: _C.row_transform(r, False, o, False, row_maps[0], threads),
            "many": lambda r=rows, o=out: _C.row_transform_by_domain(r, False, o, False, row_maps, domain, threads),
        }
        found = {name: summarise(times) for name, times in interleave(cases, rounds).items()}
        mine = found["many"]
        lines.append(
            row(
                f"row transform {dtype} by 64 domains at random, {count:,} x 768",
                2 * rows.nbytes / mine["median_s"] / 1e9,
                "one domain",
                found["one"]["median_s"] / mine["median_s"],
                "0.9x",
                mine["spread"],
                "GB/s",
            )
        )
    return lines


def setting():
    """Return an alignment, rows of unit length, and the map as plain torch would write it."""
    rng = np.random.default_rng(0)
    normalize = torch.nn.functional.normalize
    text, image = (normalize(torch.from_numpy(rng.normal(m, 1, (2000, 768)).astype(np.float32))) for m in (0.1, -0.1))
    alignment = fit(text, image)
    scale, shift, correction = (
        alignment.scale,
        *(torch.tensor(v, dtype=torch.float32) for v in (alignment.shift, alignment.correction)),
    )

    def folded(x):  # the rows are unit rows: two normalisations are all it takes
        return normalize(normalize(scale * x + shift) + correction)

    return alignment, text, folded


def gradients(rounds: int) -> list[dict]:
    alignment, text, folded = setting()
    # Few enough rows for memory that is used again: fresh pages would cost all of them more than the arithmetic.
    x, grad_out = text.clone().requires_grad_(), text.flip(0)
    layer, compiled = ReAlign(alignment), torch.compile(folded)
    maps = {"layer": layer, "eager torch": folded, "torch.compile": compiled}
    cases = {name: lambda m=m: torch.autograd.grad(m(x), x, grad_out) for name, m in maps.items()}
    found = {name: summarise(times) for name, times in interleave(cases, rounds * 3, calls=40).items()}
    mine = found["layer"]
    return [
        row(
            f"nn.ReAlign and its gradient, {len(x):,} x 768 float32",
            mine["median_s"] * 1e3,
            peer,
            found[peer]["median_s"] / mine["median_s"],
            "none",
            mine["spread"],
            "ms",
        )
        for peer in ("eager torch", "torch.compile")
    ]


def small(rounds: int) -> list[dict]:
    alignment, text, folded = setting()
    x = text[:256].contiguous()
    compiled = torch.compile(folded)
    torch.testing.assert_close(alignment.transform(x), folded(x), rtol=0, atol=1e-6)
    array = x.numpy()
    cases = {
        "array": lambda: alignment.transform(array),
        "tensor": lambda: alignment.transform(x),
        "eager torch": lambda: folded(x),
        "torch.compile": lambda: compiled(x),
    }
    found = {name: summarise(times) for name, times in interleave(cases, rounds * 3, calls=400).items()}
    return [
        row(
            f"transform of 256 x 768 float32, {kind}",
            found[kind]["median_s"] * 1e6,
            peer,
            found[peer]["median_s"] / found[kind]["median_s"],
            goal,
            found[kind]["spread"],
            "us",
        )
        for kind in ("array", "tensor")
        for peer, goal in (("eager torch", "5x"), ("torch.compile", "2x"))
    ]


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    count, rounds = (20_000, 3) if options.quick else (1_000_000, 9)
    lines = large(count, rounds) + many_domains(count, rounds) + gradients(rounds) + small(rounds)
    report(lines, options.json, machine(), num_rows=count, rounds=rounds)
