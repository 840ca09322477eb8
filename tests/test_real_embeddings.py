"""What the maps do to real embeddings, against figures measured in float64 with NumPy, without this package."""

import numpy as np
import pytest

import realign_fast as rf
from realign_fast.geometry.metrics import centroid_gap, cosine_to_pair, knn_mixing, knn_overlap, recall_at
from realign_fast.geometry.neighbors import mixing

PAIRED = "mindgap_clip_coco500"
SETS = (PAIRED, "mindgap_convirt500", "mindgap_videoclip", "mindgap_clasp")

# Centroid gap, mixing, overlap, recall@1, cosine to the pair: each the figure, and half a unit of its last digit.
IN_SAMPLE = {
    "none": ({}, [(0.851, 5e-4), (0.000, 5e-4), (1.000, 5e-4), (0.506, 5e-4), (0.310, 5e-4)]),
    "anchor": ({}, [(6.68e-3, 5e-6), (0.115, 5e-4), (0.907, 5e-4), (0.318, 5e-4), (0.677, 5e-4)]),
    "anchor_trace": ({}, [(6.30e-3, 5e-6), (0.114, 5e-4), (0.909, 5e-4), (0.316, 5e-4), (0.680, 5e-4)]),
    "realign": ({}, [(1.46e-3, 5e-6), (0.115, 5e-4), (0.907, 5e-4), (0.316, 5e-4), (0.679, 5e-4)]),
    "realign, refined": ({"refine": 3}, [(0, 1e-7), (0.116, 5e-4), (0.907, 5e-4), (0.316, 5e-4), (0.678, 5e-4)]),
    "coral": ({"shrinkage": 1e-4}, [(6.9e-3, 5e-5), (0.508, 5e-4), (0.109, 5e-4), (0.212, 5e-4), (0.695, 5e-4)]),
}
C3 = (4.9e-2, 0.206, 0.808, 0.314, 0.636)
# Fitted on one half, measured on the other; two digits, which the figures of one draw deserve.
HELD_OUT = {
    "none": ({}, (0.00, 1.00, 0.61, 0.31)),
    "realign": ({}, (0.21, 0.90, 0.42, 0.68)),
    "ot": ({"shrinkage": 0.5, "strength": 1.0}, (0.45, 0.63, 0.40, 0.71)),
    "ot, half": ({"shrinkage": 0.5, "strength": 0.5}, (0.356, 0.82, 0.419, 0.709)),
}


def load(shared_data, name):
    return tuple(np.load(shared_data / name / f"{side}.npy").astype(np.float64) for side in ("text", "image"))


def metrics(text, out, image):
    return np.array(
        [
            centroid_gap(out, image),
            knn_mixing(out, image, k=20),
            knn_overlap(text, out, k=10),
            recall_at(out, image),
            cosine_to_pair(out, image),
        ]
    )


def fit(name, text, image, options):
    return rf.fit(text, image, method=name.split(",")[0], **options)


@pytest.mark.parametrize("name", IN_SAMPLE)
def test_in_sample(shared_data, name):
    text, image = load(shared_data, PAIRED)
    options, wanted = IN_SAMPLE[name]
    out = text if name == "none" else fit(name, text, image, options).transform(text)
    for found, (figure, half_digit) in zip(metrics(text, out, image), wanted, strict=True):
        assert found == pytest.approx(figure, abs=1.001 * half_digit)


def test_noise_in_sample(shared_data):
    text, image = load(shared_data, PAIRED)
    alignment = fit("c3", text, image, {})
    index = np.arange(len(text))
    draws = [metrics(text, alignment.transform(text, seed=seed, index=index), image) for seed in range(20)]
    assert (np.abs(np.mean(draws, axis=0) - C3) <= 3 * np.std(draws, axis=0, ddof=1)).all()


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out(shared_data, name):
    text, image = load(shared_data, PAIRED)
    options, wanted = HELD_OUT[name]
    found = []
    for seed in range(6):
        fitted, held_out = np.split(np.random.default_rng(seed).permutation(len(text)), 2)
        out = text[held_out]
        if name != "none":
            out = fit(name, text[fitted], image[fitted], options).transform(out)
        found.append(metrics(text[held_out], out, image[held_out])[1:])
    assert (np.abs(np.mean(found, axis=0) - wanted) <= 3 * np.std(found, axis=0, ddof=1) + 5e-3).all()


def test_mixing_falls_with_the_number_of_rows(shared_data):
    text, image = load(shared_data, PAIRED)
    found = {}
    for method in ("realign", "c3"):
        for count in (125, 500):
            chosen = np.random.default_rng(0).permutation(len(text))[:count]
            alignment = rf.fit(text[chosen], image[chosen], method=method)
            out = alignment.transform(text[chosen], index=np.arange(count))
            found[method, count] = mixing(out, image[chosen], k=20)
    for method in ("realign", "c3"):
        assert found[method, 500].value < 0.7 * found[method, 125].value
    # The noise of C3 carries text in among the images; around the images there is little of it.
    assert found["c3", 500].text > 0.8 > 0.2 > found["c3", 500].image
    assert found["realign", 500].text < 1.5 * found["realign", 500].image


@pytest.mark.parametrize("name", SETS)
def test_realign_beats_noise_and_keeps_neighbours(shared_data, name):
    text, image = load(shared_data, name)
    index = np.arange(len(text))
    gaps = {
        method: centroid_gap(rf.fit(text, image, method=method).transform(text, index=index), image)
        for method in ("realign", "c3")
    }
    assert gaps["c3"] >= (3 if name == "mindgap_clasp" else 10) * gaps["realign"]
    refined = rf.fit(text, image, refine=3).transform(text)
    assert centroid_gap(refined, image) < 1e-7
    assert knn_overlap(text, refined, k=10) > 0.85
    # With so few rows some covariances need a larger ridge than 1e-4.
    shrinkage = 1e-4 if name in (PAIRED, "mindgap_videoclip") else 1e-2
    coral = rf.fit(text, image, method="coral", shrinkage=shrinkage).transform(text)
    assert knn_overlap(text, coral, k=10) < 0.5
