"""The figures of a report, as PNG, in a light and a dark scheme.

All have one narrow width, so that letters are the same size in each and can be read on a phone. The images, the text
before any map and every method keep their colours throughout; dashes and markers tell them apart too.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .._extras import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = Mapping[str, Any]

_WIDTH = 4.6
_DPI = 200
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MINUS, _TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
_LONGEST_NAME = 16
_SMALLEST_SHARE = 1e-6


@dataclass(frozen=True)
class Scheme:
    """Colours of the page and of the figures on it; `methods` begins with the text as it is."""

    page: str
    surface: str
    ink: str
    muted: str
    rule: str
    band: str
    good: str
    warn: str
    bad: str
    image: str
    methods: tuple[str, ...]

    def method(self, index: int) -> str:
        """Return the colour of the method at this place of the report."""
        return self.methods[0] if index == 0 else self.methods[1 + (index - 1) % (len(self.methods) - 1)]


LIGHT = Scheme(
    page="#f5f6f7",
    surface="#ffffff",
    ink="#1c2127",
    muted="#59636e",
    rule="#d3d8de",
    band="#e8ebee",
    good="#00705a",
    warn="#8a5a00",
    bad="#b3261e",
    image="#1769aa",
    methods=("#e0670f", "#2f9484", "#321083", "#a3365f", "#a97cf0", "#562001"),
)
DARK = Scheme(
    page="#131619",
    surface="#1b1f24",
    ink="#e4e8ec",
    muted="#9ba5b0",
    rule="#39414a",
    band="#2a3037",
    good="#3ecfa9",
    warn="#e6b450",
    bad="#ff8a80",
    image="#5aaef0",
    methods=("#ff9a52", "#6ff0e4", "#9068d6", "#e15e8e", "#f3e55c", "#b16512"),
)


def at(node: Any, *path: str | int) -> Any:
    """Return what lies at `path` below `node`, or None where any part of the way is None or missing."""
    for key in path:
        if node is None or (isinstance(node, Mapping) and key not in node):
            return None
        node = node[key]
    return node


def number(value: float | None) -> str:
    """Return three significant digits, as people write them."""
    if value is None or not math.isfinite(value):
        return "not measured"
    if isinstance(value, int):
        return f"{value:,}".replace("-", _MINUS)
    mantissa, exponent = f"{value:.2e}".split("e")
    power = int(exponent)
    if value == 0:
        return "0"
    if power < -4:
        text = f"{mantissa} {_TIMES} 10{str(power).translate(_SUPERSCRIPTS)}"
    else:
        text = f"{value:,.{max(0, 2 - power)}f}"
    return text.replace("-", _MINUS)


def brief(value: float | None) -> str:
    """Return `number` without the zeros at its end."""
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text and _TIMES not in text else text


def shown(method: Mapping[str, Any]) -> str:
    """Return what a reader sees as a method's name."""
    return "as it is" if method["name"] == "none" else str(method["name"])


def draw(report: Report, dark: bool) -> dict[str, bytes]:
    """Return PNG images by name: the figures the report has data for.

    Raises
    ------
    ImportError
        If matplotlib is missing.
    """
    import_extra("matplotlib", "the report", extra="report")
    from matplotlib import style

    scheme = DARK if dark else LIGHT
    images = {}
    with style.context(["default", _settings(scheme)]):
        for name, plot in _PLOTS.items():
            figure = plot(report, scheme)
            if figure is not None:
                target = io.BytesIO()
                figure.savefig(target, format="png", dpi=_DPI, metadata={"Software": None})
                images[name] = target.getvalue()
    return images


