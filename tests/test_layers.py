import numpy as np
import pytest
import tensorflow as tf
from helpers import all_choices

from fpnas_keras.layers import (
    FactorizedLogits,
    SlicedBatchNorm,
    SlicedConv,
    SlicedDepthwiseConv,
)
from fpnas_keras.spaces import SearchBlock


@pytest.fixture
def distribution(tiny_space):
    """A distribution that is far from uniform."""
    layer = FactorizedLogits(tiny_space.blocks)
    layer.logits.assign(1.5 * tf.random.stateless_normal(layer.logits.shape, (1, 1)))
    return layer


def test_number_of_logits_is_the_sum_of_the_cardinalities():
    block = SearchBlock(
        filters=(8, 16, 24, 32, 40, 48, 56, 64, 72, 80),
        kernel_size=(3, 5),
        expansion=(1, 2, 3, 4, 5, 6),
        activation=("relu", "relu6", "hard_silu"),
        splits=(0, 1),
    )
    assert FactorizedLogits([block]).count_params() == 23
    fixed = SearchBlock(filters=(8,), kernel_size=(3, 5))
    assert FactorizedLogits([block, fixed]).count_params() == 25


def test_uniform_entropy_is_the_sum_of_log_cardinalities():
    block = SearchBlock(filters=(8, 16, 24), kernel_size=(3, 5), activation=("relu", "hard_silu"))
    entropy = FactorizedLogits([block, block]).entropy()
    assert float(entropy) == pytest.approx(2 * np.log(3 * 2 * 2), rel=1e-6)


def test_probabilities_and_entropy_are_those_of_an_enumeration(tiny_space, distribution):
    log_p = distribution.log_prob(tf.constant(all_choices(tiny_space))).numpy().astype(np.float64)
    assert np.exp(log_p).sum() == pytest.approx(1.0, abs=1e-5)
    assert float(distribution.entropy()) == pytest.approx(-(np.exp(log_p) * log_p).sum(), rel=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_mode_is_the_best_of_an_enumeration(tiny_space, distribution, seed):
    distribution.logits.assign(tf.random.stateless_normal(distribution.logits.shape, (seed, 0)))
    choices = all_choices(tiny_space)
    best = choices[np.argmax(distribution.log_prob(tf.constant(choices)))]
    assert np.array_equal(distribution.mode(), best)


def test_samples_follow_the_distribution(tiny_space, distribution):
    choices = all_choices(tiny_space)
    p = np.exp(distribution.log_prob(tf.constant(choices)).numpy())
    index = {each.tobytes(): i for i, each in enumerate(choices)}
    count = 200_000
    drawn = distribution.sample(count, seed=0, step=0).numpy()
    frequencies = np.zeros(len(choices))
    for each, times in zip(*np.unique(drawn, axis=0, return_counts=True)):
        frequencies[index[each.tobytes()]] = times
    # Pearson's statistic over the architectures that are expected often enough.
    common = p * count > 20
    expected = np.append(p[common], p[~common].sum()) * count
    observed = np.append(frequencies[common], frequencies[~common].sum())
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_samples_are_a_function_of_seed_and_step(distribution):
    draw = tf.function(distribution.sample)
    first = draw(tf.constant(50), 7, tf.constant(3, tf.int64)).numpy()
    assert np.array_equal(first, draw(tf.constant(50), 7, tf.constant(3, tf.int64)))
    assert not np.array_equal(first, draw(tf.constant(50), 7, tf.constant(4, tf.int64)))
    assert not np.array_equal(first, draw(tf.constant(50), 8, tf.constant(3, tf.int64)))


def test_gradient_is_that_of_automatic_differentiation(distribution):
    choices = distribution.sample(32, 0, 0)
    coefficients = tf.random.stateless_normal((32,), (2, 2))
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(coefficients * distribution.log_prob(choices))
    expected = tape.gradient(total, distribution.logits.value)
    np.testing.assert_allclose(
        distribution.gradient(choices, coefficients), expected, rtol=1e-4, atol=1e-4
    )


def test_irrelevant_variables_of_a_skipped_block_get_no_gradient(distribution):
    skipped = np.zeros((1, 4, 6), np.int32)
    skipped[0, 1, 0] = 1  # block 1: skip is its second choice
    gradient = distribution.gradient(tf.constant(skipped), tf.ones(1)).numpy()
    owners = np.argwhere(distribution._searched)  # (block, variable, choice) of each logit
    irrelevant = (owners[:, 0] == 1) & (owners[:, 1] >= 2)
    assert irrelevant.sum() == 2 + 3 + 2
    assert np.all(gradient[irrelevant] == 0)
    assert np.all(gradient[~irrelevant & (owners[:, 0] == 1)] != 0)


def test_probabilities_by_name(distribution):
    first, second, third, last = distribution.probabilities()
    assert list(first) == ["filters", "kernel_size", "expansion", "activation", "splits"]
    assert list(second["splits"]) == [1, 0]
    assert list(third) == ["skip", "activation"]
    assert list(last) == ["skip", "filters"]
    for choices in (*first.values(), *second.values(), *third.values(), *last.values()):
        assert sum(choices.values()) == pytest.approx(1.0, abs=1e-6)


def test_sliced_conv_is_a_convolution_with_the_leading_channels():
    layer = SlicedConv(6, 8, 3, 2, use_bias=True)
    layer.bias.assign(np.arange(8.0))
    x = tf.random.stateless_normal((2, 7, 7, 4), (0, 1))
    expected = tf.nn.conv2d(x, layer.kernel.value[:, :, :4, :5], 2, "SAME") + np.arange(5.0)
    np.testing.assert_allclose(layer(x, tf.constant(5)), expected, atol=1e-5)


def test_sliced_depthwise_conv_uses_the_middle_of_its_kernel():
    layer = SlicedDepthwiseConv(6, 5)
    x = tf.random.stateless_normal((2, 7, 7, 4), (0, 1))
    small = layer(x, tf.constant(3))
    rest = layer.kernel.value.numpy()
    rest[1:4, 1:4] = 0
    layer.kernel.assign(layer.kernel.value - rest)  # a 5x5 kernel that is 0 but for its middle
    np.testing.assert_allclose(small, layer(x, tf.constant(5)), atol=1e-5)


def test_sliced_batch_norm_uses_the_statistics_of_the_batch():
    layer = SlicedBatchNorm(6)
    x = 3 + 2 * tf.random.stateless_normal((64, 5, 5, 4), (0, 1))
    y = layer(x).numpy()
    np.testing.assert_allclose(y.mean(axis=(0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(y.std(axis=(0, 1, 2)), 1, atol=1e-2)
