import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from fpnas_keras.method.distributions import FactorizedLogits
from fpnas_keras.method.estimator import (
    AdaptiveSamples,
    CostController,
    Samples,
    StreamingSum,
    likelihood_coefficients,
    penalty_coefficients,
)


@settings(max_examples=50)
@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=12), st.integers(0, 99))
def test_streaming_sum_is_the_softmax_weighted_sum(scores, seed):
    rng = np.random.default_rng(seed)
    values = [
        [rng.normal(size=(2, 3)).astype(np.float32), rng.normal(size=()).astype(np.float32)]
        for _ in scores
    ]
    total = StreamingSum.zero(values[0])
    for score, value in zip(scores, values):
        total, factor = total.add_score(tf.constant(score, tf.float32))
        total = total.add_scaled([factor * each for each in value])
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


def test_likelihood_coefficients_are_the_formula():
    log_likelihoods, counts = np.array([-1.0, -0.5, -3.0]), np.array([1, 3, 2])
    weights = counts * np.exp(4 * log_likelihoods)
    r = weights / weights.sum()
    for control_variate, baseline in ((True, counts / 6), (False, 0.0)):
        result = likelihood_coefficients(
            tf.constant(log_likelihoods), tf.constant(counts), 4.0, control_variate
        )
        np.testing.assert_allclose(result, -(r - baseline), atol=1e-6)


def test_penalty_coefficients_are_the_gradient_of_the_hinge():
    """The gradients of the mean hinge and of its logarithm."""
    costs, counts = np.array([1.0, 5.0, 3.0]), np.array([1, 3, 2])
    penalties = np.array([0.0, 1.5, 0.5])
    mean = (counts * penalties).sum() / 6
    arguments = (tf.constant(costs, tf.float64), tf.constant(counts), 2.0)
    expected = counts / 6 * (penalties - mean)
    np.testing.assert_allclose(penalty_coefficients(*arguments), expected, atol=1e-6)
    logarithm = penalty_coefficients(*arguments, logarithm=True)
    np.testing.assert_allclose(logarithm, expected / mean, atol=1e-6)
    within = penalty_coefficients(tf.constant([1.0, 2.0]), tf.constant([1, 1]), 2.0, True)
    np.testing.assert_array_equal(within, [0, 0])


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=20), st.booleans())
def test_a_sample_counts_as_often_as_it_was_drawn(which, control_variate):
    """Evaluating equal samples once gives the same sums as evaluating every draw."""
    log_likelihoods, costs = np.array([-0.1, -2.0, -0.7, 1.3]), np.array([1.0, 5.0, 3.0, 2.0])
    drawn = tf.constant(which)[:, None]
    samples = Samples.unique(drawn)
    assert int(tf.reduce_sum(samples.counts)) == len(which)
    kept = samples.entries.numpy().ravel()
    assert kept.tolist() == list(dict.fromkeys(which))
    each, ones = np.array(which), tf.ones(len(which), tf.int32)
    for values, coefficients, options in (
        (log_likelihoods, likelihood_coefficients, (2.0, control_variate)),
        (costs, penalty_coefficients, (2.0,)),
    ):
        counted = coefficients(tf.constant(values[kept]), samples.counts, *options).numpy()
        plain = coefficients(tf.constant(values[each]), ones, *options).numpy()
        sums = [plain[each == sample].sum() for sample in kept]
        np.testing.assert_allclose(counted, sums, atol=1e-6)


def test_one_sample_with_the_control_variate_has_no_gradient():
    coefficients = likelihood_coefficients(tf.constant([-0.3]), tf.constant([1]))
    np.testing.assert_allclose(coefficients, [0.0], atol=1e-7)


def test_the_controller_is_the_formula():
    controller = CostController(proportional_gain=0.5, integral_gain=0.1, anneal_steps=10)
    coefficient, integral = controller(tf.constant(0.2), tf.constant(-0.4))
    assert float(integral) == pytest.approx(0.2 - 0.04)
    assert float(coefficient) == pytest.approx(0.16 - 0.2)
    one_sided = CostController(two_sided=False, proportional_gain=0.5, integral_gain=0.1)
    coefficient, integral = one_sided(tf.constant(0.02), tf.constant(-0.4))
    assert (float(coefficient), float(integral)) == (0.0, 0.0)
    goals = [float(controller.goal(8e6, 2e6, tf.constant(step))) for step in (0, 5, 10, 99)]
    assert goals == pytest.approx([8e6, 4e6, 2e6, 2e6])
    assert float(CostController(anneal_steps=0).goal(8e6, 2e6, tf.constant(0))) == 2e6


