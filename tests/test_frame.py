"""The gap in a fixed frame, against plain float64 loops and SciPy."""

import dataclasses

import numpy as np
import pytest
from scipy.linalg import subspace_angles

import realign_fast as rf
from realign_fast.geometry.frame import (
    Frame,
    components,
    decompose,
    frame_of,
    largest_angle,
    phantom_drift,
    principal_plane,
    project,
)

PAIRED = ("mindgap_clip_coco500", "mindgap_convirt500", "mindgap_videoclip", "mindgap_clasp")


def cloud(count, dim, seed=0, centre=1.0):
    """Return rows around a centre, of variances that fall, of lengths from 0.1 to 1000."""
    rng = np.random.default_rng(seed)
    values = centre * np.eye(dim)[0] + rng.normal(size=(count, dim)) / np.arange(1, dim + 1) ** 0.7
    return values * 10.0 ** rng.uniform(-1, 3, (count, 1))


def pairs(count, dim, seed=0):
    text = cloud(count, dim, seed)
    image = text / np.linalg.norm(text, axis=1, keepdims=True) + 0.3 * np.eye(dim)[-1]
    return text, image + 0.1 * np.random.default_rng(seed + 1).normal(size=(count, dim)) / np.arange(1, dim + 1)


def unit(rows):
    return np.stack([row / np.sqrt(row @ row) for row in np.asarray(rows, np.float64)])


def of_real(shared_data, name):
    return [np.load(shared_data / name / f"{side}.npy") for side in ("text", "image")]


@pytest.mark.parametrize("shape", [(300, 33), (20, 33), (2, 5), (1000, 2)])
@pytest.mark.parametrize("energy", [0.5, 0.95, 1.0])
def test_a_frame_is_what_an_svd_says(shape, energy):
    text, image = cloud(*shape), cloud(shape[0] + 1, shape[1], seed=1)
    frame = frame_of(text, image, energy)
    scaled = [(rows - rows.mean(axis=0)) / np.sqrt(len(rows)) for rows in (unit(text), unit(image))]
    singular, directions = np.linalg.svd(np.concatenate(scaled), full_matrices=False)[1:]
    np.testing.assert_allclose(frame.values[: len(singular)], singular**2, atol=1e-14)
    held = np.cumsum(singular**2) / (singular**2).sum()
    assert frame.rank == 1 + np.flatnonzero(held >= energy - 1e-12)[0]
    assert frame.energy == pytest.approx(held[frame.rank - 1], abs=1e-12)
    np.testing.assert_allclose(np.abs(np.diag(directions[: frame.rank] @ frame.basis)), 1, atol=1e-9)
    assert (frame.basis[np.abs(frame.basis).argmax(axis=0), np.arange(frame.rank)] > 0).all()


def test_moments_give_the_same_frame():
    text, image = cloud(700, 24), cloud(900, 24, seed=1)
    moments = [rf.Moments(24, covariance=True).update(part) for part in (text[:300], text[300:], image)]
    streamed = Frame.of_moments(moments[0] + moments[1], moments[2])
    whole = frame_of(text, image)
    assert streamed.rank == whole.rank
    np.testing.assert_allclose(streamed.values, whole.values, atol=1e-7)
    assert largest_angle(streamed, whole) < 1e-3


@pytest.mark.parametrize("shape", [(200, 30), (12, 30), (1, 8)])
@pytest.mark.parametrize("energy", [0.6, 0.95])
def test_the_parts_add_up_to_the_gap(shape, energy):
    text, image = pairs(*shape)
    frame = frame_of(*pairs(40, shape[1], seed=7), energy)
    beta, gamma, delta, zeta = components(text, image, frame)
    np.testing.assert_allclose(beta + gamma + delta + zeta, unit(image) - unit(text), rtol=0, atol=1e-15)
    for along, across in ((beta, gamma), (delta, zeta)):
        np.testing.assert_allclose(across @ frame.basis, 0, atol=1e-14)
        np.testing.assert_allclose(along @ frame.basis @ frame.basis.T, along, atol=1e-14)
    np.testing.assert_allclose(delta.mean(axis=0), 0, atol=1e-15)
    np.testing.assert_allclose(zeta.mean(axis=0), 0, atol=1e-15)