def _settings(scheme: Scheme) -> dict[str, Any]:
    return {
        "font.family": "DejaVu Sans",
        "font.size": 12,
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "axes.titlecolor": scheme.ink,
        "axes.labelcolor": scheme.ink,
        "axes.edgecolor": scheme.muted,
        "axes.facecolor": scheme.surface,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": True,
        "figure.facecolor": scheme.surface,
        "savefig.facecolor": scheme.surface,
        "grid.color": scheme.rule,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.handlelength": 2.4,
        "lines.linewidth": 2,
        "text.color": scheme.ink,
        # Names come from outside, and a dollar sign in one is no formula.
        "text.parse_math": False,
        "xtick.color": scheme.muted,
        "ytick.color": scheme.muted,
        "xtick.labelcolor": scheme.ink,
        "ytick.labelcolor": scheme.ink,
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
    }


@dataclass(frozen=True)
class _Method:
    name: str
    values: Mapping[str, Any]
    colour: str
    dashes: str | tuple[float, tuple[float, ...]]


_DASHES: tuple[str | tuple[float, tuple[float, ...]], ...] = (
    "-",
    "-",
    (0, (5, 1.6)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (9, 2)),
    (0, (3, 1.2, 1.2, 1.2, 1.2, 1.2)),
)


def _methods(report: Report, scheme: Scheme) -> list[_Method]:
    return [
        _Method(_printable(shown(values)), values, scheme.method(index), _DASHES[index % len(_DASHES)])
        for index, values in enumerate(report["methods"])
    ]


def _colour_of(report: Report, scheme: Scheme, name: str) -> str:
    names = [method["name"] for method in report["methods"]]
    return scheme.method(names.index(name)) if name in names else scheme.ink


def _printable(name: str) -> str:
    """Return a name cut to length, with "?" for what the font has no glyph for."""
    from matplotlib.font_manager import findfont, get_font

    glyphs = get_font(findfont("DejaVu Sans")).get_charmap()
    known = "".join(letter if letter.isprintable() and ord(letter) in glyphs else "?" for letter in name)
    return known if len(known) <= _LONGEST_NAME else known[: _LONGEST_NAME - 1] + "…"


def _numbers(values: Any) -> NDArray[np.float64]:
    """Return floats, NaN where there is null."""
    return np.array([] if values is None else values, np.float64)


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(_WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))


