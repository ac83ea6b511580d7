"""Vector quantisation for codecs: k-means, the nearest centroid, and the file of a codebook.

What a codec cuts its items into, patches of sound or of pictures, are vectors here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.mimo.modalities.values import shown

# The vectors that the first centroids are chosen from, passes over all vectors, and how many are
# compared at a time.
FIRST_VECTORS, PASSES, BATCH = 4_096, 12, 2_048
# Values of a codebook are logarithms, or fractions of white; no larger one can be meant.
LARGEST_VALUE = 20.0


class Codebook(NamedTuple):
    """`centroids` (K, D) float64, and a `level` that a codec takes them relative to."""

    centroids: np.ndarray
    level: float = 0.0

    def write(self, path: Path) -> None:
        """A safetensors file, in float32, in place of one that may be there."""
        from safetensors.numpy import save

        numbers = {"centroids": self.centroids, "level": np.array([self.level])}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_bytes(save({k: v.astype(np.float32) for k, v in numbers.items()}))
        os.replace(unfinished, path)


def read_codebook(path: Path, shape: tuple[int, int]) -> Codebook:
    """What `Codebook.write` wrote; ValueError, one line, for another shape, NaN or damage.

    Sizes are checked before values are read.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path}: no such codebook; learn one first")
    num_bytes = path.stat().st_size
    if num_bytes > 4 * math.prod(shape) + 2**16:
        raise ValueError(
            f"{path}: {num_bytes:,} bytes, but {shape[0]:,} centroids of {shape[1]:,} values take "
            f"{4 * math.prod(shape):,}"
        )
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {name: (s.get_dtype(), *s.get_shape()) for name, s in slices.items()}
            if tensors != {"centroids": ("F32", *shape), "level": ("F32", 1)}:
                raise ValueError(
                    f"{path}: this codebook holds {_in_words(tensors)}, but the config needs "
                    f"'centroids' F32 {shape[0]} x {shape[1]} and 'level' F32 1; learn it again"
                )
            centroids, level = file.get_tensor("centroids"), file.get_tensor("level")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    # Not-a-number is not below the limit either.
    if not max(np.abs(centroids).max(), abs(level[0])) <= LARGEST_VALUE:
        raise ValueError(f"{path}: NaN, or values beyond {LARGEST_VALUE:g}; learn it again")
    return Codebook(centroids.astype(np.float64), float(level[0]))


def _in_words(tensors: dict[str, tuple]) -> str:
    named = (
        f"{shown(name)} {dtype} {' x '.join(map(str, size))}"
        for name, (dtype, *size) in sorted(tensors.items())[:4]
    )
    return ", ".join(named) or "no tensors"


def nearest(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(N, D), (K, D) -> (N,): which centroid has the smallest Euclidean distance."""
    half_norms = np.square(centroids).sum(axis=1) / 2
    batches = np.split(vectors, range(BATCH, len(vectors), BATCH))
    return np.concatenate([(half_norms - batch @ centroids.T).argmin(axis=1) for batch in batches])


def k_means(vectors: np.ndarray, num_centroids: int, seed: int = 0) -> np.ndarray:
    """(N, D) -> (K, D) float64: the centres of clusters, by Lloyd's algorithm after k-means++.

    One seed gives one result, whatever the number of threads: sums are taken in a fixed order.
    """
    generator = np.random.default_rng(seed)
    _check_enough(len(vectors), num_centroids)
    few = generator.permutation(len(vectors))[: max(FIRST_VECTORS, 4 * num_centroids)]
    centroids = _far_apart(vectors[few].astype(np.float64), num_centroids, generator)
    for _ in range(PASSES):
        labels = nearest(vectors, centroids)
        order = np.argsort(labels, kind="stable")
        filled, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
        sums = np.add.reduceat(vectors[order], starts, axis=0, dtype=np.float64)
        # A centroid that is the nearest of none stays where it is.
        centroids[filled] = sums / counts[:, None]
    return centroids


def _far_apart(
    vectors: np.ndarray, num_centroids: int, generator: np.random.Generator
) -> np.ndarray:
    """k-means++ (Arthur and Vassilvitskii, 2007): each is drawn by its distance to those before."""
    chosen = [int(generator.integers(len(vectors)))]
    distances = np.full(len(vectors), np.inf)
    while len(chosen) < num_centroids:
        offsets = vectors - vectors[chosen[-1]]
        distances = np.minimum(distances, np.einsum("nd,nd->n", offsets, offsets))
        odds = np.cumsum(distances)
        if not odds[-1] > 0:
            _check_enough(len(chosen), num_centroids)
        chosen.append(int(np.searchsorted(odds, generator.random() * odds[-1], side="right")))
    return vectors[chosen]


def _check_enough(count: int, num_centroids: int) -> None:
    if count < num_centroids:
        raise ValueError(
            f"{count:,} different patches are too few for {num_centroids:,} centroids; learn from "
            "more, or lower num_codes"
        )


def sample(parts: Iterable[np.ndarray], most: int, seed: int = 0) -> np.ndarray:
    """(N, D) of all parts together -> at most `most` of them, each as likely as any other."""
    generator = np.random.default_rng(seed)
    kept: list[np.ndarray] = []
    keys = np.zeros(0)
    for part in parts:
        kept.append(part)
        keys = np.concatenate([keys, generator.random(len(part))])
        if len(keys) > 2 * most:
            kept, keys = _smallest(kept, keys, most)
    if not len(keys):
        raise ValueError("there is nothing to learn a codebook from")
    return _smallest(kept, keys, most)[0][0]


def _smallest(
    parts: list[np.ndarray], keys: np.ndarray, most: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """The vectors with the smallest of the random numbers drawn for them, in their order."""
    chosen = np.sort(np.argsort(keys, kind="stable")[:most])
    return [np.concatenate(parts)[chosen]], keys[chosen]
