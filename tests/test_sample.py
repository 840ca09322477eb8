from functools import partial

import numpy as np
import pytest

from realign_fast import _sample
from realign_fast._sample import Sample, take_rows

DIM = 16


def make(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, DIM)).astype(np.float32)
    keys = rng.integers(1, 1 << 64, count, np.uint64)
    return values, keys


def sample_of(values, keys, chunk, known, order=None) -> np.ndarray:
    sample = Sample(DIM, "float32", len(values) if known else None)
    starts = np.arange(0, len(values), chunk)
    for start in starts if order is None else np.random.default_rng(order).permutation(starts):
        sample.add(keys[start : start + chunk], partial(take_rows, values[start : start + chunk]))
    return sample.take(sample.ranking()).values


@pytest.mark.parametrize("count", [1, 5, 100, 101, 1000, 6400])
def test_the_sample_is_that_of_the_set(monkeypatch, count):
    monkeypatch.setattr(_sample, "MAX_ROWS", 100)
    values, keys = make(count)
    expected = sample_of(values, keys, count, known=True)
    for chunk, known, order in [(7, True, None), (7, False, 1), (100, False, 2), (1, True, 3)]:
        np.testing.assert_array_equal(sample_of(values, keys, chunk, known, order), expected)
    assert len(expected) <= 125
    if count <= 100:
        assert len(expected) == count
    else:
        assert len(expected) > 20


def test_bad_rows_are_left_out_and_bytes_are_bounded(monkeypatch):
    values, keys = make(50)
    keys[::2] = 0
    assert len(sample_of(values, keys, 50, True)) == 25
    monkeypatch.setattr(_sample, "MAX_BYTES", 10 * DIM * 4)
    assert len(sample_of(*make(200), 50, True)) <= 13


def test_rows_of_one_content_do_not_exhaust_the_memory(monkeypatch):
    monkeypatch.setattr(_sample, "MAX_ROWS", 100)
    values, keys = make(5000)
    keys[:4000], values[:4000] = keys[0], values[0]
    expected = sample_of(values, keys, 5000, True)
    np.testing.assert_array_equal(sample_of(values, keys, 13, False, 4), expected)
    assert len(expected) <= 125


def test_rows_that_share_a_key_come_in_order_of_their_bytes():
    values, keys = make(30)
    keys[:] = 7
    expected = sample_of(values, keys, 30, True)
    np.testing.assert_array_equal(sample_of(values, keys, 4, True, 5), expected)


def test_no_rows():
    sample = Sample(DIM, "bfloat16", 0)
    assert sample.take(sample.ranking()).values.shape == (0, DIM)