@pytest.mark.parametrize("name", ["proportional_gain", "integral_gain", "anneal_steps"])
def test_impossible_controllers_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 0"):
        CostController(**{name: -1})


def estimates(tiny_space, table, count, draws, control_variate, stratified=False):
    """Estimates the gradient of the logits, with log-likelihoods from a table of choices."""
    distribution = FactorizedLogits(tiny_space)
    distribution.logits.assign(tf.random.stateless_normal(distribution.logits.shape, (3, 4)))

    @tf.function
    def estimate(step):
        entries = distribution.sample(count, 0, step, stratified)
        log_likelihoods = likelihoods_of(tiny_space, table, entries)
        coefficients = likelihood_coefficients(
            log_likelihoods, tf.ones(count, tf.int32), control_variate=control_variate
        )
        return distribution.gradient(entries, coefficients)

    return distribution, np.array([estimate(tf.constant(step)) for step in range(draws)])


def likelihoods_of(space, table, entries):
    """Sums the values that a table has for each choice of each variable."""
    blocks, variables = np.indices(table.shape[:2])
    values = table.numpy()[blocks[:, None], variables[:, None], space.entries.choices].sum(axis=-1)
    return tf.reduce_sum(tf.gather(values.ravel(), entries + space.entries.offsets), axis=-1)


def test_the_control_variate_changes_the_variance_and_not_the_mean(tiny_space):
    table = tf.random.stateless_normal((4, 6, 3), (5, 6)) * 0.1
    _, plain = estimates(tiny_space, table, 8, 4000, False)
    _, reduced = estimates(tiny_space, table, 8, 4000, True)
    error = plain.std(axis=0) / np.sqrt(len(plain))
    assert np.all(np.abs(plain.mean(axis=0) - reduced.mean(axis=0)) < 4.5 * error)
    assert reduced.var(axis=0).sum() < 0.2 * plain.var(axis=0).sum()


def test_stratified_draws_lower_the_relative_variance(tiny_space):
    """Independent draws have (K - 1) / K of the signal, and stratified draws nearly all of it."""
    table = tf.random.stateless_normal((4, 6, 3), (5, 6)) * 0.1
    _, plain = estimates(tiny_space, table, 8, 4000, True)
    _, stratified = estimates(tiny_space, table, 8, 4000, True, stratified=True)
    signals = [np.linalg.norm(each.mean(axis=0)) for each in (plain, stratified)]
    assert 1 < signals[1] / signals[0] < 8 / 7 * 1.05
    cosine = plain.mean(axis=0) @ stratified.mean(axis=0) / np.prod(signals)
    assert cosine > 0.99
    relative = [each.var(axis=0).sum() / s**2 for each, s in zip((plain, stratified), signals)]
    assert relative[1] < 0.95 * relative[0]


def test_the_estimator_reaches_the_exact_gradient_as_samples_grow(tiny_space):
    """PARSEC's objective is log E_p[exp(l)]. Its exact gradient comes from an enumeration."""
    from helpers import all_entries

    table = tf.random.stateless_normal((4, 6, 3), (5, 6))
    distribution, many = estimates(tiny_space, table, 4096, 20, True)
    entries = tf.constant(all_entries(tiny_space))
    log_likelihoods = likelihoods_of(tiny_space, table, entries)
    with tf.GradientTape() as tape:
        objective = tf.reduce_logsumexp(distribution.log_prob(entries) + log_likelihoods)
    exact = -tape.gradient(objective, distribution.logits.value).numpy()
    _, few = estimates(tiny_space, table, 4, 4000, True)
    bias_few = np.linalg.norm(few.mean(axis=0) - exact)
    bias_many = np.linalg.norm(many.mean(axis=0) - exact)
    assert bias_many < 0.05 * np.linalg.norm(exact)
    assert bias_few > 2 * bias_many
