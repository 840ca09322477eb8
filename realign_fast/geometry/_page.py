"""The page of a report: one HTML file that needs nothing beside itself, no script and no network.

Whatever comes from outside (names, paths, options, notes) passes through `_text`. Should one ever not, the page's own
policy still lets nothing run and nothing load.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from typing import Any

from ._plots import DARK, LIGHT, Report, Scheme, at, brief, number, shown

Method = Mapping[str, Any]


def render(report: Report, light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    """Return the HTML of a report with its figures, PNG images by name, for both colour schemes."""
    title = f"{report['text']['name']} and {report['image']['name']}: did the alignment work?"
    parts = [
        _header(report),
        _verdict(report["verdict"]),
        _section("Side by side", _table(report)),
        _section("Figures", f'<div class="figures">{_figures(report, light, dark)}</div>' if light else ""),
        _section("How it was measured", _measured(report)),
        _section("Definitions and sources", _definitions()),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title)}</title>\n<style>{_style(len(report['methods']))}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + f"\n</main>\n<footer>Written by realign-fast {_text(report['package'])}.</footer>\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return escape(str(value), quote=True)


def _prose(value: str) -> str:
    """Return text whose percent signs stay with their numbers."""
    return _text(value).replace(" %", "\N{NO-BREAK SPACE}%")


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>" if body else ""


def _list(items: Iterable[str]) -> str:
    listed = "".join(f"<li>{item}</li>" for item in items)
    return f"<ul>{listed}</ul>" if listed else ""


def _terms(pairs: Iterable[tuple[str, str]], kind: str) -> str:
    listed = "".join(f"<div><dt>{term}</dt><dd>{meaning}</dd></div>" for term, meaning in pairs)
    return f'<dl class="{kind}">{listed}</dl>' if listed else ""


def _name(method: Method, index: int) -> str:
    return f'<span class="key m{index}"></span>{_text(shown(method))}'


def _header(report: Report) -> str:
    sets = []
    for role, colour in (("text", "m0"), ("image", "image")):
        side = report[role]
        facts = [f"{number(side['rows'])} rows of {number(side['dim'])} numbers"]
        if side["bad_rows"]:
            facts.append(f"{number(side['bad_rows'])} bad rows")
        paths = [f"<code>{_text(path)}</code>" for path in side["paths"]]
        more = f"<details><summary>{len(paths)} paths</summary>{_list(paths)}</details>" if len(paths) > 1 else ""
        where = more or "".join(paths)
        sets.append(
            f'<div class="set"><p><span class="key {colour}"></span><strong>{_text(side["name"])}</strong></p>'
            f"<p>{', '.join(facts)}</p>{where}</div>"
        )
    pairing = "Row i of one belongs to row i of the other." if report["paired"] else "The two are not paired."
    text, image = (f"<strong>{_text(report[role]['name'])}</strong>" for role in ("text", "image"))
    return (
        "<header>\n<h1>Did the alignment work?</h1>\n"
        f"<p>The rows of {text}, mapped to where those of {image} lie. {pairing}</p>\n"
        f'<div class="sets">{"".join(sets)}</div>\n</header>'
    )


# A word and a shape for each level, so that nothing hangs on its colour.
_LEVELS = {
    "good": ("Good", '<circle cx="12" cy="12" r="11"/><path d="M6.5 12.5l3.8 3.8 7.2-8"/>'),
    "warn": ("Take care", '<path class="area" d="M12 1.5L23.5 22H.5z"/><path d="M12 9v6M12 18v.6"/>'),
    "bad": ("Bad", '<path class="area" d="M7.5 1h9L23 7.5v9L16.5 23h-9L1 16.5v-9z"/><path d="M8 8l8 8M16 8l-8 8"/>'),
    "none": ("Note", '<rect x="1" y="1" width="22" height="22" rx="5"/><path d="M12 6v.6M12 10.5v7.5"/>'),
}


def _verdict(entries: Sequence[Mapping[str, str]]) -> str:
    cards = []
    for entry in entries:
        word, shape = _LEVELS[entry["level"]]
        cards.append(
            f'<article class="card {entry["level"]}"><p class="level"><svg viewBox="0 0 24 24" aria-hidden="true">'
            f"{shape}</svg>{word}</p><h3>{_text(entry['title'])}</h3><p>{_prose(entry['text'])}</p></article>"
        )
    return f'<section class="verdict" aria-label="Verdict">\n{"".join(cards)}\n</section>'


@dataclass(frozen=True)
class _Row:
    """A line of the table: its title, what it means in a sentence, and where its value lies in a method."""

    title: str
    meaning: str
    path: str

    def value(self, method: Method) -> float | None:
        found: float | None = at(method, *self.path.split("."))
        return found

    def notes(self, method: Method) -> Iterable[str]:
        """Yield what stands below the value in small: what was taken of its chance."""
        *parent, last = self.path.split(".")
        if parent[:1] == ["recall"]:
            yield from (f"@{_text(k)} {number(share)}" for k, share in (at(method, *parent) or {}).items() if k != last)
        elif last == "value":
            node = at(method, *parent)
            interval, null, p_value = at(node, "interval"), at(node, "null"), at(node, "p_value")
            if interval is not None and None not in interval:
                between = " to " if interval[0] < 0 else "\N{EN DASH}<wbr>"
                yield f"{number(interval[0])}{between}{number(interval[1])}"
            if null is not None:
                yield f"chance {number(null)}"
            if p_value is not None:
                yield f"p {brief(p_value)}"


def _first(report: Report, *path: str) -> Any:
    return next((found for method in report["methods"] if (found := at(method, *path)) is not None), None)


def _groups(report: Report) -> Iterable[tuple[str, list[_Row]]]:
    where = {True: "rows the fit saw too", False: "rows the fit has not seen", None: "the rows measured"}
    rows = where[report["measured_on"]["used_in_fit"]]
    yield (
        "Means",
        [
            _Row("Centroid gap", f"Distance between the mean rows of text and images, on {rows}.", "gap.value"),
            _Row("Noise floor", "What two samples of one set, of these sizes, would show.", "gap.noise_floor"),
            _Row("Gap in sample", "The same distance on the rows the map was fitted to.", "gap.in_sample"),
        ],
    )
    yield (
        "Neighbourhoods",
        [
            _Row(
                "Mixing" + _of_k(_first(report, "mixing", "k")),
                "Share of a row's nearest neighbours that come from the other set; 0.5 is one cloud.",
                "mixing.value",
            ),
            _Row(
                "Mixing around text", "How evenly both sets share a text row's neighbours; 1 is evenly.", "mixing.text"
            ),
            _Row("Mixing around images", "How evenly both sets share an image row's neighbours.", "mixing.image"),
            _Row(
                "Overlap" + _of_k(_first(report, "overlap", "k")),
                "Share of a text row's nearest text rows that the map leaves among them; 1 keeps all.",
                "overlap.value",
            ),
            _Row(
                "Cosines kept", "Correlation of the cosines among text rows before and after.", "pairwise_correlation"
            ),
        ],
    )
    yield (
        "Pairs",
        [
            *(
                _Row(
                    f"Recall@{_text(k)}, {query} to {wanted}",
                    f"Share of {query} rows with their own {wanted} among the k nearest.",
                    f"recall.{query}_to_{wanted}.{k}",
                )
                for query, wanted in (("text", "image"), ("image", "text"))
                for k in list(_first(report, "recall", f"{query}_to_{wanted}") or ())[:1]
            ),
            _Row("Cosine to the pair", "Mean cosine between a text row and its own image.", "cosine_to_pair"),
            _Row(
                "Residual anisotropy", "Largest spread of pairs' differences, by the mean one.", "residual.anisotropy"
            ),
            _Row("Residual dimension", "Over about how many directions they spread.", "residual.effective_dimension"),
        ],
    )
    exponent, ranks = (at(report, "target", "spectrum", key) for key in ("exponent", "range"))
    over = f" over ranks {number(ranks[0])} to {number(ranks[1])}" if ranks else ""
    images = "" if exponent is None else f"; {number(exponent)} for the images"
    yield (
        "Shape",
        [
            _Row(
                "Angular JS", "How far angles among text rows differ from those among images; 0 is alike.", "cosines.js"
            ),
            _Row("Spectrum exponent", f"How fast eigenvalues fall with rank{over}{images}.", "spectrum.exponent"),
            _Row("Effective rank", "Over about how many directions the text spreads.", "effective_rank"),
            _Row("Covariance gap", "Distance of the covariances, against the size of the images'.", "covariance_gap"),
            _Row("Spectrum correlation", "Whether the spectra fall alike; 1 is alike.", "spectrum_correlation"),
            _Row("Subspace overlap", "Share of the images' leading directions that text has too.", "subspace_overlap"),
        ],
    )
    yield (
        "Distributions",
        [
            _Row(
                "Fréchet", "Distance of Gaussians with the means and covariances of both.", "two_sample.frechet.value"
            ),
            _Row(
                "Sliced Wasserstein",
                "Distance of both along random directions, on average.",
                "two_sample.sliced_wasserstein.value",
            ),
            _Row("MMD", "Largest difference in mean that a kernel sees.", "two_sample.mmd.value"),
        ],
    )
    yield (
        "Image centroids",
        [
            _Row("Occupancy JS", "How far text's shares of the centroids differ from the images'.", "occupancy.js"),
            _Row("Coverage", "Share of the image centroids that text reaches.", "occupancy.coverage"),
            _Row("Agreement", "Share of text rows in the centroid of their own image.", "occupancy.agreement"),
        ],
    )
    yield "Cost", [_Row("Seconds", "Time the fit took.", "seconds")]


def _of_k(k: int | None) -> str:
    return "" if k is None else f", k {number(k)}"


def _table(report: Report) -> str:
    methods = report["methods"]
    head = "".join(f'<th scope="col">{_name(method, index)}</th>' for index, method in enumerate(methods))
    bodies = []
    for title, rows in _groups(report):
        lines = [_line(row, methods) for row in rows if any(row.value(method) is not None for method in methods)]
        if lines:
            group = f'<th class="group" scope="rowgroup" colspan="{len(methods) + 1}"><span>{title}</span></th>'
            bodies.append(f"<tbody><tr>{group}</tr>{''.join(lines)}</tbody>")
    return (
        f'<div class="scroll" style="--methods:{len(methods)}" role="region" aria-label="Measurements of every method" '
        'tabindex="0"><table>'
        f'<thead><tr><th scope="col">Measure</th>{head}</tr></thead>{"".join(bodies)}</table></div>'
        "<p>Small numbers below a value are its 95 % interval; for distributions also what two samples of one "
        "distribution give in 95 of 100 cases (chance), and how often they give more than the value (p).</p>"
    )


def _line(row: _Row, methods: Sequence[Method]) -> str:
    cells = []
    for method in methods:
        value = row.value(method)
        if value is None:
            cells.append('<td class="missing">not measured</td>')
        else:
            notes = "".join(f"<small>{note}</small>" for note in row.notes(method))
            cells.append(f"<td>{number(value)}{notes}</td>")
    meaning = f'<td colspan="{len(methods) + 1}"><small>{row.meaning}</small></td>'
    return f'<tr><th scope="row">{row.title}</th>{"".join(cells)}</tr><tr class="meaning">{meaning}</tr>'


@dataclass(frozen=True)
class _Figure:
    """How a figure is headed, how it is read, and what it shows in words."""

    title: str
    reading: str
    finding: Callable[[Report], str]


def _each(report: Report, *path: str | int) -> str:
    found = [(shown(method), at(method, *path)) for method in report["methods"]]
    return ", ".join(f"{name} {brief(value)}" for name, value in found if value is not None) or "not measured"


def _find_gap(report: Report) -> str:
    return f"Held-out centroid gap: {_each(report, 'gap', 'value')}. Noise floor: {brief(report['noise_floor'])}."


def _find_scatter(report: Report) -> str:
    centre = _centre(report["target"]["scatter"])
    found = [
        f"{shown(method)} {brief(math.dist(centre, _centre(method['scatter'])))}"
        for method in report["methods"]
        if method["scatter"]
    ]
    return f"Distance between the means of text and images in this plane: {', '.join(found)}."


def _centre(points: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*points, strict=True)]


def _find_cosines(report: Report) -> str:
    return f"Jensen-Shannon divergence between pairwise cosines of text and images: {_each(report, 'cosines', 'js')}."


def _find_spectra(report: Report) -> str:
    exponent = brief(at(report, "target", "spectrum", "exponent"))
    return f"Spectrum exponent of the images: {exponent}; of text: {_each(report, 'spectrum', 'exponent')}."


def _find_occupancy(report: Report) -> str:
    return (
        f"Share of image centroids that text reaches: {_each(report, 'occupancy', 'coverage')}. "
        f"Jensen-Shannon divergence of the shares: {_each(report, 'occupancy', 'js')}."
    )


def _find_drift(report: Report) -> str:
    return (
        f"Drift of the centroid, measured: {_each(report, 'drift', 'measured')}; predicted: "
        f"{_each(report, 'drift', 'predicted')}; by the paper's second order: {_each(report, 'drift', 'paper')}."
    )


def _find_sample_size(report: Report) -> str:
    study = report["sample_size"]
    points = [point for point in study["points"] if point["mean"] and point["rows"]]
    found = " and ".join(
        f"{brief(point['mean'])} with {brief(point['rows'])} rows (noise floor {brief(point['floor'])})"
        for point in (points[0], points[-1])
    )
    return f"The held-out gap of {study['method']} is {found}."


def _find_transfer(report: Report) -> str:
    transfer = report["transfer"]
    names = transfer["names"]
    found = [
        f"{fitted} on {measured} {brief(at(transfer, 'gap', row, column))}"
        for row, fitted in enumerate(names)
        for column, measured in enumerate(names)
    ]
    return f"Centroid gap of {transfer['method']}, fitted on one set and measured on another: {', '.join(found)}."


def _find_mixtures(report: Report) -> str:
    study = report["mixtures"]
    found = ", ".join(
        f"at {brief(point['shift'])} gap {brief(point['gap'])}, coverage {brief(point['coverage'])}"
        for point in (study["points"][0], study["points"][-1])
    )
    return f"{study['method']} fitted on text of which a share is drawn from elsewhere: {found}."


_FIGURES = {
    "gap": _Figure(
        "Distance of the means",
        "A filled mark inside the shaded strip cannot be told from zero with this many rows; hollow marks are steps on "
        "the way.",
        _find_gap,
    ),
    "scatter": _Figure(
        "The clouds in one plane",
        "The same two directions in every panel: an alignment has worked where text and images cover one another and "
        "their means coincide.",
        _find_scatter,
    ),
    "cosines": _Figure(
        "Angles within each set",
        "The nearer a curve lies to the shaded one, the more alike are the angles among text rows to those among "
        "images.",
        _find_cosines,
    ),
    "spectra": _Figure(
        "Spread over directions",
        "A steeper line means that fewer directions carry the spread; a map that only shifts and scales cannot change "
        "its slope much.",
        _find_spectra,
    ),
    "occupancy": _Figure(
        "Which image regions text reaches",
        "Text that stands in for images follows the edge of the blue area; where it is missing, no text comes near "
        "those images.",
        _find_occupancy,
    ),
    "drift": _Figure(
        "Drift after the projection",
        "Projecting back to the sphere moves the mean by this much, which the centroid step removes; hollow marks are "
        "predictions of it.",
        _find_drift,
    ),
    "sample_size": _Figure(
        "How many rows a fit needs",
        "Where the line runs along the dashed one, more rows are all that would help; where it flattens above it, "
        "something else is left.",
        _find_sample_size,
    ),
    "transfer": _Figure(
        "From one data set to another",
        "Each cell is a map fitted on the set of its row and measured on that of its column; the diagonal is the usual "
        "case.",
        _find_transfer,
    ),
    "mixtures": _Figure(
        "Fitted on other text",
        "To the right the text of the fit resembles the text in use less and less; a flat line means that it does not "
        "matter.",
        _find_mixtures,
    ),
}


def _figures(report: Report, light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    return "\n".join(
        f'<figure id="{name}"><figcaption><h3>{figure.title}</h3><p>{figure.reading}</p></figcaption><picture>'
        f'<source media="screen and (prefers-color-scheme: dark)" srcset="{_data(dark[name])}">'
        f'<img src="{_data(light[name])}" {_size(light[name])} alt="{_text(figure.finding(report))}"></picture>'
        "</figure>"
        for name, figure in _FIGURES.items()
        if name in light
    )


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _size(png: bytes) -> str:
    width, height = struct.unpack(">II", png[16:24])
    return f'width="{width}" height="{height}"'


def _measured(report: Report) -> str:
    measured = report["measured_on"]
    seen = {
        True: "The fit saw them too, which flatters it.",
        False: "The fit has not seen them.",
        None: "Whether a fit made elsewhere has seen them cannot be known.",
    }[measured["used_in_fit"]]
    facts = [
        ("Rows measured", f"{number(measured['rows'])} a side. {seen}"),
        ("Sample", f"Neighbours, pairs and distributions on {number(measured['sample'])} rows a side."),
        ("Seed", _text(measured["seed"])),
        ("Noise floor", f"{brief(report['noise_floor'])} for two samples of these sizes from one distribution."),
    ]
    for index, method in enumerate(report["methods"]):
        options = ", ".join(f"{key}={json.dumps(value)}" for key, value in method["options"].items())
        code = f"<p><code>{_text(options)}</code></p>" if options else ""
        known = _MAPS.get(method["name"], "")
        facts.append((_name(method, index), known + code + _list(map(_text, method["notes"]))))
    frame = [(title, at(report, "frame", key)) for key, title in _FRAME]
    values = [(title, number(value)) for title, value in frame if value is not None]
    framed = (
        "<h3>The fixed frame of the pairs</h3><p>The leading directions of both sets together, and how the difference "
        f"between an image and its text lies to them.</p>{_terms(values, 'values')}"
    )
    notes = _list(map(_text, report["notes"]))
    return _terms(facts, "facts") + (f"<h3>Notes</h3>{notes}" if notes else "") + (framed if values else "")


_FRAME = (
    ("rank", "Directions in the frame"),
    ("energy", "Share of the spread in it"),
    ("beta_norm", "Mean difference in the frame"),
    ("gamma_norm", "Mean difference outside"),
    ("delta_trace", "Spread of differences in the frame"),
    ("zeta_trace", "Spread of differences outside"),
    ("delta_condition", "Condition number in the frame"),
    ("zeta_condition", "Condition number outside"),
    ("gamma_angle_deg", "Angle of the outer mean to the outer spread's first direction, in degrees"),
)

# What the maps do, by their names in `methods`.
_MAPS = {
    "none": "The text as it is, at unit length.",
    "anchor": "Shifts the mean of the text to that of the images.",
    "anchor_trace": "Shifts the mean, and scales the spread, to those of the images.",
    "realign": "Shifts and scales, then shifts what the projection has moved. ReAlign, arXiv 2602.07026.",
    "c3": "Shifts the mean, and adds noise. Connect, Collapse, Corrupt, arXiv 2401.08567.",
    "center": "Takes its own mean away from either set: for search.",
    "whiten": "Takes its own mean and covariance away from either set.",
    "coral": "Whitens the text, and colours it as the images are. Sun, Feng and Saenko 2016.",
    "bca": "The same, the leading directions apart from the rest. AnisoAlign, arXiv 2605.07825.",
    "ot": "Matches the covariances by the least movement, or goes a part of that way.",
    "debias": "Leaves out the directions in which the text varies most.",
}

_SOURCES = (
    (
        "Centroid gap",
        "The norm of the difference between the mean of the mapped text rows and the mean of the image rows, all of "
        "unit length. Liang et al., Mind the Gap, arXiv 2203.02053; ReAlign, arXiv 2602.07026.",
    ),
    (
        "Noise floor",
        "The root of the sum, over both samples, of the variance of a row divided by the number of rows: what the gap "
        "of two samples from one distribution comes to.",
    ),
    (
        "Mixing",
        "The share of the k nearest neighbours by cosine, itself left out and both sets equally large, that come from "
        "the other set; around text and images, the binary entropy of that share, divided by what shuffled labels "
        "give. ReAlign, arXiv 2602.07026.",
    ),
    (
        "Overlap",
        "The share of a text row's k nearest text rows before a map that are still among its k nearest after it. "
        "ReAlign, arXiv 2602.07026.",
    ),
    (
        "Recall and cosine to the pair",
        "For sets whose rows belong together, one to one. A map that adds one vector to every query can close the gap "
        "and lose recall: such a map is for standing in, not for search.",
    ),
    (
        "Angular JS",
        "Jensen-Shannon divergence between the histograms of pairwise cosines. Lin 1991; ReAlign, arXiv 2602.07026.",
    ),
    (
        "Spectrum exponent, effective rank",
        "The negative slope of log eigenvalue against log rank over the stated ranks; the exponential of the entropy "
        "of the normalised spectrum (Roy and Vetterli 2007).",
    ),
    (
        "Covariance gap, spectrum correlation, subspace overlap",
        "Frobenius norm of the difference of the covariances, divided by that of the images' covariance; correlation "
        "of the log spectra; squared norm of the product of both leading bases, divided by their size. AnisoAlign, "
        "arXiv 2605.07825.",
    ),
    (
        "Fréchet distance",
        "Between Gaussians with the means and covariances of the two sets. Dowson and Landau 1982; Heusel et al., "
        "arXiv 1706.08500.",
    ),
    ("Sliced Wasserstein", "The Wasserstein distance along random directions, averaged. Bonneel et al. 2015."),
    ("MMD", "Maximum mean discrepancy, a two-sample test with a kernel. Gretton et al. 2012."),
    ("Image centroids", "The images by k-means; occupancy is the share of rows nearest to each centroid."),
    (
        "Drift",
        "How far projecting to unit length moves the mean of the shifted and scaled rows away from the images' mean. "
        "The second-order formula is for small residuals; the other prediction also holds for unit rows. ReAlign, "
        "arXiv 2602.07026.",
    ),
    (
        "Residual, fixed frame",
        "Of the differences between images and their text, less their mean: the largest eigenvalue of their covariance "
        "by the mean one, and the squared trace by the trace of the square. The frame is of the leading eigenvectors "
        "of the sum of both covariances. ReAlign, arXiv 2602.07026.",
    ),
)


def _definitions() -> str:
    return _terms(_SOURCES, "terms")


def _properties(scheme: Scheme, num_methods: int) -> str:
    plain = [field.name for field in fields(scheme) if field.name != "methods"]
    colours = [f"--{name}:{getattr(scheme, name)}" for name in plain]
    return ";".join(colours + [f"--m{index}:{scheme.method(index)}" for index in range(num_methods)])


def _style(num_methods: int) -> str:
    keys = "".join(f".key.m{index}{{background:var(--m{index})}}" for index in range(num_methods))
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{_properties(DARK, num_methods)}}}}}"
    return f":root{{{_properties(LIGHT, num_methods)}}}{dark}{keys}{_CSS}"


_CSS = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);overflow-wrap:anywhere;
  font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,footer{max-width:68rem;margin:0 auto;padding:0 1rem}
header{padding:2.5rem 0 .5rem}
h1{font-size:clamp(1.7rem,5vw,2.4rem);line-height:1.15;letter-spacing:-.015em;margin:0 0 .75rem}
h2{font-size:1.4rem;line-height:1.25;margin:3rem 0 1rem}
h3{font-size:1.1rem;line-height:1.3;margin:0 0 .4rem}
p{margin:0 0 .6rem;max-width:68ch}
ul{margin:.3rem 0;padding-left:1.2rem;max-width:68ch}
code{font:.875em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;color:var(--muted)}
summary{cursor:pointer;color:var(--muted)}
small{font-size:.8125rem;line-height:1.35}
.key{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.45em}
.key.image{background:var(--image)}
.sets{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr));gap:.75rem 2rem;margin:1rem 0}
.set{border-top:1px solid var(--rule);padding-top:.6rem;color:var(--muted)}
.set p{margin:0}
.set strong{color:var(--ink)}
.verdict{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:1rem;margin-top:1.5rem}
.card{background:var(--surface);border:1px solid var(--rule);border-top:4px solid var(--level);border-radius:6px;
  padding:1rem 1.2rem}
.card:first-child{grid-column:1/-1;padding:1.4rem 1.5rem}
.card:first-child h3{font-size:clamp(1.5rem,4vw,2rem);letter-spacing:-.01em}
.card:first-child p{font-size:1.125rem}
.card p{margin:0}
.card .level,.card:first-child .level{display:flex;align-items:center;gap:.5rem;margin:0 0 .5rem;font-size:.9375rem;
  font-weight:600;color:var(--level)}
.card svg{width:1.4rem;height:1.4rem;flex:none;fill:var(--level);stroke:var(--surface);stroke-width:2.6;
  stroke-linecap:round;stroke-linejoin:round}
.card svg :first-child{stroke:none}
.card svg :last-child{fill:none}
.good{--level:var(--good)}.warn{--level:var(--warn)}.bad{--level:var(--bad)}.none{--level:var(--muted)}
.scroll{overflow-x:auto;max-width:calc(22rem + 9.5rem*var(--methods));
  background:var(--surface);border:1px solid var(--rule);border-radius:6px}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--image);outline-offset:2px}
table{border-collapse:separate;border-spacing:0;min-width:100%;font-variant-numeric:tabular-nums lining-nums}
.scroll+p{margin-top:.6rem;color:var(--muted);font-size:.875rem}
th,td{padding:.5rem .9rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--rule);
  overflow-wrap:normal}
th{font-weight:600}
tbody td{white-space:nowrap}
thead th{vertical-align:bottom;white-space:nowrap}
tr:not(.meaning)>:first-child{position:sticky;left:0;z-index:1;background:var(--surface);text-align:left;
  min-width:11rem}
tbody tr:not(.meaning)>*{border-bottom:0;padding-bottom:0}
.meaning td{padding-top:.1rem;text-align:left;white-space:normal}
.meaning small{display:block;position:sticky;left:.9rem;width:fit-content;max-width:min(56rem,100vw - 5rem)}
td small{display:block;color:var(--muted);line-height:1.25}
tr>th.group:first-child{position:static;padding-top:1.3rem;color:var(--muted);font-size:.875rem}
.group span{display:inline-block;position:sticky;left:.9rem}
.missing{color:var(--muted);font-size:.8125rem}
.figures{columns:2;column-gap:1rem}
figure{margin:0 0 1rem;padding:1rem;break-inside:avoid;background:var(--surface);border:1px solid var(--rule);
  border-radius:6px}
figure img{display:block;width:100%;max-width:34rem;height:auto}
figure picture{display:block;margin-top:.75rem}
dl{margin:0}
dl div{margin:0 0 .9rem}
dt{font-weight:600}
dd{margin:0;max-width:68ch}
.facts div,.terms div{display:grid;grid-template-columns:14rem minmax(0,1fr);gap:.2rem 1.5rem}
.values{max-width:38rem;font-variant-numeric:tabular-nums}
.values div{display:flex;justify-content:space-between;gap:1rem;margin:0;padding:.35rem 0;
  border-bottom:1px solid var(--rule)}
.values dd{flex:none}
.values dt{font-weight:400}
section>h3{margin-top:1.5rem}
footer{padding-top:2rem;padding-bottom:3rem;color:var(--muted);font-size:.875rem}
@media (max-width:56rem){
  .verdict,.facts div,.terms div{grid-template-columns:minmax(0,1fr)}
  .figures{columns:1}
}
@media (max-width:40rem){
  header{padding-top:1.5rem}
  table{font-size:.9375rem}
  th,td{padding:.45rem .5rem}
  td small{white-space:normal}
  tr:not(.meaning) small{font-size:.75rem}
  tr:not(.meaning)>:first-child{min-width:7rem;width:33vw}
  tr:not(.meaning)>:not(.group):first-child::after{content:"";position:absolute;top:0;bottom:0;left:100%;width:.5rem;
    background:linear-gradient(to right,var(--surface),transparent)}
  .meaning small,.group span{left:.5rem}
  .meaning small{max-width:calc(100vw - 4rem)}
  figure{margin-left:-.5rem;margin-right:-.5rem;padding:.75rem .5rem .5rem}
  figcaption{padding:0 .5rem}
}
@media print{
  body{background:none;font-size:10pt}
  main,footer{max-width:none;padding:0}
  .card,figure,tr,dl div{break-inside:avoid}
  h2,h3{break-after:avoid}
  .scroll{overflow:visible;border:0}
  tr:not(.meaning)>:first-child,.meaning small,.group span{position:static;min-width:0}
  figure img{max-width:11cm}
  th,td{padding:.25rem .4rem}
}
"""
