"""Features that tell a right engine from a nearly right one, shared by the tests of every backend."""

from __future__ import annotations

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def lattice(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Small integers: every order of summation agrees, and ties are everywhere."""
    return rng.integers(-2, 3, (rows, dim)).astype(np.float32)


def separated(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Random unit vectors."""
    x = rng.standard_normal((rows, dim))
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def near_tie(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Unit vectors in pairs that differ by one ulp in one coordinate."""
    x = np.repeat(separated(rng, (rows + 1) // 2, dim), 2, axis=0)[:rows]
    for row in range(1, rows, 2):
        d = rng.integers(dim)
        x[row, d] = np.nextafter(x[row, d], np.float32(rng.choice([-2, 2])), dtype=np.float32)
    return x[rng.permutation(rows)]


def outlier(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """One dimension a hundred times as strong as the others."""
    x = separated(rng, rows, dim)
    x[:, rng.integers(dim)] *= 100
    return x


def common_mean(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """A direction that all rows share and that says nothing."""
    return (separated(rng, rows, dim) + 5 * separated(rng, 1, dim)).astype(np.float32)


def scales(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Lengths from 1e-20 to 1e18, denormal rows and zero rows."""
    x = separated(rng, rows, dim) * np.float32(10.0) ** rng.integers(-20, 19, (rows, 1)).astype(np.float32)
    x[rng.random(rows) < 0.1] *= np.float32(0)
    x[rng.random(rows) < 0.1] = np.float32(1e-42)
    return x.astype(np.float32)


def constant(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """All rows equal."""
    return np.repeat(separated(rng, 1, dim), rows, axis=0)


def duplicates(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Every row several times."""
    return separated(rng, max(1, rows // 7), dim)[rng.integers(0, max(1, rows // 7), rows)]


def positive(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Sparse and non-negative, as after a ReLU."""
    return np.maximum(separated(rng, rows, dim), 0)


def lengths(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Lengths of a log-normal distribution, sigma 3: the longest of thousands is 10,000 times the median."""
    return (separated(rng, rows, dim) * np.exp(3 * rng.standard_normal((rows, 1)))).astype(np.float32)


def giant(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """One row a million times as long as the many tiny ones, in a bank and among queries."""
    x = separated(rng, rows, dim) * np.float32(1e-3)
    x[[rows // 3, rows - 1]] *= np.float32(1e6)
    return x


FAMILIES = {
    each.__name__: each
    for each in (
        lattice, separated, near_tie, outlier, common_mean, scales, constant, duplicates, positive,
        lengths, giant,
    )
}  # fmt: skip
CORE = ("lattice", "separated", "near_tie")
