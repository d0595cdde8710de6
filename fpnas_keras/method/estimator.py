"""The estimators of a search step, as pure functions.

They compute the number of samples K, the gradient of the weights, the gradient of the logits alpha
and the cost coefficient. They take the log-likelihoods l_k and the costs of samples
A_1..A_K ~ p(A; alpha). They need no network: the log-likelihoods can come from any evaluation.

References: Yan et al., "FP-NAS: Fast Probabilistic Neural Architecture Search", CVPR 2021,
arXiv:2011.10949. The importance weights are those of PARSEC: Casale et al., "Probabilistic Neural
Architecture Search", arXiv:1902.05116.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from fpnas_keras.errors import UserError

# A score of a `StreamingSum` can be this much above the reference; exp(30) = 1e13 is no overflow.
SLACK = 30.0


@dataclasses.dataclass(frozen=True)
class AdaptiveSamples:
    """The number of architectures to draw: many while the entropy is high, few when it is low.

        K = min(maximum, max(minimum, ceil(scale * H)))

    H is the entropy of the distribution in nats.

    Args:
        scale: Samples per nat of entropy (the paper's lambda).
        minimum: Smallest number of samples per step.
        maximum: Largest number of samples per step.

    Raises:
        UserError: If a value is out of its range.

    Example:

    >>> int(AdaptiveSamples(scale=0.25)(tf.constant(36.5)))
    10

    Reference: FP-NAS (arXiv:2011.10949), section on adaptive sampling.
    """

    scale: float = 0.25
    minimum: int = 2
    maximum: int = 64

    def __post_init__(self):
        if not 0 < self.scale < math.inf:
            raise UserError(f"`scale` must be above 0 and finite. Received: scale={self.scale}")
        if not 1 <= self.minimum <= self.maximum:
            raise UserError(
                "`minimum` must be from 1 to `maximum`. "
                f"Received: minimum={self.minimum}, maximum={self.maximum}"
            )

    def __call__(self, entropy: tf.Tensor) -> tf.Tensor:
        """The number of samples for an entropy.

        Args:
            entropy: In nats, a float32 scalar.

        Returns:
            An int32 scalar.
        """
        count = tf.math.ceil(self.scale * entropy)
        # The entropy of a diverged search is nan. The search stops at the end of the epoch only.
        count = tf.where(tf.math.is_nan(count), float(self.minimum), count)
        return tf.cast(tf.clip_by_value(count, self.minimum, self.maximum), tf.int32)


@dataclasses.dataclass(frozen=True)
class CostController:
    """Adjusts the cost coefficient beta so that the expected cost settles at the target.

    It is a proportional-integral controller of the relative excess e = E[cost] / goal - 1:

        integral <- integral + integral_gain * e
        beta = proportional_gain * e + integral

    At first, the goal is the initial expected cost. It approaches the target geometrically over
    `anneal_steps`. Without that, the integral would grow far too large (wind up) while the expected
    cost is still far from the target. The paper has a fixed beta and no controller.

    Args:
        two_sided: Whether beta can be negative, which rewards cost while the expected cost is below
            the goal. Otherwise beta is at least 0.
        proportional_gain: Change of beta for an excess of 1.
        integral_gain: Change of beta per step for an excess of 1.
        anneal_steps: Steps until the goal is the target.

    Raises:
        UserError: If a value is out of its range.
    """

    two_sided: bool = True
    proportional_gain: float = 1.0
    integral_gain: float = 0.003
    anneal_steps: int = 1000

    def __post_init__(self):
        for name in ("proportional_gain", "integral_gain", "anneal_steps"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"`{name}` must be at least 0 and finite. Received: {name}={value}")

    def goal(self, start: float, target: float, step: tf.Tensor) -> tf.Tensor:
        """The cost to reach after `step` steps.

        Args:
            start: The initial expected cost.
            target: The target.
            step: Number of steps.

        Returns:
            A float64 scalar: start * (target / start) ** (step / anneal_steps), and `target` from
            `anneal_steps` on.
        """
        if not self.anneal_steps:
            return tf.constant(target, tf.float64)
        done = tf.minimum(tf.cast(step, tf.float64) / self.anneal_steps, 1.0)
        return start * (target / start) ** done

    def __call__(self, integral: tf.Tensor, excess: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """One step of the controller.

        Args:
            integral: The integral so far, a float32 scalar.
            excess: The relative excess e, a float32 scalar.

        Returns:
            beta and the new integral.
        """
        least = -math.inf if self.two_sided else 0.0
        integral = tf.maximum(integral + self.integral_gain * excess, least)
        return tf.maximum(self.proportional_gain * excess + integral, least), integral


class Samples(NamedTuple):
    """The architectures of a step, with the number of draws of each.

    Attributes:
        entries: The architectures, as the index of the entry of each search block: int32 of shape
            `(evaluated, blocks)`. See `fpnas_keras.spaces.Entries`.
        counts: Number of draws of each, int32 of shape `(evaluated,)`. Their sum is K.
    """

    entries: tf.Tensor
    counts: tf.Tensor

    @classmethod
    def unique(cls, entries: tf.Tensor) -> "Samples":
        """Each different architecture once, in the order of the first draws.

        Args:
            entries: The draws, int32 of shape `(K, blocks)`.
        """
        unique = tf.raw_ops.UniqueWithCountsV2(x=entries, axis=[0])
        return cls(tf.ensure_shape(unique.y, (None, entries.shape[1])), unique.count)

    @classmethod
    def each(cls, entries: tf.Tensor) -> "Samples":
        """Every draw on its own, even if two draws are equal.

        Args:
            entries: The draws, int32 of shape `(K, blocks)`.
        """
        return cls(entries, tf.ones(tf.shape(entries)[:1], tf.int32))


def log_importance_weights(
    log_likelihoods: tf.Tensor, counts: tf.Tensor, likelihood_scale: float
) -> tf.Tensor:
    """The logarithms of the importance weights, not normalized: tau * l_k + log c_k.

    Their softmax over the samples is r, the importance weights, which sum to 1.

    Args:
        log_likelihoods: l_k, any shape.
        counts: c_k, the number of draws of sample k; the same shape.
        likelihood_scale: tau.

    Returns:
        float32 of the same shape.

    Reference: PARSEC (arXiv:1902.05116), importance-weighted Monte Carlo empirical Bayes. There
    tau = 1 and c_k = 1.
    """
    log_counts = tf.math.log(tf.cast(counts, tf.float32))
    return likelihood_scale * tf.cast(log_likelihoods, tf.float32) + log_counts


def likelihood_coefficients(
    log_likelihoods: tf.Tensor,
    counts: tf.Tensor,
    likelihood_scale: float = 1.0,
    control_variate: bool = True,
) -> tf.Tensor:
    """The coefficients -(r_k - b_k) of the gradient that increases the likelihood.

    The gradient is sum_k -(r_k - b_k) * d log p(A_k) / d alpha, with the importance weights
    r = softmax_k(tau * l_k + log c_k). With the control variate b_k = c_k / K. E[d log p] = 0, so
    the control variate does not change the expectation, but it removes most of the variance. The
    papers' formula is b = 0.

    Args:
        log_likelihoods: l_k on a batch of the architecture part, shape `(evaluated,)`.
        counts: c_k, the number of draws of sample k, shape `(evaluated,)`.
        likelihood_scale: tau.
        control_variate: Whether b is c / K. Otherwise it is 0.

    Returns:
        float32 of shape `(evaluated,)`.

    Reference: PARSEC (arXiv:1902.05116), the gradient estimator of the architecture parameters.
    """
    log_weights = log_importance_weights(log_likelihoods, counts, likelihood_scale)
    importance = tf.nn.softmax(log_weights)
    return _shares(counts) - importance if control_variate else -importance


def penalty_coefficients(
    costs: tf.Tensor, counts: tf.Tensor, target: float, logarithm: bool = False
) -> tf.Tensor:
    """The coefficients of d log p(A_k) / d alpha that decrease the paper's hinge penalty.

    The penalty of sample k is C_k = max(0, cost_k / target - 1). The paper's text can be read in
    two ways. If it penalizes the mean of C, the coefficients are c_k / K * (C_k - mean C). If it
    penalizes log(mean C), they are c_k / K * (C_k / mean C - 1).

    Args:
        costs: cost_k, shape `(evaluated,)`.
        counts: c_k, the number of draws of sample k, shape `(evaluated,)`.
        target: The target of the cost.
        logarithm: Whether the logarithm of the mean is penalized.

    Returns:
        float32 of shape `(evaluated,)`; all 0 if no cost is above the target.

    Reference: FP-NAS (arXiv:2011.10949), section on cost-aware search.
    """
    shares = _shares(counts)
    penalties = tf.cast(tf.nn.relu(costs / target - 1.0), tf.float32)
    mean = tf.reduce_sum(shares * penalties)
    excess = shares * (penalties - mean)
    return tf.math.divide_no_nan(excess, mean) if logarithm else excess


def _shares(counts):
    return tf.cast(counts, tf.float32) / tf.cast(tf.reduce_sum(counts), tf.float32)


class StreamingSum(NamedTuple):
    """The state of sum_k softmax(s)_k * x_k while the scores s_k arrive one by one.

    As in online softmax, the sums are kept relative to a reference score, and are rescaled when the
    reference changes. The result is exact, and there is one accumulator for any K. The
    reference does not have to be the largest score. While it is at most `SLACK` below the largest,
    nothing overflows and nothing is rescaled.

    Every sample takes two calls: `add_score` with s_k gives a factor, and `add_scaled` takes
    factor * x_k. If x_k is a gradient, it can be computed with the factor in it.

    Attributes:
        reference: One of the scores, at most `SLACK` below the largest.
        denominator: sum_k exp(s_k - reference).
        sums: For each x, sum_k exp(s_k - reference) * x_k.

    Example:

    The scores 0 and log(3) have the softmax 1/4 and 3/4.

    >>> state = StreamingSum.zero([tf.constant(0.0)])
    >>> for score, x in [(0.0, 10.0), (math.log(3), 20.0)]:
    ...     state, factor = state.add_score(tf.constant(score))
    ...     state = state.add_scaled([factor * x])
    >>> round(float(state.result()[0]), 3)  # 1/4 * 10 + 3/4 * 20
    17.5
    """

    reference: tf.Tensor
    denominator: tf.Tensor
    sums: tuple[tf.Tensor, ...]

    @classmethod
    def zero(cls, like: Sequence[tf.Tensor]) -> "StreamingSum":
        """The empty sum, for values with the shapes of `like`."""
        return cls(
            tf.constant(-math.inf),
            tf.constant(0.0),
            tuple(tf.zeros_like(x, tf.float32) for x in like),
        )

    def add_score(self, score: tf.Tensor) -> tuple["StreamingSum", tf.Tensor]:
        """Adds the score of one more sample.

        Args:
            score: s_k, a float32 scalar.

        Returns:
            The new state, and the factor by which to multiply the values x_k of the sample.
        """
        moves = score > self.reference + SLACK
        reference = tf.where(moves, score, self.reference)
        keep, factor = tf.exp(self.reference - reference), tf.exp(score - reference)
        sums = tf.cond(moves, lambda: [keep * total for total in self.sums], lambda: [*self.sums])
        return StreamingSum(reference, keep * self.denominator + factor, tuple(sums)), factor

    def add_scaled(self, values: Sequence[tf.Tensor]) -> "StreamingSum":
        """Adds the values of the sample whose score was added last.

        Args:
            values: Each x_k times the factor that `add_score` returned.
        """
        return self._replace(
            sums=tuple(total + tf.cast(x, tf.float32) for total, x in zip(self.sums, values))
        )

    def result(self) -> list[tf.Tensor]:
        """sum_k softmax(s)_k * x_k for each x; 0 for the empty sum."""
        return [tf.math.divide_no_nan(total, self.denominator) for total in self.sums]
