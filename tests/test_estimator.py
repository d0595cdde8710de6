import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from fpnas_keras.distributions import FactorizedLogits
from fpnas_keras.estimator import AdaptiveSamples, StreamingSum, hinge, sample_coefficients


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=12), st.integers(0, 99))
def test_streaming_sum_is_the_softmax_weighted_sum(scores, seed):
    rng = np.random.default_rng(seed)
    values = [
        [rng.normal(size=(2, 3)).astype(np.float32), rng.normal(size=()).astype(np.float32)]
        for _ in scores
    ]
    total = StreamingSum.zero(values[0])
    for score, value in zip(scores, values):
        total = total.add(tf.constant(score, tf.float32), value)
    weights = np.exp(np.array(scores, np.float64) - max(scores))
    weights /= weights.sum()
    for index, result in enumerate(total.result()):
        expected = sum(w * value[index] for w, value in zip(weights, values))
        np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("entropy", "expected"), [(0.0, 2), (8.0, 2), (8.1, 3), (36.5, 10), (1000.0, 16), (1e12, 16)]
)
def test_sample_count_follows_the_entropy(entropy, expected):
    assert int(AdaptiveSamples(scale=0.25, maximum=16)(tf.constant(entropy))) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"scale": 0},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"minimum": 0},
        {"minimum": 9, "maximum": 8},
    ],
)
def test_impossible_sample_counts_are_refused(change):
    with pytest.raises(ValueError, match="Received: "):
        AdaptiveSamples(**change)


def test_hinge_counts_only_what_is_over_the_target():
    costs = tf.constant([1.0, 2.0, 3.0], tf.float64)
    np.testing.assert_allclose(hinge(costs, 2.0), [0, 0, 0.5])


def test_coefficients_are_the_formula():
    log_likelihoods, penalties = np.array([-1.0, -0.5, -3.0]), np.array([0.0, 0.4, 0.2])
    r = np.exp(4 * log_likelihoods) / np.exp(4 * log_likelihoods).sum()
    cost = 0.7 / 3 * (penalties - penalties.mean())
    for control_variate, baseline in ((True, 1 / 3), (False, 0.0)):
        result = sample_coefficients(
            tf.constant(log_likelihoods), tf.constant(penalties), 4.0, 0.7, control_variate
        )
        np.testing.assert_allclose(result, -(r - baseline) + cost, atol=1e-6)


def test_one_sample_with_the_control_variate_has_no_gradient():
    coefficients = sample_coefficients(tf.constant([-0.3]), tf.constant([0.1]))
    np.testing.assert_allclose(coefficients, [0.0], atol=1e-7)


def estimates(tiny_space, table, count, draws, control_variate):
    """Gradient estimates of the logits of a distribution whose likelihoods are a table."""
    distribution = FactorizedLogits(tiny_space.blocks)
    distribution.logits.assign(tf.random.stateless_normal(distribution.logits.shape, (3, 4)))

    @tf.function
    def estimate(step):
        choices = distribution.sample(count, 0, step)
        log_likelihoods = tf.reduce_sum(tf.gather_nd(table, _table_index(choices)), axis=-1)
        coefficients = sample_coefficients(
            log_likelihoods, tf.zeros(count), control_variate=control_variate
        )
        return distribution.gradient(choices, coefficients)

    return distribution, np.array([estimate(tf.constant(step)) for step in range(draws)])


def _table_index(choices):
    blocks, variables = choices.shape[1:]
    positions = tf.constant(np.indices((blocks, variables)).transpose(1, 2, 0), tf.int32)
    positions = tf.broadcast_to(positions, (*choices.shape[:1], blocks, variables, 2))
    return tf.reshape(
        tf.concat([positions, choices[..., None]], -1), (choices.shape[0], blocks * variables, 3)
    )


def test_the_control_variate_changes_the_variance_and_not_the_mean(tiny_space):
    table = tf.random.stateless_normal((4, 6, 3), (5, 6)) * 0.1
    _, plain = estimates(tiny_space, table, 8, 4000, False)
    _, reduced = estimates(tiny_space, table, 8, 4000, True)
    error = plain.std(axis=0) / np.sqrt(len(plain))
    assert np.all(np.abs(plain.mean(axis=0) - reduced.mean(axis=0)) < 4.5 * error)
    assert reduced.var(axis=0).sum() < 0.2 * plain.var(axis=0).sum()


def test_the_estimator_reaches_the_exact_gradient_as_samples_grow(tiny_space):
    """The exact gradient is that of log E_p[exp(l)], PARSEC's objective, by enumeration."""
    from helpers import all_choices

    table = tf.random.stateless_normal((4, 6, 3), (5, 6))
    distribution, many = estimates(tiny_space, table, 4096, 20, True)
    choices = tf.constant(all_choices(tiny_space))
    log_likelihoods = tf.reduce_sum(tf.gather_nd(table, _table_index(choices)), axis=-1)
    with tf.GradientTape() as tape:
        objective = tf.reduce_logsumexp(distribution.log_prob(choices) + log_likelihoods)
    exact = -tape.gradient(objective, distribution.logits.value).numpy()
    _, few = estimates(tiny_space, table, 4, 4000, True)
    bias_few = np.linalg.norm(few.mean(axis=0) - exact)
    bias_many = np.linalg.norm(many.mean(axis=0) - exact)
    assert bias_many < 0.05 * np.linalg.norm(exact)
    assert bias_few > 2 * bias_many
