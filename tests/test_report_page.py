"""The figures and the page of a report, from made-up measurements."""

import base64
import json
import re
import shutil
import struct
import subprocess
import sys
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest

from realign_fast.geometry import _page, _plots

FIGURES = {"gap", "scatter", "cosines", "spectra", "occupancy", "drift", "sample_size", "transfer", "mixtures"}
METHODS = ("none", "realign", "c3", "ot", "anchor_trace")


def spectrum(exponent, scale):
    ranks = np.unique(np.geomspace(1, 512, 60).astype(int))
    values = scale * ranks ** -float(exponent) * np.exp(-((ranks / 400.0) ** 4))
    return {"values": values.tolist(), "ranks": ranks.tolist(), "exponent": exponent, "range": [10, 200]}


def cosines(centre, width, **more):
    edges = np.linspace(-1, 1, 201)
    density = np.exp(-(((edges[1:] + edges[:-1]) / 2 - centre) ** 2) / (2 * width**2))
    return {"edges": edges.tolist(), "density": (density / density.sum() * 100).tolist(), **more}


def measure(value, p_value):
    return {"value": value, "interval": [0.9 * value, 1.1 * value], "null": value / 3, "p_value": p_value}


def method(name, paired, rng):
    place = METHODS.index(name)
    gap = (0.851, 0.0031, 0.049, 0.0034, 0.0063)[place]
    steps = [["none", 0.851], ["anchor", 0.0067], ["anchor_trace", 0.0063], ["realign", 0.0015]]
    if name != "realign":
        steps = [["none", 0.851]] + [[name, gap]] * (name != "none")
    points = rng.normal(size=(400, 2)) * (0.12, 0.09) + (0.85 * (name == "none"), 0.0)
    image, text = rng.dirichlet(np.full(64, 2.0)), rng.dirichlet(np.full(64, 0.05 if name == "none" else 1.0))
    recall = {"1": 0.316, "5": 0.5523, "10": 0.66} if paired else None
    js = (0.31, 0.0066, 0.19, 0.0021, 0.0071)[place]
    return {
        "name": name,
        "options": {} if name == "none" else {"refine": 0},
        "seconds": None if name == "none" else 12.34,
        "notes": ["Fitted without its noise."] if name == "c3" else [],
        "gap": {
            "steps": steps,
            "value": gap,
            "in_sample": gap / 2,
            "noise_floor": 0.003,
            "interval": [0.94 * gap, 1.1 * gap],
        },
        "spectrum": spectrum((1.33, 1.33, 1.06, 1.79, 1.34)[place], 0.02 + 0.005 * place),
        "cosines": cosines(*((0.55, 0.11), (0.31, 0.12), (0.26, 0.11), (0.29, 0.13), (0.31, 0.12))[place], js=js),
        "scatter": points.tolist(),
        "drift": {"measured": 0.0063, "predicted": 0.0058, "paper": 0.17} if name == "realign" else None,
        "mixing": {"value": 0.115, "interval": [0.11, 0.12], "k": 20, "text": 0.5, "image": 0.4},
        "overlap": {"value": 1.0 if name == "none" else 0.907, "interval": [0.9, 0.915], "k": 10},
        "recall": {"text_to_image": recall, "image_to_text": recall} if paired else None,
        "cosine_to_pair": 0.679 if paired else None,
        "residual": {"anisotropy": 32.0, "effective_dimension": 58.4} if paired else None,
        "pairwise_correlation": 0.95,
        "effective_rank": 210.4,
        "covariance_gap": 0.7,
        "spectrum_correlation": 0.982,
        "subspace_overlap": 0.41,
        "occupancy": {
            "num_centroids": 64,
            "text": text.tolist(),
            "image": image.tolist(),
            "js": 0.2,
            "coverage": 0.9,
            "agreement": 0.44 if paired else None,
        },
        "two_sample": {
            "mmd": measure(0.0123, 0.004),
            "sliced_wasserstein": measure(0.051, 0.02),
            "frechet": measure(0.23, 1.0),
        },
    }


