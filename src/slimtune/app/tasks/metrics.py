"""Metrics on numpy arrays, as scikit-learn and SciPy define them; 0 where a formula divides by zero."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def confusion(labels: Array, predictions: Array) -> Array:
    """(K, K) counts: row = label, column = prediction, K = largest class number + 1."""
    size = int(max(labels.max(initial=0), predictions.max(initial=0))) + 1
    return np.bincount(labels * size + predictions, minlength=size * size).reshape(size, size)


def classification(labels: Array, predictions: Array) -> dict[str, float]:
    """accuracy; f1 = unweighted mean of F1 over the classes seen as label or prediction; mcc = Matthews (Gorodkin's
    form for more than two classes)."""
    table = confusion(labels, predictions).astype(np.float64)
    true, labelled, predicted = np.diag(table), table.sum(1), table.sum(0)
    seen = labelled + predicted > 0
    count, right = table.sum(), true.sum()
    numerator = right * count - labelled @ predicted
    denominator = np.sqrt((count**2 - predicted @ predicted) * (count**2 - labelled @ labelled))
    return {
        "accuracy": float(right / count),
        "f1": float(np.mean(2 * true[seen] / (labelled + predicted)[seen])),
        "mcc": float(numerator / denominator) if denominator > 0 else 0.0,
    }


def pearson(x: Array, y: Array) -> float:
    """Linear correlation of two vectors; 0 when one is constant."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def ranks(x: Array) -> Array:
    """Ranks from 1; ties share their mean rank."""
    _, inverse, sizes = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    return (ends - (sizes - 1) / 2)[inverse]


def regression(labels: Array, predictions: Array) -> dict[str, float]:
    """pearson, spearman (pearson of the ranks), mse."""
    error = predictions.astype(np.float64) - labels
    return {
        "pearson": pearson(predictions, labels),
        "spearman": pearson(ranks(predictions), ranks(labels)),
        "mse": float(np.mean(error**2)),
    }