def test_a_decomposition_is_that_of_loops():
    text, image = pairs(400, 20)
    frame = frame_of(text, image, 0.9)
    found = decompose(text.astype(np.float32), image.astype(np.float32), frame)
    beta, gamma, delta, zeta = components(text, image, frame)
    gaps = unit(image) - unit(text)
    assert found.num_rows == 400
    for part, norm in ((gaps.mean(axis=0), "gap"), (beta, "beta"), (gamma, "gamma")):
        assert getattr(found, f"{norm}_norm") == pytest.approx(np.sqrt(sum(part**2)), rel=1e-6)
    ranks = {"delta": frame.rank, "zeta": 20 - frame.rank}
    for name, rows in (("delta", delta), ("zeta", zeta)):
        covariance = sum(np.outer(row, row) for row in rows) / 400
        values = np.sort(np.linalg.eigvalsh(covariance))[::-1][: ranks[name]]
        assert getattr(found, f"{name}_trace") == pytest.approx(np.trace(covariance), rel=1e-5)
        assert getattr(found, f"{name}_condition") == pytest.approx(values[0] / values[-1], rel=1e-3)
    direction = np.linalg.svd(zeta)[2][:1].T
    assert found.gamma_angle_deg == pytest.approx(np.degrees(subspace_angles(gamma[:, None], direction)[0]), rel=1e-4)
    values = np.linalg.eigvalsh(np.cov(gaps.T, ddof=0))
    assert found.anisotropy == pytest.approx(values[-1] / (values.sum() / 20), rel=1e-5)
    assert found.effective_dimension == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-5)
    assert found.mean_cosine == pytest.approx(np.mean([a @ b for a, b in zip(unit(text), unit(image), strict=True)]))


def test_a_frame_of_the_whole_space_leaves_nothing_across():
    text, image = pairs(100, 6)
    found = decompose(text, image, frame_of(text, image, energy=1))
    assert (found.gamma_norm, found.zeta_trace) == (0, 0)
    assert found.zeta_condition is found.gamma_angle_deg is None
    assert found.beta_norm == pytest.approx(found.gap_norm)


def test_pairs_that_differ_by_a_constant_have_no_residual():
    text = unit(cloud(50, 8))
    frame = frame_of(text, cloud(50, 8, seed=1))
    found = decompose(text, text, frame)
    nothing = {name for name, value in dataclasses.asdict(found).items() if value is None}
    expected = {"delta_condition", "zeta_condition", "gamma_angle_deg", "anisotropy", "effective_dimension"}
    assert nothing == expected
    assert found.mean_cosine == pytest.approx(1)
    one = decompose(text[:1], cloud(1, 8), frame)
    assert (one.anisotropy, one.num_rows) == (None, 1)


def test_one_constant_side_is_no_obstacle():
    constant = np.ones((30, 5), np.float16)
    frame = frame_of(constant, cloud(40, 5))
    assert frame.rank >= 1
    with pytest.raises(ValueError, match="all rows of each are equal"):
        frame_of(constant, constant[:, ::-1] * 3)
    with pytest.raises(ValueError, match="all rows of each are equal"):
        Frame.of_moments(*[rf.Moments(5, covariance=True).update(constant) for _ in range(2)])