def example(names=METHODS, paired=True):
    rng = np.random.default_rng(0)
    sets = {
        name: {"name": name, "paths": [f"/data/{name}"], "rows": 1_000_000, "dim": 768, "bad_rows": 0}
        for name in ("text", "image")
    }
    rows = [100, 300, 1000, 3000, 10_000, 30_000]
    return {
        "format": "realign-report",
        "version": 1,
        "package": "0.1.0",
        **sets,
        "paired": paired,
        "measured_on": {"rows": 500_000, "used_in_fit": False, "sample": 20_000, "seed": 0},
        "noise_floor": 0.0030,
        "verdict": [
            {
                "level": "good",
                "title": "Aligned",
                "text": "The mean text row now lies where the mean image row lies: on held-out rows the gap fell from "
                "0.851 to 0.0031, which is the noise of a sample of this size.",
            },
            {
                "level": "warn",
                "title": "The shapes still differ",
                "text": "Text falls off more slowly over its directions (exponent 1.33) than images do (1.83).",
            },
            {
                "level": "bad",
                "title": "Neighbourhoods do not mix",
                "text": "Of a row's 20 nearest neighbours 12 % come from the other set; one cloud would give 50 %.",
            },
            {
                "level": "none",
                "title": "What to do",
                "text": "Use these rows in place of images for training. For search use center, which keeps recall.",
            },
        ],
        "target": {
            "spectrum": spectrum(1.83, 0.05),
            "cosines": cosines(0.3, 0.13),
            "scatter": (rng.normal(size=(400, 2)) * (0.13, 0.1)).tolist(),
        },
        "methods": [method(name, paired, rng) for name in names],
        "sample_size": {
            "method": "realign",
            "points": [{"rows": n, "mean": 0.62 / n**0.5, "std": 0.06 / n**0.5, "floor": 0.6 / n**0.5} for n in rows],
        },
        "transfer": {
            "method": "realign",
            "names": ["coco", "products", "a longer name of a set"],
            "gap": [[0.003, 0.31, 0.28], [0.35, 0.0041, 0.12], [0.3, 0.11, 0.0038]],
            "mixing": [[0.2, 0.02, 0.03], [0.01, 0.19, 0.08], [0.02, 0.05, 0.21]],
        },
        "mixtures": {
            "method": "realign",
            "points": [
                {"shift": share, "gap": 0.003 + 0.3 * share**1.5, "coverage": 0.95 - 0.5 * share, "js": 0.02 + share}
                for share in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
            ],
        },
        "frame": {
            "rank": 120,
            "energy": 0.95,
            "beta_norm": 0.81,
            "gamma_norm": 0.21,
            "delta_trace": 0.52,
            "zeta_trace": 0.031,
            "delta_condition": 31.2,
            "zeta_condition": 4.1,
            "gamma_angle_deg": 84.0,
        },
        "notes": ["Neighbours were taken on 20,000 rows a side."],
    }


# What may be null as a whole; what else stands in a report is a number or stays.
OBJECTS = (
    "residual",
    "spectrum",
    "cosines",
    "scatter",
    "drift",
    "mixing",
    "overlap",
    "recall",
    "occupancy",
    "two_sample",
)
OBJECTS += ("gap", "interval", "range", "transfer", "mixtures", "frame", "sample_size")


def hollow(node, share, rng, key=""):
    """The same with a share of its numbers and objects null."""
    if (isinstance(node, int | float) and not isinstance(node, bool)) or key in OBJECTS:
        node = None if rng.random() < share else node
    if isinstance(node, dict):
        return {name: hollow(value, share, rng, name) for name, value in node.items()}
    if isinstance(node, list) and len(node) < 20:
        return [hollow(value, share, rng) for value in node]
    return node


@pytest.fixture(scope="module")
def report():
    return example()


@pytest.fixture(scope="module")
def drawn(report):
    return _plots.draw(report, False), _plots.draw(report, True)


@pytest.fixture(scope="module")
def page(report, drawn):
    return _page.render(report, *drawn)


@pytest.fixture
def coarse(monkeypatch):
    monkeypatch.setattr(_plots, "_DPI", 30)


class Page(HTMLParser):
    """Reads a page: its tags, what it says, and whether every tag that opens closes."""

    EMPTY = ("meta", "img", "source", "wbr", "path", "circle", "rect")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.said = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return "".join(self.said)


def size(png):
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


def test_every_figure_in_both_schemes(drawn):
    light, dark = drawn
    assert set(light) == set(dark) == FIGURES
    for name in FIGURES:
        assert size(light[name]) == size(dark[name])
        assert size(light[name])[0] == round(_plots._WIDTH * _plots._DPI)
        assert light[name] != dark[name]


@pytest.mark.parametrize(("count", "paired"), [(1, True), (1, False), (2, False), (4, True)])
def test_any_number_of_methods(count, paired, coarse):
    report = example(METHODS[:count], paired)
    light = _plots.draw(report, False)
    assert set(light) == (FIGURES if count > 1 else FIGURES - {"drift"})
    page = Page(_page.render(report, light, light))
    assert ("Cosine to the pair" in page.text) == paired
    assert ("Recall@1, text to image" in page.text) == paired


