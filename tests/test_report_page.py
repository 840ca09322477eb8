"""The figures and the page of a report, from made-up measurements."""

import numpy as np

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
            "mean_bias": 0.81,
            "orthogonal_bias": 0.21,
            "residual_trace": 0.52,
            "orthogonal_trace": 0.031,
            "condition": 31.2,
            "orthogonal_condition": 4.1,
            "angle_degrees": 84.0,
        },
        "notes": ["Neighbours were taken on 20,000 rows a side."],
    }
