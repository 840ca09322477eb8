"""Four plots of the kernels: roofline, growth with rows and with threads, share of the limit by dimension."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from _results import Figure, Run

# Of an element: moments square and add it, then scale, round and add it; the row transform adds up its square and two
# products, then multiplies and adds twice. The others count their operations themselves.
OPERATIONS = {"moments": 5, "row transform": 10}
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def intensity(figure: Figure) -> float:
    """Return operations a byte that must cross the memory."""
    size, dim = ITEMSIZE[figure.dtype], figure.dim or 1
    if figure.kernel in OPERATIONS:
        crossings = 2 if figure.kernel == "row transform" else 1
        return OPERATIONS[figure.kernel] / (size * crossings)
    return (figure.work or 0) / ((figure.rows or 1) * dim * size * (2 if figure.kernel == "whitening" else 1))


def rate(figure: Figure) -> float:
    """Return 1e9 operations a second."""
    per_work = intensity(figure) if figure.kernel in OPERATIONS else 1.0
    return (figure.work or 0) * per_work / (figure.median_s or 1) / 1e9


def limit(figures: list[Figure], name: str) -> float:
    """Return what the machine did at most, in 1e9 bytes or operations a second: the median of all cases."""
    found = [
        (each.work or 0) / (each.median_s or 1) / each.share / 1e9
        for each in figures
        if each.limit == name and each.share
    ]
    return float(np.median(found))


def draw(runs: dict[str, Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kernels, scaling = runs["kernels"].figures, runs["scaling"].figures
    products = runs["covariance"].figures
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    _roofline(axes[0, 0], kernels, products)
    _growth(axes[0, 1], scaling)
    _threads(axes[1, 0], scaling)
    _dimensions(axes[1, 1], kernels)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _roofline(axis, kernels: list[Figure], products: list[Figure]) -> None:
    measured = kernels + products
    peak = limit(measured, "sgemm")
    x = np.geomspace(0.3, 1000, 100)
    for name, style in (("read", "--"), ("copy", "-")):
        axis.plot(x, np.minimum(peak, limit(measured, name) * x), "k", ls=style, lw=1, label=f"{name}, then sgemm")
    shown: dict[tuple[str, str], Figure] = {}
    for each in measured:
        if each.share and each.dtype and each.dim == 768 and (each.rows or 0) > 10_000:
            shown[each.kernel, each.dtype] = max(each, shown.get((each.kernel, each.dtype), each), key=rate)
    for (kernel, dtype), each in shown.items():
        axis.plot(intensity(each), rate(each), "o", ms=5, label=f"{kernel} {dtype}")
    axis.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFlop/s", title="roofline, 768 dimensions")


def _by_kernel(figures: list[Figure]) -> dict[str, list[Figure]]:
    return {
        name: [each for each in figures if each.kernel == name] for name in dict.fromkeys(f.kernel for f in figures)
    }


def _growth(axis, scaling: list[Figure]) -> None:
    most = max(each.threads or 1 for each in scaling)
    for name, figures in _by_kernel(scaling).items():
        points = sorted(
            {
                each.rows or 0: (each.median_s or 0) / (each.rows or 1) for each in figures if each.threads == most
            }.items()
        )
        axis.plot(*zip(*[(rows, seconds * 1e9) for rows, seconds in points], strict=True), "o-", ms=4, label=name)
    axis.set(xscale="log", yscale="log", xlabel="rows of 768 float32", ylabel="ns a row", title="growth with rows")


def _threads(axis, scaling: list[Figure]) -> None:
    rows = max(each.rows or 0 for each in scaling if each.threads == 1)
    for name, figures in _by_kernel(scaling).items():
        points = sorted({each.threads or 1: each.median_s or 0 for each in figures if each.rows == rows}.items())
        axis.plot(
            [threads for threads, _ in points], [points[0][1] / seconds for _, seconds in points], "o-", label=name
        )
    most = max(each.threads or 1 for each in scaling)
    axis.plot([1, most], [1, most], "k:", lw=0.8, label="as many times as fast")
    axis.set(
        xlabel="threads",
        ylabel="times as fast as one",
        title=f"growth with threads, {rows:,} rows",
        xticks=range(1, most + 1),
    )


def _dimensions(axis, kernels: list[Figure]) -> None:
    for name in ("moments", "row transform"):
        for dtype, style in (("float64", ":"), ("float32", "-"), ("float16", "--"), ("bfloat16", "-.")):
            points = [
                (each.dim, each.share)
                for each in kernels
                if (each.kernel, each.dtype) == (name, dtype) and not each.peer and each.share
            ]
            if points:
                axis.plot(*zip(*sorted(points), strict=True), style, marker="o", ms=3, label=f"{name} {dtype}")
    axis.set(
        xscale="log",
        xlabel="dimensions",
        ylabel="of the machine's read or copy speed",
        title="share of the limit",
        ylim=(0, None),
    )