def test_more_methods_than_colours(coarse):
    report = example(("none",))
    report["methods"] += [{**method("realign", True, np.random.default_rng(0)), "name": f"m{i}"} for i in range(9)]
    assert set(_plots.draw(report, True)) == FIGURES
    assert len({_plots.LIGHT.method(i) for i in range(6)}) == 6
    assert _plots.LIGHT.method(6) == _plots.LIGHT.method(1)


@pytest.mark.parametrize(("share", "seed"), [(0.1, 0), (0.1, 1), (0.3, 2), (0.5, 3), (0.8, 4), (1.0, 5)])
def test_nulls(share, seed, coarse):
    report = hollow(example(METHODS[:3]), share, np.random.default_rng(seed))
    light = _plots.draw(report, False)
    page = Page(_page.render(report, light, light))
    assert len(page.all("img")) == len(light)
    assert not re.search(r"\b(None|nan|null)\b", page.text)
    if share == 1.0:
        assert not light
        assert "Figures" not in page.text
        assert "Centroid gap" not in page.text.partition("Definitions")[0]


def test_a_null_among_values_is_said(report, drawn):
    page = Page(_page.render(report, *drawn))
    seconds = page.text.partition("Seconds")[2]
    assert seconds.startswith("not measured12.312.3")


def test_same_report_same_bytes(report, drawn):
    assert _plots.draw(report, False) == drawn[0]


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1.9])
def test_extreme_gaps(gap, coarse):
    report = example(("none", "realign"))
    report["methods"][1]["gap"] |= {"value": gap, "interval": [gap, gap]}
    report["sample_size"]["points"] = report["sample_size"]["points"][:1]
    report["mixtures"]["points"] = report["mixtures"]["points"][:1]
    assert set(_plots.draw(report, False)) == FIGURES


@pytest.mark.parametrize("num_sets", [1, 2, 5, 8])
def test_transfer_between_any_number_of_sets(num_sets, coarse):
    names = [f"$set_{{{i}}}$ \n of {'w' * i}\N{CJK UNIFIED IDEOGRAPH-4E2D}" for i in range(num_sets)]
    gap = [[0.3 if row != column else None for row in range(num_sets)] for column in range(num_sets)]
    gap[0][0] = 0.0
    report = hollow(example(("none",)), 1, np.random.default_rng(0))
    report["transfer"] = {"method": "none", "names": names, "gap": gap, "mixing": gap}
    assert set(_plots.draw(report, False)) == {"transfer"}


def test_page_is_whole_and_asks_the_network_for_nothing(page):
    parsed = Page(page)
    assert "://" not in page
    assert not parsed.all("script")
    assert not parsed.all("link")
    assert not parsed.all("a")
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "srcset", "href"):
                assert value.startswith("data:image/png;base64,"), tag
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page


def test_every_figure_once_for_each_scheme(page, drawn):
    parsed = Page(page)
    assert len(parsed.all("img")) == len(parsed.all("source")) == len(FIGURES)
    for images, tag, key in ((drawn[0], "img", "src"), (drawn[1], "source", "srcset")):
        found = [base64.b64decode(attributes[key].partition(",")[2]) for attributes in parsed.all(tag)]
        assert sorted(found) == sorted(images.values())
    assert all("(prefers-color-scheme: dark)" in attributes["media"] for attributes in parsed.all("source"))
    for attributes in parsed.all("img"):
        png = base64.b64decode(attributes["src"].partition(",")[2])
        assert (int(attributes["width"]), int(attributes["height"])) == size(png)


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("gap", "as it is 0.851, realign 0.0031, c3 0.049"),
        ("scatter", "realign 0.0"),
        ("cosines", "realign 0.0066"),
        ("spectra", "images: 1.83; of text: as it is 1.33"),
        ("occupancy", "reaches: as it is 0.9"),
        ("drift", "measured: realign 0.0063; predicted: realign 0.0058"),
        ("sample_size", "realign is 0.062 with 100 rows (noise floor 0.06) and"),
        ("transfer", "coco on products 0.31"),
        ("mixtures", "at 1 gap 0.303, coverage 0.45"),
    ],
)
def test_alternative_text_states_the_finding(page, name, finding):
    figure = page.partition(f'<figure id="{name}">')[2].partition("</figure>")[0]
    (image,) = Page(figure).all("img")
    assert finding in image["alt"]


