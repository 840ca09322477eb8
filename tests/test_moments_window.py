"""Windows of moments: what a sliding corpus leaves of them, to the bits of the rows that are in it."""

import numpy as np
import pytest

import realign_fast as rf
from realign_fast import _files

DIM = 37
COUNTS = (120, 7, 300, 1, 64, 215, 90)


def day(number: int) -> np.ndarray:
    """Return the rows of a day; their mean drifts."""
    rng = np.random.default_rng(number)
    drift = np.linspace(-1, 1, DIM) * number / 7
    return (0.4 + drift + rng.normal(size=(COUNTS[number % len(COUNTS)], DIM))).astype(np.float32)


def moments(rows: np.ndarray, **options: bool) -> rf.Moments:
    return rf.Moments(rows.shape[1], **options).update(rows)


def rows_of(days) -> np.ndarray:
    return np.concatenate([day(number) for number in days])


@pytest.mark.parametrize("size", [1, 2, 3, 30])
def test_the_total_is_that_of_the_rows_in_the_window(size):
    window = rf.MomentsWindow(DIM, size)
    assert (len(window), window.total) == (0, rf.Moments(DIM))
    for number in range(9):
        before = window.total
        left = window.push(moments(day(number)))
        assert (left is None) == (number < size)
        if left is not None:
            assert left == moments(day(number - size))
            assert window.total == before - left + moments(day(number))
        assert window.total == moments(rows_of(range(max(0, number - size + 1), number + 1)))
    assert len(window) == min(size, 9)


def test_a_covariance_keeps_its_digits_however_many_parts_have_left():
    window = rf.MomentsWindow(DIM, 3, covariance=True)
    subtracted = rf.Moments(DIM, covariance=True)
    for number in range(60):
        part = moments(day(number), covariance=True)
        subtracted = subtracted + part
        left = window.push(part)
        if left is not None:
            subtracted = subtracted - left
    merged = moments(day(57), covariance=True)
    for number in (58, 59):
        merged.merge(moments(day(number), covariance=True))
    assert window.total == merged
    whole = moments(rows_of((57, 58, 59)), covariance=True)
    size = np.linalg.norm(whole.covariance)
    assert np.linalg.norm(window.total.covariance - whole.covariance) < 3e-7 * size
    # Exact subtraction of what was added leaves float64's rounding alone.
    np.testing.assert_array_equal(subtracted.mean, whole.mean)
    assert np.linalg.norm(subtracted.covariance - whole.covariance) < 3e-7 * size


def test_what_a_subtraction_costs_a_covariance():
    rows = np.concatenate([day(number) for number in range(7)])
    whole = moments(rows, covariance=True)
    for kept in (400, 40):
        rest = whole - rf.Moments(DIM, covariance=True).update(rows[kept:][::-1].copy())
        wanted = moments(rows[:kept], covariance=True)
        np.testing.assert_array_equal(rest.mean, wanted.mean)
        assert rest.trace == wanted.trace
        error = np.linalg.norm(rest.covariance - wanted.covariance) / np.linalg.norm(wanted.covariance)
        assert error < 3e-7 * len(rows) / kept


@pytest.mark.parametrize("covariance", [False, True])
def test_a_job_goes_on_the_next_day(tmp_path, covariance):
    path = tmp_path / "text.window.safetensors"
    rf.MomentsWindow(DIM, 3, covariance).save(path)
    whole = rf.MomentsWindow(DIM, 3, covariance)
    for number in range(6):
        window = rf.MomentsWindow.load(path)
        part = moments(day(number), covariance=covariance)
        window.push(part, f"day {number}")
        with pytest.raises(ValueError, match=f"part 'day {number}' is in the window already"):
            window.push(part, f"day {number}")
        window.save(path)
        whole.push(part, f"day {number}")
        assert window == whole
        assert rf.MomentsWindow.load(path) == whole
    assert window.names == ("day 3", "day 4", "day 5")
    assert window.total == whole.total
    first = path.read_bytes()
    window.save(path)
    assert path.read_bytes() == first
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert "size=3, parts=3" in repr(window)
    assert (window == 3) is False
    window.push(part)
    assert window != whole