@pytest.mark.parametrize(("p", "q"), [(1, 1), (3, 3), (2, 5), (5, 2), (12, 4)])
@pytest.mark.parametrize("distance", [1e-9, 1e-3, 1, None])
def test_the_largest_angle_is_scipys(p, q, distance):
    rng = np.random.default_rng(p + q)
    a = np.linalg.qr(rng.normal(size=(12, p)))[0]
    near = np.concatenate([a, rng.normal(size=(12, q))], axis=1)[:, :q]
    b = np.linalg.qr(rng.normal(size=(12, q)) * (distance or 1) + (near if distance else 0))[0]
    frames = [Frame(basis, np.ones(12)) for basis in (a, b)]
    wanted = np.degrees(subspace_angles(a, b).max())
    assert largest_angle(*frames) == pytest.approx(wanted, rel=1e-6, abs=1e-13)
    assert largest_angle(*frames[::-1]) == pytest.approx(wanted, rel=1e-6, abs=1e-13)


def test_right_angles_and_none():
    a, b = (Frame(np.eye(4)[:, columns], np.ones(4)) for columns in ([0, 1], [0, 2]))
    assert largest_angle(a, b) == 90
    assert largest_angle(a, a) == 0
    with pytest.raises(ValueError, match="dimension 4 and 3 have no angle"):
        largest_angle(a, Frame(np.eye(3), np.ones(3)))


@pytest.mark.parametrize("name", PAIRED)
def test_real_pairs_have_their_gap_in_both_parts(shared_data, name):
    text, image = of_real(shared_data, name)
    frame = frame_of(text, image)
    found = decompose(text, image, frame)
    assert found.beta_norm**2 + found.gamma_norm**2 == pytest.approx(found.gap_norm**2)
    residual = np.trace(np.cov((unit(image) - unit(text)).T, ddof=0))
    assert found.delta_trace + found.zeta_trace == pytest.approx(residual)
    assert 0 < found.gamma_angle_deg < 90


def loops(text, scale, shift):
    """Return the mean of the mapped rows, that of their directions, and what the two formulas say of the drift."""
    mapped = [scale * row + shift for row in unit(text)]
    mean = sum(mapped) / len(mapped)
    drift = sum(row / np.sqrt(row @ row) for row in mapped) / len(mapped) - mean
    rest = [row - mean for row in mapped]
    covariance = sum(np.outer(row, row) for row in rest) / len(rest)
    trace = np.trace(covariance)
    third = sum(row * (row @ row - trace) for row in rest) / len(rest)
    square = sum((row @ row - 1) ** 2 for row in mapped) / len(mapped)
    predicted = -covariance @ mean - third / 2 + 3 / 8 * square * mean
    r = np.sqrt(mean @ mean)
    a = mean / r
    paper = -covariance @ a / r**2 - a * trace / (2 * r**2) + 3 * a * (a @ covariance @ a) / (2 * r**2)
    return drift, predicted, a + paper - mean


@pytest.mark.parametrize("name", PAIRED)
def test_the_drift_on_real_embeddings(shared_data, name):
    text, image = of_real(shared_data, name)
    alignment = rf.fit(text, image)
    found = phantom_drift(text, alignment.scale, alignment.shift)
    drift, predicted, paper = loops(text, alignment.scale, alignment.shift)
    np.testing.assert_allclose(found.measured_vector, drift, atol=1e-14)
    np.testing.assert_allclose(found.predicted_vector, predicted, atol=1e-7)
    np.testing.assert_allclose(found.paper_vector, paper, atol=1e-12)
    error = np.linalg.norm(found.predicted_vector - drift) / found.measured
    assert 0.04 < error < 0.28
    assert found.measured == pytest.approx(alignment.report["gap"]["trace"], rel=1e-4)
    if name == "mindgap_clip_coco500":
        assert found.paper / found.measured == pytest.approx(27, abs=0.5)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_both_formulas_hold_for_a_tight_cloud(scale):
    text = np.eye(9)[0] + np.random.default_rng(3).normal(size=(4000, 9)) * np.arange(9, 0, -1) / 200
    rows = unit(text)
    target = np.ones(9) / 3 * np.sqrt(1 - scale**2 * rows.var(axis=0).sum())
    found = phantom_drift(text, scale, target - scale * rows.mean(axis=0))
    for vector in (found.predicted_vector, found.paper_vector):
        assert np.linalg.norm(vector - found.measured_vector) < 0.1 * scale * found.measured
    assert found.predicted == np.linalg.norm(found.predicted_vector)
    assert found.paper == np.linalg.norm(found.paper_vector)