def _logarithmic(axes: Axes, which: str) -> None:
    """Scale one axis of `axes` by logarithm, with plain numbers at its ticks, once its limits are known."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    getattr(axes, f"set_{which}scale")("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(getattr(axes, f"get_{which}lim")())
    decades = math.log10(high / low)
    steps = (1.0, 2.0, 5.0) if decades < 1.3 else (1.0, 3.0) if decades < 2.6 else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=6))
    if low < 1e-5 or high > 1e7:
        tick = FuncFormatter(lambda value, _: f"10{str(round(math.log10(value))).translate(_SUPERSCRIPTS)}")
    else:
        tick = FuncFormatter(lambda value, _: f"{value:,.10g}")
    axis.set_major_formatter(tick)
    axis.set_minor_formatter(NullFormatter())
    if len(steps) > 1:
        axis.set_minor_locator(NullLocator())
    axis.grid(True, which="major")
    axes.set_axisbelow(True)


def _around(values: Sequence[float] | NDArray[np.float64], below: float, above: float) -> tuple[float, float]:
    """Return limits on a logarithmic axis around the positive ones among `values`."""
    positive = [value for value in values if value > 0] or [1.0]
    return min(positive) / below, max(positive) * above


@dataclass(frozen=True)
class _Dot:
    label: str
    value: float
    colour: str
    filled: bool = True
    marker: str = "o"
    interval: Sequence[float] | None = None
    floor: float | None = None


def _dots(groups: list[list[_Dot]], scheme: Scheme, label: str) -> Figure | None:
    """Draw a row for each dot, with its value beside it, on a logarithmic axis; a space between groups."""
    groups = [group for group in groups if group]
    if not groups:
        return None
    dots = [dot for group in groups for dot in group]
    group_of = [index for index, group in enumerate(groups) for _ in group]
    places = np.arange(len(dots)) + 0.5 * np.array(group_of)
    figure = _figure(0.9 + 0.34 * (places[-1] + 1))
    axes = figure.subplots()
    floors = [dot.floor for dot in dots if dot.floor]
    ends = [end for dot in dots for end in dot.interval or ()]
    low, high = _around([*(dot.value for dot in dots), *floors, *ends], 3, 2.5)
    axes.set_xlim(low, high)
    axes.set_ylim(places[-1] + 0.6, -0.6)
    _logarithmic(axes, "x")
    axes.grid(False, axis="y")
    borders = np.concatenate([[-0.6], (places[1:] + places[:-1]) / 2, [places[-1] + 0.6]])
    for dot, y, top, bottom in zip(dots, places, borders, borders[1:], strict=False):
        if dot.floor:
            axes.fill_betweenx([top, bottom], low, dot.floor, color=scheme.band, linewidth=0, zorder=0.4)
        value = max(dot.value, low)
        right = value
        if dot.interval:
            left, right = np.clip(dot.interval, low, high)
            axes.plot([left, right], [y, y], color=dot.colour, linewidth=2.5, solid_capstyle="butt")
        face = dot.colour if dot.filled else scheme.surface
        axes.plot(value, y, dot.marker, color=dot.colour, markerfacecolor=face, markersize=8, markeredgewidth=1.8)
        inwards = math.log(max(value, right) / low) > 0.7 * math.log(high / low)
        axes.annotate(
            brief(dot.value),
            (value if inwards else max(value, right), y),
            xytext=(-9 if inwards else 9, 0),
            textcoords="offset points",
            ha="right" if inwards else "left",
            va="center",
            fontsize=11,
        )
    axes.set_yticks(places, [dot.label for dot in dots])
    for tick, dot in zip(axes.get_yticklabels(), dots, strict=True):
        tick.set_color(scheme.ink if dot.filled else scheme.muted)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(label)
    return figure


def _gap(report: Report, scheme: Scheme) -> Figure | None:
    groups = []
    for method in _methods(report, scheme):
        gap = method.values["gap"]
        floor = at(gap, "noise_floor")
        dots = [
            _Dot(_printable(step), value, method.colour, filled=False, floor=floor)
            for step, value in (at(gap, "steps") or [])[1:-1]
            if value is not None
        ]
        value = at(gap, "value")
        if value is not None:
            dots.append(_Dot(method.name, value, method.colour, interval=_whole(at(gap, "interval")), floor=floor))
        groups.append(dots)
    return _dots(groups, scheme, "centroid gap (shaded: noise floor)")


def _whole(interval: Sequence[float | None] | None) -> tuple[float, float] | None:
    if interval is None or interval[0] is None or interval[1] is None:
        return None
    return interval[0], interval[1]


def _drift(report: Report, scheme: Scheme) -> Figure | None:
    kinds = (("measured", "o", True), ("predicted", "o", False), ("paper", "s", False))
    groups = []
    for method in _methods(report, scheme):
        dots = []
        for kind, marker, filled in kinds:
            value = at(method.values, "drift", kind)
            if value is not None:
                label = {"measured": method.name, "predicted": "predicted", "paper": "second order"}[kind]
                dots.append(_Dot(label, value, method.colour, filled=filled, marker=marker))
        groups.append(dots)
    return _dots(groups, scheme, "length of the centroid's drift")


def _spectra(report: Report, scheme: Scheme) -> Figure | None:
    drawn = [
        (method.name, at(method.values, "spectrum"), method.colour, method.dashes)
        for method in _methods(report, scheme)
    ]
    text = [(f"text, {name}", *rest) for name, *rest in drawn]
    lines = [line for line in [("image", at(report, "target", "spectrum"), scheme.image, "-"), *text] if line[1]]
    if not lines:
        return None
    figure = _figure(3.6 + 0.24 * len(lines))
    axes = figure.subplots()
    for name, spectrum, colour, dashes in lines:
        exponent = spectrum["exponent"]
        label = name if exponent is None else f"{name}: exponent {brief(exponent)}"
        values = _numbers(spectrum["values"])
        # Further down is rounding, of directions that fewer rows than dimensions leave empty.
        values = np.where(values > _SMALLEST_SHARE * np.nanmax(values, initial=0), values, np.nan)
        axes.plot(_numbers(spectrum["ranks"]), values, color=colour, ls=dashes, label=label)
    fitted = _whole(lines[0][1]["range"])
    if fitted:
        axes.axvspan(*fitted, color=scheme.band, linewidth=0, zorder=0)
    _logarithmic(axes, "x")
    _logarithmic(axes, "y")
    axes.set_title("eigenvalue")
    axes.set_xlabel("rank (shaded: exponent fitted here)" if fitted else "rank")
    figure.legend(loc="outside lower left")
    return figure


def _cosines(report: Report, scheme: Scheme) -> Figure | None:
    image = at(report, "target", "cosines")
    methods = [method for method in _methods(report, scheme) if at(method.values, "cosines")]
    if not image and not methods:
        return None
    figure = _figure(3.2 + 0.24 * (len(methods) + 1))
    axes = figure.subplots()
    ends: list[float] = []

    def line(cosines: Mapping[str, Any], **kwargs: Any) -> NDArray[np.float64]:
        edges, density = _numbers(cosines["edges"]), _numbers(cosines["density"])
        seen = np.flatnonzero(density > 0.004 * np.nanmax(density, initial=0))
        if len(seen):
            ends.extend([edges[seen[0]], edges[seen[-1] + 1]])
        axes.plot((edges[1:] + edges[:-1]) / 2, density, **kwargs)
        return density

    if image:
        density = line(image, color=scheme.image, label="image")
        edges = _numbers(image["edges"])
        axes.fill_between((edges[1:] + edges[:-1]) / 2, density, color=scheme.image, alpha=0.22, linewidth=0)
    for method in methods:
        cosines = method.values["cosines"]
        js = cosines["js"]
        label = f"text, {method.name}" + ("" if js is None else f": JS {brief(js)}")
        line(cosines, color=method.colour, ls=method.dashes, label=label)
    if ends:
        axes.set_xlim(min(ends), max(ends))
    axes.set_ylim(bottom=0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_title("density")
    axes.set_xlabel("cosine between two rows of one set")
    figure.legend(loc="outside lower left")
    return figure


def _scatter(report: Report, scheme: Scheme) -> Figure | None:
    image = _numbers(at(report, "target", "scatter")).reshape(-1, 2)
    methods = [method for method in _methods(report, scheme) if at(method.values, "scatter")]
    if not len(image) or not methods:
        return None
    texts = [_numbers(method.values["scatter"]).reshape(-1, 2) for method in methods]
    everything = np.concatenate([image, *texts])
    low, high = np.nanmin(everything, axis=0), np.nanmax(everything, axis=0)
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
    columns = 1 if len(methods) == 1 else 2
    lines = math.ceil(len(methods) / columns)
    panel = _WIDTH / columns - 0.2
    shape = float(np.clip((high - low)[1] / max((high - low)[0], 1e-12), 0.35, 1.6))
    figure = _figure(0.45 + lines * (panel * shape + 0.42))
    grid = np.atleast_1d(figure.subplots(lines, columns, squeeze=False).ravel())
    for axes, method, text in zip(grid, methods, texts, strict=False):
        points = np.concatenate([image, text])
        colours = np.array([scheme.image] * len(image) + [method.colour] * len(text))
        # In a mixed order, so that neither set hides the other.
        order = np.random.default_rng(0).permutation(len(points))
        axes.scatter(
            *points[order].T, c=colours[order], s=float(np.clip(2500 / len(points), 2, 6)), alpha=0.6, linewidths=0
        )
        for rows, colour, marker, size in ((image, scheme.image, "o", 14), (text, method.colour, "D", 7)):
            centre = np.nanmean(rows, axis=0)
            axes.plot(*centre, marker, color=colour, ms=size, mec=scheme.surface, mew=1.5)
        axes.set_title(f"text, {method.name}", color=method.colour)
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(visible=True, color=scheme.rule)
    for axes in grid[len(methods) :]:
        axes.set_axis_off()
    figure.suptitle("image in blue; large marks are the means", x=0.02, ha="left", fontsize=11, color=scheme.muted)
    return figure


def _occupancy(report: Report, scheme: Scheme) -> Figure | None:
    methods = [method for method in _methods(report, scheme) if at(method.values, "occupancy", "image")]
    if not methods:
        return None
    figure = _figure(0.6 + 1.55 * len(methods))
    grid = figure.subplots(len(methods), 1, sharex=True, sharey=True, squeeze=False).ravel()
    most = 0.0
    for axes, method in zip(grid, methods, strict=True):
        occupancy = method.values["occupancy"]
        image, text = _numbers(occupancy["image"]), _numbers(occupancy["text"])
        order = np.argsort(-image, kind="stable")
        axes.stairs(image[order], fill=True, color=scheme.image, alpha=0.35)
        if len(text):
            axes.stairs(text[order], color=method.colour, linewidth=1.6)
        most = max(most, image.max(), *text)
        facts = [("JS", occupancy["js"]), ("reached", occupancy["coverage"])]
        found = ", ".join(f"{name} {brief(value)}" for name, value in facts if value is not None)
        axes.set_title(f"text, {method.name}: {found}" if found else f"text, {method.name}", color=method.colour)
        axes.set_xlim(0, len(image))
    _root_scale(grid[0], most)
    grid[-1].set_xlabel("image centroids, the fullest first")
    grid[-1].set_xticks([])
    figure.suptitle("share of the rows; images: blue area", x=0.02, ha="left", fontsize=11, color=scheme.muted)
    return figure


def _root_scale(axes: Axes, most: float) -> None:
    """Scale shares by their square root: small ones stay visible, and zero has a place."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
    axes.set_ylim(0, most * 1.08)
    ticks = [0.0]
    for tick in (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001):
        if 0.06 * most < tick <= most and (len(ticks) == 1 or tick <= ticks[-1] / 2.5):
            ticks.append(tick)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))


