"""Latency of blocks that were not measured, from some that were: a Gaussian process."""

import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.model_selection import KFold

from fpnas_keras.architecture import ACTIVATIONS, SPLITS, Part, expanded_filters

# Blocks that the length scales are learned from; all of them would take minutes.
_LEARNED_FROM = 500
# Channels that the kernels of phones (8, 16) and of processors with wide vectors compute at once.
_TILES = (8, 16, 32)
_FOLDS = 5
_CHUNK = 5_000


class LatencyModel:
    """Predicts milliseconds of blocks, smooth in the logarithms of their sizes.

    Args:
        parts: Blocks that were measured, none of them skipped.
        milliseconds: What they took.

    Attributes:
        error: Mean relative error of blocks that were left out of the fit, five times a fifth.
    """

    def __init__(self, parts: Sequence[Part], milliseconds: Sequence[float]):
        x, y = _features(parts), np.log(milliseconds)
        self._offset, self._scale = (
            x.mean(axis=0),
            np.where(np.ptp(x, axis=0) > 0, x.std(axis=0), 1.0),
        )
        x = (x - self._offset) / self._scale
        order = np.random.default_rng(0).permutation(len(y))
        kernel = ConstantKernel(1.0, (1e-2, 1e3)) * RBF(
            np.full(x.shape[1], 3.0), (0.1, 1e3)
        ) + WhiteKernel(1e-3, (1e-6, 1e-1))
        some = order[:_LEARNED_FROM]
        learned = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
        with warnings.catch_warnings():
            # What has no influence has a length scale without bound.
            warnings.simplefilter("ignore", ConvergenceWarning)
            kernel = learned.fit(x[some], y[some]).kernel_

        def fitted(part):
            model = GaussianProcessRegressor(kernel, normalize_y=True, optimizer=None)
            return model.fit(x[part], y[part])

        errors = [
            np.abs(np.exp(fitted(kept).predict(x[left]) - y[left]) - 1)
            for kept, left in KFold(_FOLDS, shuffle=True, random_state=0).split(x)
        ]
        self.error = float(np.concatenate(errors).mean())
        self._model = fitted(order)

    def __call__(self, parts: Sequence[Part]) -> np.ndarray:
        """Milliseconds of blocks, float64 of shape `(len(parts),)`."""
        x = (_features(parts) - self._offset) / self._scale
        chunks = [x[start : start + _CHUNK] for start in range(0, len(x), _CHUNK)]
        return np.exp(np.concatenate([self._model.predict(chunk) for chunk in chunks]))


def _features(parts):
    return np.array([_features_of(part) for part in parts], np.float64)


def _features_of(part):
    block = part.layers
    widths = np.array(
        [part.channels, expanded_filters(part.channels, block.expansion), block.filters]
    )
    # Kernels compute whole tiles of channels: 33 filters may take as long as 64.
    tiles = [np.ceil(widths / tile) * tile for tile in _TILES]
    return [
        *np.log2(np.concatenate([widths, *tiles])),
        np.log2(part.size[0] * part.size[1]),
        np.log2(block.kernel_size),
        block.strides,
        block.expansion != 1,
        part.keeps_shape,
        *(block.activation == each for each in ACTIVATIONS),
        *(block.splits == each for each in SPLITS),
    ]