def test_a_plane_is_that_of_an_svd():
    text, image = cloud(60, 12), cloud(30, 12, seed=1, centre=-1)
    plane = principal_plane(text, image)
    both = np.concatenate([unit(text), unit(image)])
    centred = both - both.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    found = project(np.concatenate([text, image]).astype(np.float32), plane)
    np.testing.assert_allclose(np.abs(found), np.abs(left[:, :2] * singular[:2]), atol=1e-6)
    np.testing.assert_allclose(plane.shares, (singular**2 / (singular**2).sum())[:2])
    np.testing.assert_allclose(plane.directions.T @ plane.directions, np.eye(2), atol=1e-14)
    assert (plane.directions[np.abs(plane.directions).argmax(axis=0), [0, 1]] > 0).all()


def test_a_plane_of_two_points():
    plane = principal_plane(np.eye(3)[[0, 0]], np.eye(3)[[1]])
    found = project(np.eye(3)[:2], plane)
    assert np.linalg.norm(found[0] - found[1]) == pytest.approx(np.sqrt(2))
    assert plane.shares == pytest.approx((1, 0))


BAD = np.ones((4, 3))
BAD[2:] = [[0, 0, 0], [1, np.nan, 1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: frame_of(x, x[:, :2]), r"image must have rows of dimension 3, got shape \(5, 2\)"),
        (lambda x: frame_of(x[0], x), r"text must have shape \(n, dim\), got \(3,\)"),
        (lambda x: frame_of(x[:0], x), "text must have at least 1 row, got 0"),
        (lambda x: frame_of(x, BAD), "image: row 2 holds NaN or infinity or has norm zero, as do 2 of 4 rows"),
        (lambda x: frame_of(x, x, energy=0), r"energy must lie in \(0, 1\], got 0"),
        (lambda x: Frame.of_moments(rf.Moments(3, True), rf.Moments(2, True)), "text has dimension 3, image has .* 2"),
        (lambda x: Frame.of_moments(*[rf.Moments(3).update(x)] * 2), "hold no covariance"),
        (lambda x: decompose(x, x[:4], frame_of(x, x)), "text has 5 rows and image 4: pairs are needed"),
        (lambda x: decompose(x[:, :2], x[:, :2], frame_of(x, x)), "frame has dimension 3, text and image .* 2"),
        (lambda x: components(x, x[1:], frame_of(x, x)), "pairs are needed"),
        (lambda x: phantom_drift(BAD, 1, np.zeros(3)), "text: row 2"),
        (lambda x: phantom_drift(x, 1, np.zeros(2)), r"shift must have shape \(3,\), got \(2,\)"),
        (lambda x: phantom_drift(x, np.inf, np.zeros(3)), "scale and shift must be finite"),
        (lambda x: phantom_drift(x, 1, np.full(3, np.nan)), "scale and shift must be finite"),
        (lambda x: phantom_drift(x, 1, -unit(x).mean(axis=0)), "take the mean of text to the origin"),
        (lambda x: principal_plane(x[:, :1], x[:, :1]), "a plane needs rows of dimension 2 or more, got 1"),
        (lambda x: principal_plane(x[:1], x[:1]), "all rows are equal"),
        (lambda x: project(x[:, :2], principal_plane(x, x)), "rows must have rows of dimension 3"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0).normal(size=(5, 3)))


def test_lists_are_no_rows():
    with pytest.raises(TypeError, match="text must be a NumPy array or a torch tensor, got list"):
        frame_of([[1.0, 2.0]], np.ones((1, 2)))