def _sample_size(report: Report, scheme: Scheme) -> Figure | None:
    points = [point for point in at(report, "sample_size", "points") or [] if point["mean"] and point["rows"]]
    if not points:
        return None
    colour = _colour_of(report, scheme, report["sample_size"]["method"])
    rows = _numbers([point["rows"] for point in points])
    mean, deviation, floor = (_numbers([point[key] for point in points]) for key in ("mean", "std", "floor"))
    figure = _figure(3.9)
    axes = figure.subplots()
    axes.set_xlim(*_around(rows, 1.35, 1.35))
    axes.set_ylim(*_around(np.concatenate([mean, floor]), 1.8, 1.6))
    _logarithmic(axes, "x")
    _logarithmic(axes, "y")
    if np.isfinite(floor).any():
        axes.plot(
            rows,
            floor,
            color=scheme.muted,
            ls=(0, (4, 2)),
            lw=1.6,
            marker="_",
            ms=9,
            label="noise floor, falls as 1/√rows",
        )
    axes.errorbar(
        rows, mean, np.nan_to_num(deviation), color=colour, fmt="-o", capsize=4, label="measured, with deviation"
    )
    axes.set_title(f"centroid gap of {_printable(report['sample_size']['method'])}, held out")
    axes.set_xlabel("rows in the fit")
    figure.legend(loc="outside lower left")
    return figure


