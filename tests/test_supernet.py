import itertools
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from helpers import make_tiny_space, random_choices

from fpnas_keras import Architecture, MacsCost, ParamsCost, spaces
from fpnas_keras.cost import CostTable
from fpnas_keras.networks.supernet import Supernet


def check_same_logits(space, supernet, run, choices):
    x = 255 * tf.random.stateless_uniform((8, *space.input_shape), (1, 2))
    model = space.architecture(choices).build()
    supernet.give_weights(model)
    expected = model(x, training=True).numpy()
    # Of the largest logit: against float64 the static network itself is off by 2e-5 of it.
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(run(x, tf.constant(choices)), expected, rtol=0, atol=atol)


def compiled(space):
    supernet = Supernet(space)
    for variable in supernet.trainable_variables:  # no value that hides a mistake, as beta = 0
        noise = tf.random.stateless_normal(variable.shape, (len(variable.path), 3))
        variable.assign_add(0.1 * noise)
    traces = []

    @tf.function(reduce_retracing=True)
    def run(x, choices):
        traces.append(1)
        return supernet(x, choices)

    return supernet, run, traces


def test_every_choice_of_every_variable_gives_the_logits_of_the_static_network():
    space = make_tiny_space()
    supernet, run, traces = compiled(space)
    base = np.array(
        [[0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0]], np.int32
    )
    checked = set()
    for block, variable in itertools.product(*map(range, space.cardinalities.shape)):
        for choice in range(space.cardinalities[block, variable]):
            choices = base.copy()
            choices[block, variable] = choice
            architecture = space.architecture(choices)
            if architecture not in checked:
                checked.add(architecture)
                check_same_logits(space, supernet, run, choices)
    assert len(checked) == 16
    assert len(traces) == 1


# The small spaces at their own size, the large ones at one that keeps some pixels for batch norm.
SIZES = {"mobile_mini": 28, "nas_bench_macro": 32}


EXAMPLE = str(pathlib.Path(__file__).parents[1] / "configs" / "spaces" / "example.json")


@pytest.fixture(scope="module", params=[*spaces.names(), EXAMPLE])
def any_space(request):
    size = SIZES.get(request.param, 64)
    space = spaces.get(request.param, input_shape=(size, size, 3))
    supernet, run, _ = compiled(space)
    return space, supernet, run


def check_random_architectures(any_space, seeds):
    space, supernet, run = any_space
    drawn = []
    for seed in seeds:
        drawn.append(random_choices(space, np.random.default_rng(seed)))
        check_same_logits(space, supernet, run, drawn[-1])
    architectures = [space.architecture(choices) for choices in drawn]
    for cost, method in ((MacsCost, Architecture.macs), (ParamsCost, Architecture.params)):
        costs = CostTable(space, cost())(tf.constant(np.array(drawn))).numpy().tolist()
        assert costs == list(map(method, architectures))


def test_random_architectures_of_every_space(any_space):
    check_random_architectures(any_space, range(4))


@pytest.mark.slow
def test_many_random_architectures_of_every_space(any_space):
    check_random_architectures(any_space, range(100, 200))


def test_recomputed_activations_give_the_same_gradients():
    space = make_tiny_space()
    kept, recomputed = Supernet(space), Supernet(space, recompute=True)
    recomputed.set_weights(kept.get_weights())
    x = 255 * tf.random.stateless_uniform((8, *space.input_shape), (1, 2))
    labels = tf.range(8) % space.num_classes

    def gradients(supernet):
        @tf.function(reduce_retracing=True)
        def step(choices):
            weights = [v.value for v in supernet.trainable_variables]
            with tf.GradientTape() as tape:
                logits = supernet(x, choices)
                loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            return tape.gradient(loss, weights, unconnected_gradients="zero")

        return step

    rng, one, other = np.random.default_rng(0), gradients(kept), gradients(recomputed)
    for _ in range(10):
        choices = tf.constant(random_choices(space, rng))
        for a, b in zip(one(choices), other(choices), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_every_weight_gets_a_gradient_under_some_architecture():
    space = make_tiny_space()
    supernet = Supernet(space)
    weights = supernet.trainable_variables
    for variable in weights:  # else some ReLUs are dead, and some gates saturated, for all images
        if variable.path.endswith("attention_reduce/bias"):
            variable.assign_add(5 * tf.ones(variable.shape))
        if variable.path.endswith("attention_expand/kernel"):
            variable.assign(0.1 * variable)
    x = 255 * tf.random.stateless_uniform((16, *space.input_shape), (1, 2))
    labels = tf.range(16) % space.num_classes

    @tf.function(reduce_retracing=True)
    def gradients(choices):
        with tf.GradientTape() as tape:
            logits = supernet(x, choices)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return tape.gradient(loss, [v.value for v in weights], unconnected_gradients="zero")

    rng = np.random.default_rng(0)
    reached = [np.zeros(v.shape, bool) for v in weights]
    for _ in range(150):
        for seen, gradient in zip(reached, gradients(tf.constant(random_choices(space, rng)))):
            seen |= gradient.numpy() != 0
    unreached = {v.path: np.argwhere(~seen) for v, seen in zip(weights, reached) if not seen.all()}
    # A skipped block projects where the widths differ, so never from its widest to its widest.
    corner = unreached.pop("block_1_skip/kernel")
    assert np.all(corner[:, 2:] >= 4)
    assert len(corner) == 4 * 4
    assert not unreached


def test_a_sample_leaves_alone_what_it_does_not_use():
    space = make_tiny_space()
    supernet = Supernet(space)
    x = 255 * tf.random.stateless_uniform((4, *space.input_shape), (1, 2))
    choices = np.zeros((4, 6), np.int32)
    choices[1] = [1, 0, 0, 0, 0, 0]  # the second block is skipped
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(supernet(x, tf.constant(choices)) ** 2)
    weights = [v.value for v in supernet.trainable_variables]
    gradients = tape.gradient(loss, weights, unconnected_gradients="zero")
    for variable, gradient in zip(supernet.trainable_variables, gradients):
        if "block_1/" in variable.path:
            assert not np.any(gradient), variable.path
