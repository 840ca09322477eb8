"""How sure a mean of a few runs is."""

from __future__ import annotations

import numpy as np


def deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Return the mean and the ends of its 95% interval, after Student."""
    from scipy.stats import t

    count, mean = len(differences), float(differences.mean())
    half = float(t.ppf(0.975, count - 1)) * deviation(differences) / np.sqrt(count) if count > 1 else np.inf
    return mean, mean - half, mean + half