def test_what_is_pushed_and_returned_is_independent():
    window, part = rf.MomentsWindow(DIM, 2), moments(day(0))
    window.push(part)
    part.update(day(1))
    window.parts[0].update(day(1))
    window.total.update(day(1))
    assert window.total == moments(day(0))
    assert window.parts == (moments(day(0)),)


@pytest.mark.parametrize("method", ["anchor", "anchor_trace", "realign"])
def test_a_sliding_corpus_is_fitted_again_without_reading_it(method):
    image = 0.2 + np.random.default_rng(99).normal(size=(500, DIM)).astype(np.float32)
    window = rf.MomentsWindow(DIM, 4)
    for number in range(9):
        window.push(moments(day(number)))
        rows = rows_of(range(max(0, number - 3), number + 1))
        text = rows if method == "realign" else None
        found = rf.fit_from_moments(window.total, moments(image), text=text, method=method)
        assert found.fingerprint == rf.fit(rows, image, method=method).fingerprint


def test_moments_that_do_not_fit_are_refused_and_change_nothing():
    window = rf.MomentsWindow(DIM, 1)
    window.push(moments(day(0)), "a")
    with pytest.raises(ValueError, match="dimension 37 and 3"):
        window.push(rf.Moments(3))
    with pytest.raises(ValueError, match="with and without a covariance"):
        window.push(moments(day(1), covariance=True))
    assert (window.names, window.total) == (("a",), moments(day(0)))
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        rf.MomentsWindow(DIM, 0)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        rf.MomentsWindow(0, 1)
    with pytest.raises(ValueError, match="30 parts of 134283264 bytes are more than the 1073741824 bytes"):
        rf.MomentsWindow(4096, 30, covariance=True)


def test_a_part_that_was_never_in_is_noticed():
    whole, other = moments(day(0)), moments(-day(0)[:100])
    with pytest.raises(ValueError, match=r"is no part of .*: it counts more rows"):
        whole - moments(day(2))
    with pytest.raises(ValueError, match=r"is no part of .*: no unit rows have the sums"):
        whole - other
    assert (whole - whole).count == 0
    bad = np.concatenate([day(0), np.zeros((2, DIM), np.float32)])
    zeroed = rf.Moments(DIM).update(bad, on_bad_rows="zero")
    assert zeroed - whole == rf.Moments(DIM).update(bad[-2:], on_bad_rows="zero")


def test_files_that_are_no_windows_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    part = {"name": None, "count": 7, "num_zero": 0, "num_skipped": 0, "fixed_point_bits": 27}
    sums = moments(day(1))._sums[None]
    good = {"size": 2, "covariance": False, "parts": [part]}
    for fields, tensors, message in [
        (good | {"size": 0, "parts": []}, {"sums": sums[:0]}, "size must be at least 1"),
        (good | {"size": "2"}, {"sums": sums}, "header is damaged"),
        (good | {"size": 1 << 60}, {"sums": sums}, "more than the 1073741824 bytes"),
        (good | {"parts": [part, part]}, {"sums": sums}, "do not fit together"),
        (good | {"size": 1, "parts": [part, part]}, {"sums": sums.repeat(2, 0)}, "do not fit together"),
        (good | {"covariance": True}, {"sums": sums}, "do not fit together"),
        (good | {"parts": [3]}, {"sums": sums}, "header is damaged"),
        (good | {"parts": [part | {"name": 3}]}, {"sums": sums}, "header is damaged"),
        (good | {"parts": [part | {"count": 2}]}, {"sums": sums}, "part 0: sums and counts do not fit together"),
        (good, {"sums": sums[:, :0]}, "dim must be at least 1"),
        (good, {"sums": sums[0]}, "must be int64 with 2 axes"),
        (good, {}, "'sums' is missing"),
    ]:
        _files.save(path, "window", tensors, fields)
        with pytest.raises(ValueError, match=rf"w\.safetensors.*{message}"):
            rf.MomentsWindow.load(path)
    moments(day(0)).save(path)
    with pytest.raises(ValueError, match="holds 'moments', expected 'window'"):
        rf.MomentsWindow.load(path)
    with pytest.raises(FileNotFoundError):
        rf.MomentsWindow.load(tmp_path / "none")