def test_what_the_page_says(page):
    text = Page(page).text
    for said in ("Good", "Take care", "Bad", "Note", "Aligned", "0.00291\N{EN DASH}0.00341", "@5 0.552", "p 0.004",
                 "1,000,000 rows", "Fitted without its noise.", "refine=0", "arXiv 2602.07026"):  # fmt: skip
        assert said in text
    assert "e+" not in text
    assert "e-0" not in text


@pytest.mark.parametrize(
    ("used", "said"), [(True, "which flatters it"), (False, "has not seen them"), (None, "cannot be known")]
)
def test_rows_of_the_fit_are_owned_up_to(report, drawn, used, said):
    other = report | {"measured_on": report["measured_on"] | {"used_in_fit": used}}
    assert said in Page(_page.render(other, *drawn)).text


HOSTILE = "<script>alert(1)</script>\"'&amp;</style>"


def hostile(node, key=""):
    if isinstance(node, dict):
        return {name: hostile(value, name) for name, value in node.items()}
    if isinstance(node, list):
        return [hostile(value, key) for value in node]
    return HOSTILE if isinstance(node, str) and key not in ("level", "format") else node


def test_strings_from_outside_are_text(drawn):
    report = hostile(example(("none", "realign")))
    report["methods"][1]["options"] = {HOSTILE: HOSTILE}
    page = _page.render(report, *drawn)
    parsed = Page(page)
    assert not parsed.all("script")
    assert page.count("</style>") == 1
    assert HOSTILE not in page
    assert parsed.text.count(HOSTILE) > 15
    assert all(HOSTILE in image["alt"] for image in parsed.all("img") if "coco" in image["alt"])


def test_strings_from_outside_are_drawn(coarse):
    assert set(_plots.draw(hostile(example(("none", "realign"))), False)) == FIGURES


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not measured"),
        (float("nan"), "not measured"),
        (0.0, "0"),
        (1.0, "1.00"),
        (0.99996, "1.00"),
        (0.851, "0.851"),
        (0.0031, "0.00310"),
        (-0.0123, "\N{MINUS SIGN}0.0123"),
        (12.345, "12.3"),
        (1234.5, "1,234"),
        (1_000_000, "1,000,000"),
        (-3, "\N{MINUS SIGN}3"),
        (3.14159e-7, "3.14 \N{MULTIPLICATION SIGN} 10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT SEVEN}"),
    ],
)
def test_numbers(value, text):
    assert _plots.number(value) == text


def test_brief_numbers():
    assert [_plots.brief(value) for value in (0.31, 1.0, 100.0, 2e-9)] == ["0.31", "1", "100", _plots.number(2e-9)]


def test_missing_matplotlib(monkeypatch, report):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^the report needs matplotlib: pip install 'realign-fast\[report\]'$"):
        _plots.draw(report, False)


def test_pyplot_and_settings_are_left_alone(report):
    matplotlib = pytest.importorskip("matplotlib")
    names = set(matplotlib.rcParams) - {"backend"}
    before = [matplotlib.rcParams[name] for name in names]
    _plots.draw({**report, "methods": report["methods"][:1]}, True)
    assert [matplotlib.rcParams[name] for name in names] == before
    code = "import sys, json; from realign_fast.geometry import _page, _plots; print('matplotlib' in sys.modules); "
    code += "_plots.draw(json.load(sys.stdin), False); print('matplotlib.pyplot' in sys.modules)"
    short = json.dumps(example(("none",)) | {"transfer": None, "mixtures": None, "sample_size": None})
    done = subprocess.run([sys.executable, "-c", code], input=short, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


MEASURE = """<script>addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const root = frame.contentDocument.documentElement;
    return [root.clientWidth, root.scrollWidth, root.scrollHeight];
  });
  document.body.textContent = "found " + JSON.stringify(found);
})</script>"""


def test_nothing_is_wider_than_a_phone(page, drawn, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium to measure the page with")
    long = hostile(example())
    long["text"]["name"] = "w" * 300
    long["text"]["paths"] = [f"/{'p' * 200}/{i}.npy" for i in range(3)]
    long["methods"][1]["name"] = "a_map_with_a_long_name" * 4
    pages = [page, _page.render(long, *drawn), page.replace("<style>", "<style>html{font-size:200%}")]
    frames = "".join(f'<iframe width="360" height="900" srcdoc="{escape(text)}"></iframe>' for text in pages)
    (tmp_path / "frames.html").write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{frames}{MEASURE}</body>")
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "frames.html").as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    found = json.loads(re.search(r"found (\[.*\])", done.stdout)[1])
    assert len(found) == len(pages)
    for inner, wide, high in found:
        assert 300 < inner <= 360
        assert wide <= inner
        assert high > 5000
