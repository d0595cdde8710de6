"""The estimators of one search step, as pure functions.

From samples A_1..A_K ~ p(A; alpha), their log-likelihoods l_k and costs to the
number of samples, the gradient of the weights, that of the logits and the cost coefficient. Nothing
here knows a network: log-likelihoods may come from a table as well.

Reference: Yan et al., "FP-NAS: Fast Probabilistic Neural Architecture Search",
CVPR 2021, arXiv:2011.10949; the importance weights are those of PARSEC,
Casale et al., arXiv:1902.05116.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from fpnas_keras.errors import UserError

# How far (e to that power) a score of a `StreamingSum` may be above its reference.
SLACK = 30.0


@dataclasses.dataclass(frozen=True)
class AdaptiveSamples:
    """How many architectures to draw: many while the distribution is wide, few later.

    K = min(maximum, max(minimum, ceil(scale * H))), H the entropy in nats.

    Args:
        scale: Samples a nat of entropy.
        minimum: Fewest samples a step.
        maximum: Most samples a step.

    Raises:
        UserError: When a value is out of its range.

    Reference: FP-NAS (arXiv:2011.10949), "adaptive sampling".
    """

    scale: float = 0.25
    minimum: int = 2
    maximum: int = 64

    def __post_init__(self):
        if not 0 < self.scale < float("inf"):
            raise UserError(f"`scale` must be above 0 and finite. Received: scale={self.scale}")
        if not 1 <= self.minimum <= self.maximum:
            raise UserError(
                "`minimum` must be from 1 to `maximum`. "
                f"Received: minimum={self.minimum}, maximum={self.maximum}"
            )

    def __call__(self, entropy: tf.Tensor) -> tf.Tensor:
        """The number of samples, int32, for an entropy in nats."""
        count = tf.math.ceil(self.scale * entropy)
        # A search that has diverged draws on until the end of its epoch, where it is stopped.
        count = tf.where(tf.math.is_nan(count), float(self.minimum), count)
        return tf.cast(tf.clip_by_value(count, self.minimum, self.maximum), tf.int32)


@dataclasses.dataclass(frozen=True)
class CostController:
    """Moves the cost coefficient beta so that the expected cost settles at the target.

    A proportional-integral controller on the relative excess e = E[cost] / goal - 1:

        integral <- integral + integral_gain * e,   beta = proportional_gain * e + integral

    The goal moves from the expected cost of the start to the target in equal ratios over
    `anneal_steps`, so that the integral does not wind up while the start is far away.

    Args:
        two_sided: Whether beta may be negative and reward cost while the expected
            cost is under the goal; else it stays at or above 0.
        proportional_gain: Change of beta for an excess of 1.
        integral_gain: Change of beta a step for an excess of 1.
        anneal_steps: Steps until the goal is the target.

    Raises:
        UserError: When a value is out of its range.
    """

    two_sided: bool = True
    proportional_gain: float = 1.0
    integral_gain: float = 0.003
    anneal_steps: int = 1000

    def __post_init__(self):
        for name in ("proportional_gain", "integral_gain", "anneal_steps"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise UserError(f"`{name}` must be at least 0 and finite. Received: {name}={value}")

    def goal(self, start: float, target: float, step: tf.Tensor) -> tf.Tensor:
        """The cost to hold after `step` steps, float64, between `start` and `target`."""
        if not self.anneal_steps:
            return tf.constant(target, tf.float64)
        done = tf.minimum(tf.cast(step, tf.float64) / self.anneal_steps, 1.0)
        return start * (target / start) ** done

    def __call__(self, integral: tf.Tensor, excess: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """beta and the new integral, from the old one and the relative excess e."""
        least = -float("inf") if self.two_sided else 0.0
        integral = tf.maximum(integral + self.integral_gain * excess, least)
        return tf.maximum(self.proportional_gain * excess + integral, least), integral


class Samples(NamedTuple):
    """Drawn architectures, those that are equal only once.

    Attributes:
        choices: int32 of shape `(evaluated, blocks, variables)`.
        counts: How often each was drawn, int32 of shape `(evaluated,)`; their sum is K.
    """

    choices: tf.Tensor
    counts: tf.Tensor

    @classmethod
    def unique(cls, choices: tf.Tensor) -> "Samples":
        """Drawn choices of shape `(K, blocks, variables)`, in the order of their first draw."""
        flat = tf.reshape(choices, (tf.shape(choices)[0], -1))
        found = tf.raw_ops.UniqueWithCountsV2(x=flat, axis=[0])
        return cls(tf.reshape(found.y, (-1, *choices.shape[1:])), found.count)

    @classmethod
    def each(cls, choices: tf.Tensor) -> "Samples":
        """Drawn choices of shape `(K, blocks, variables)`, equal ones or not."""
        return cls(choices, tf.ones(tf.shape(choices)[:1], tf.int32))


def scores(log_likelihoods: tf.Tensor, counts: tf.Tensor, likelihood_scale: float) -> tf.Tensor:
    """tau * l_k + log c_k, whose softmax over k are the importance weights r_k.

    Args:
        log_likelihoods: l_k, any shape.
        counts: c_k, how many draws sample k stands for, the same shape.
        likelihood_scale: tau.
    """
    log_counts = tf.math.log(tf.cast(counts, tf.float32))
    return likelihood_scale * tf.cast(log_likelihoods, tf.float32) + log_counts


def likelihood_coefficients(
    log_likelihoods: tf.Tensor,
    counts: tf.Tensor,
    likelihood_scale: float = 1.0,
    control_variate: bool = True,
) -> tf.Tensor:
    """Coefficients of d log p(A_k) / d alpha that raise the likelihood: -(r_k - b_k).

    r = softmax_k(tau * l_k + log c_k), b_k = c_k / K with the control variate. As
    E[d log p] = 0 it leaves the expectation as it is and takes away most of the variance;
    b = 0 is the paper's formula.

    Args:
        log_likelihoods: l_k, on a batch of the architecture part, shape `(evaluated,)`.
        counts: c_k, how many of the K draws sample k stands for, `(evaluated,)`.
        likelihood_scale: tau.
        control_variate: Whether b is c / K, else 0.

    Returns:
        float32 of shape `(evaluated,)`.
    """
    importance = tf.nn.softmax(scores(log_likelihoods, counts, likelihood_scale))
    return _shares(counts) - importance if control_variate else -importance


def penalty_coefficients(
    costs: tf.Tensor, counts: tf.Tensor, target: float, logarithm: bool = False
) -> tf.Tensor:
    """Coefficients of d log p(A_k) / d alpha that lower the paper's hinge of the cost.

    C_k = max(0, cost_k / target - 1); the paper's text can be read as penalizing their
    mean, which gives c_k / K * (C_k - mean C), or its logarithm: c_k / K * (C_k / mean C - 1).

    Args:
        costs: cost_k, shape `(evaluated,)`.
        counts: c_k, how many of the K draws sample k stands for, `(evaluated,)`.
        target: The target of the cost.
        logarithm: Whether the logarithm of the mean is penalized.

    Returns:
        float32 of shape `(evaluated,)`.
    """
    shares = _shares(counts)
    penalties = tf.cast(tf.nn.relu(costs / target - 1.0), tf.float32)
    mean = tf.reduce_sum(shares * penalties)
    excess = shares * (penalties - mean)
    return tf.math.divide_no_nan(excess, mean) if logarithm else excess


def _shares(counts):
    return tf.cast(counts, tf.float32) / tf.cast(tf.reduce_sum(counts), tf.float32)


class StreamingSum(NamedTuple):
    """State of sum_k softmax_k(s)_k * x_k while the scores s_k come one by one.

    As in online softmax, what was added so far is held relative to a reference, and
    rescaled when that moves. It is exact, and holds one accumulator whatever K is. The
    reference needs not be the largest score: as long as it is within `SLACK` of that,
    nothing overflows and nothing has to be rescaled.

    Attributes:
        reference: A score that was added, at most `SLACK` below the largest.
        denominator: sum_k exp(s_k - reference).
        sums: For each x, sum_k exp(s_k - reference) * x_k.

    Example:

    ```python
    sums = StreamingSum.zero([x_1])
    sums, factor = sums.admit(s_1)
    sums = sums.add([factor * x_1])  # Or make x_1 scaled: a gradient can be.
    ```
    """

    reference: tf.Tensor
    denominator: tf.Tensor
    sums: tuple[tf.Tensor, ...]

    @classmethod
    def zero(cls, like: Sequence[tf.Tensor]) -> "StreamingSum":
        """The sum of nothing, for values shaped `like` these."""
        return cls(
            tf.constant(-float("inf")),
            tf.constant(0.0),
            tuple(tf.zeros_like(x, tf.float32) for x in like),
        )

    def admit(self, score: tf.Tensor) -> tuple["StreamingSum", tf.Tensor]:
        """The sum with the weight of one more sample, and the factor for its values."""
        moves = score > self.reference + SLACK
        reference = tf.where(moves, score, self.reference)
        keep, factor = tf.exp(self.reference - reference), tf.exp(score - reference)
        sums = tf.cond(moves, lambda: [keep * total for total in self.sums], lambda: [*self.sums])
        return StreamingSum(reference, keep * self.denominator + factor, tuple(sums)), factor

    def add(self, values: Sequence[tf.Tensor]) -> "StreamingSum":
        """Adds the values, times their factor, of the sample that was admitted."""
        return self._replace(
            sums=tuple(total + tf.cast(x, tf.float32) for total, x in zip(self.sums, values))
        )

    def result(self) -> list[tf.Tensor]:
        """sum_k softmax_k(s)_k * x_k; 0 where nothing was added."""
        return [tf.math.divide_no_nan(total, self.denominator) for total in self.sums]
