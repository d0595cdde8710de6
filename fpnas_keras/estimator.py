"""The estimators of one search step, as pure functions.

From samples A_1..A_K ~ p(A; alpha), their log-likelihoods l_k and costs to the
number of samples, the gradient of the weights and that of the logits. Nothing
here knows a network: log-likelihoods may come from a table as well.

Reference: Yan et al., "FP-NAS: Fast Probabilistic Neural Architecture Search",
CVPR 2021, arXiv:2011.10949; the importance weights are those of PARSEC,
Casale et al., arXiv:1902.05116.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class AdaptiveSamples:
    """How many architectures to draw: many while the distribution is wide, few later.

    K = min(maximum, max(minimum, ceil(scale * H))), H the entropy in nats.

    Args:
        scale: Samples a nat of entropy.
        minimum: Fewest samples a step.
        maximum: Most samples a step.

    Raises:
        ValueError: When a value is out of its range.

    Reference: FP-NAS (arXiv:2011.10949), "adaptive sampling".
    """

    scale: float = 0.25
    minimum: int = 2
    maximum: int = 64

    def __post_init__(self):
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"`scale` must be above 0 and finite. Received: scale={self.scale}")
        if not 1 <= self.minimum <= self.maximum:
            raise ValueError(
                "`minimum` must be from 1 to `maximum`. "
                f"Received: minimum={self.minimum}, maximum={self.maximum}"
            )

    def __call__(self, entropy: tf.Tensor) -> tf.Tensor:
        """The number of samples, int32, for an entropy in nats."""
        count = tf.math.ceil(self.scale * entropy)
        return tf.cast(tf.clip_by_value(count, self.minimum, self.maximum), tf.int32)


def hinge(costs: tf.Tensor, target: float) -> tf.Tensor:
    """max(0, cost / target - 1), the part of the target that a cost is over it."""
    return tf.nn.relu(costs / target - 1.0)


def sample_coefficients(
    log_likelihoods: tf.Tensor,
    penalties: tf.Tensor,
    likelihood_scale: float = 1.0,
    cost_coefficient: float = 1.0,
    control_variate: bool = True,
) -> tf.Tensor:
    """Coefficients c_k of the gradient of the logits.

    The gradient to descend along is sum_k c_k * d log p(A_k) / d alpha with

        c_k = -(r_k - b) + beta / K * (C_k - mean C),   r = softmax_k(tau * l_k)

    b = 1/K with the control variate. As E[d log p] = 0 it leaves the expectation
    as it is and takes away most of the variance; b = 0 is the paper's formula.

    Args:
        log_likelihoods: l_k, on a batch of the architecture part, shape `(K,)`.
        penalties: C_k, see `hinge`, shape `(K,)`.
        likelihood_scale: tau.
        cost_coefficient: beta.
        control_variate: Whether b is 1/K, else 0.

    Returns:
        float32 of shape `(K,)`.
    """
    count = tf.cast(tf.shape(log_likelihoods)[0], tf.float32)
    importance = tf.nn.softmax(likelihood_scale * tf.cast(log_likelihoods, tf.float32))
    baseline = 1.0 / count if control_variate else 0.0
    penalties = tf.cast(penalties, tf.float32)
    excess = penalties - tf.reduce_mean(penalties)
    return -(importance - baseline) + cost_coefficient / count * excess


class StreamingSum(NamedTuple):
    """State of sum_k softmax_k(s)_k * x_k while the scores s_k come one by one.

    As in online softmax: what was added so far is held relative to the largest
    score so far and rescaled when that moves. It is exact, and holds one
    accumulator whatever K is.

    Attributes:
        maximum: Largest score so far.
        denominator: sum_k exp(s_k - maximum).
        sums: For each x, sum_k exp(s_k - maximum) * x_k.
    """

    maximum: tf.Tensor
    denominator: tf.Tensor
    sums: tuple[tf.Tensor, ...]

    @classmethod
    def zero(cls, like: Sequence[tf.Tensor]) -> "StreamingSum":
        """The sum of nothing, for values shaped `like` these."""
        return cls(
            tf.constant(-float("inf")), tf.constant(0.0), tuple(tf.zeros(x.shape) for x in like)
        )

    def add(self, score: tf.Tensor, values: Sequence[tf.Tensor]) -> "StreamingSum":
        """Adds the values of one sample with its score."""
        maximum = tf.maximum(self.maximum, score)
        keep, weight = tf.exp(self.maximum - maximum), tf.exp(score - maximum)
        return StreamingSum(
            maximum,
            keep * self.denominator + weight,
            tuple(keep * total + weight * value for total, value in zip(self.sums, values)),
        )

    def result(self) -> list[tf.Tensor]:
        """sum_k softmax_k(s)_k * x_k."""
        return [total / self.denominator for total in self.sums]