def _transfer(report: Report, scheme: Scheme) -> Figure | None:
    transfer = report["transfer"]
    if not transfer:
        return None
    panels = [
        (title, _numbers(transfer[key]))
        for title, key in (("centroid gap", "gap"), ("mixing", "mixing"))
        if np.isfinite(_numbers(transfer[key])).any()
    ]
    if not panels:
        return None
    from matplotlib.colors import LinearSegmentedColormap

    names = [_printable(name) for name in transfer["names"]]
    columns = [fill(name, 32 // len(names)) for name in names]
    if len(names) > 3:
        columns = [str(place) for place in range(1, len(names) + 1)]
        names = [f"{name}  {place}" for name, place in zip(names, columns, strict=True)]
    ramp = LinearSegmentedColormap.from_list("ramp", [scheme.surface, scheme.image])
    lines = max(name.count("\n") for name in columns)
    figure = _figure(len(panels) * (0.62 * min(len(names), 6) + 1.14 + 0.19 * lines))
    for axes, (title, values) in zip(figure.subplots(len(panels), 1, squeeze=False).ravel(), panels, strict=True):
        smallest = min(values[values > 0], default=1.0)
        scale = np.log(np.maximum(values, smallest)) if title == "centroid gap" else values
        low, high = np.nanmin(scale), np.nanmax(scale)
        # Half of the ramp, so that text of one colour is readable on all of it.
        share = 0.04 + 0.5 * (scale - low) / max(high - low, 1e-12)
        axes.imshow(np.ma.masked_invalid(share), cmap=ramp, vmin=0, vmax=1, aspect="auto")
        cells = [_cell(value, len(names)) for value in values.ravel()]
        size = min(11.0, 320 / len(names) / max(map(len, cells)))
        for text, (row, column) in zip(cells, np.ndindex(values.shape), strict=True):
            axes.text(column, row, text, ha="center", va="center", fontsize=size)
        axes.set_xticks(range(len(names)), columns)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        axes.set_title(title)
        axes.set(xlabel="measured on", ylabel="fitted on")
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def _cell(value: float, num_columns: int) -> str:
    if not np.isfinite(value):
        return "?"
    return brief(float(value)) if num_columns <= 3 else brief(float(f"{value:.1e}")).removeprefix("0") or "0"


def _mixtures(report: Report, scheme: Scheme) -> Figure | None:
    points = at(report, "mixtures", "points") or []
    shift, gap, coverage = (_numbers([point[key] for point in points]) for key in ("shift", "gap", "coverage"))
    panels = [
        (title, values)
        for title, values in (("centroid gap, held out", gap), ("share of image centroids reached", coverage))
        if np.isfinite(values).any()
    ]
    if not panels:
        return None
    colour = _colour_of(report, scheme, report["mixtures"]["method"])
    figure = _figure(0.7 + 2.0 * len(panels))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False).ravel()
    for axes, (title, values) in zip(grid, panels, strict=True):
        axes.plot(shift, values, "-o", color=colour, clip_on=False, zorder=3)
        axes.set_title(title)
        if values is gap:
            floor = report["noise_floor"]
            axes.set_ylim(*_around([*values, floor or 0], 1.8, 1.6))
            _logarithmic(axes, "y")
            if floor:
                axes.axhline(floor, color=scheme.muted, ls=(0, (4, 2)), linewidth=1.6)
                axes.annotate("noise floor", (1, floor), (0, 4), ("axes fraction", "data"), "offset points", ha="right")
        else:
            axes.set_ylim(0, 1.05)
            axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
            axes.grid(True, axis="y")
    grid[-1].set_xlabel("share of the text drawn from elsewhere")
    return figure


_PLOTS: dict[str, Callable[[Report, Scheme], Figure | None]] = {
    "gap": _gap,
    "scatter": _scatter,
    "cosines": _cosines,
    "spectra": _spectra,
    "occupancy": _occupancy,
    "drift": _drift,
    "sample_size": _sample_size,
    "transfer": _transfer,
    "mixtures": _mixtures,
}
