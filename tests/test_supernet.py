"""The supernet against the plain networks, its gradients, and how its weights are handed over."""

import dataclasses
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import ROOT, make_tiny_space, random_choices

from fpnas_keras import Architecture, MacsCost, ParamsCost, UserError, spaces
from fpnas_keras.architecture import Head, Stem
from fpnas_keras.cost import SpaceCost
from fpnas_keras.networks import Supernet, check_floatx
from fpnas_keras.spaces import VARIABLES, SearchBlock, Space

BASE = np.array(
    [[0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0]], np.int32
)


def single_changes(space):
    """`BASE`, and every architecture that differs from it in one choice."""
    found = {}
    for block, variable in itertools.product(*map(range, space.cardinalities.shape)):
        for choice in range(space.cardinalities[block, variable]):
            choices = BASE.copy()
            choices[block, variable] = choice
            found.setdefault(space.architecture(choices), choices)
    return found


def check_same_logits(space, supernet, run, choices):
    x = 255 * tf.random.stateless_uniform((8, *space.input_shape), (1, 2))
    model = space.architecture(choices).build()
    supernet.give_weights(model)
    expected = model(x, training=True).numpy()
    # Relative to the largest logit. Against float64, the plain network itself is off by 2e-5.
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(run(x, tf.constant(choices)), expected, rtol=0, atol=atol)


def make_supernet(space, **kwargs):
    """A supernet in which blocks that add their input do not start as the identity."""
    supernet = Supernet(space, **kwargs)
    for variable in supernet.trainable_variables:
        if variable.path.endswith("project_bn/gamma"):
            variable.assign(tf.ones(variable.shape))
    return supernet


def compiled(space):
    supernet = make_supernet(space)
    for variable in supernet.trainable_variables:  # values such as beta = 0 would hide mistakes
        noise = tf.random.stateless_normal(variable.shape, (len(variable.path), 3))
        variable.assign_add(0.1 * noise)
    traces = []

    @tf.function(reduce_retracing=True)
    def run(x, choices):
        traces.append(1)
        return supernet(x, choices)

    return supernet, run, traces


def test_every_choice_of_every_variable_gives_the_logits_of_the_plain_network():
    space = make_tiny_space()
    supernet, run, traces = compiled(space)
    found = single_changes(space)
    for choices in found.values():
        check_same_logits(space, supernet, run, choices)
    assert len(found) == 16
    assert len(traces) == 1


# Small spaces at their own size. Large ones at a size that leaves batch norms a few pixels.
SIZES = {"mobile_mini": 28, "mobile_40": 28, "nas_bench_macro": 32}


EXAMPLE = str(ROOT / "configs" / "spaces" / "example.json")


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
        entries = space.entries.from_choices(np.array(drawn))
        costs = SpaceCost(space, cost())(tf.constant(entries)).numpy().tolist()
        assert costs == list(map(method, architectures))


def test_random_architectures_of_every_space(any_space):
    check_random_architectures(any_space, range(4))


@pytest.mark.slow
def test_many_random_architectures_of_every_space(any_space):
    check_random_architectures(any_space, range(100, 200))


def test_recomputed_activations_give_the_same_gradients():
    space = make_tiny_space()
    kept, recomputed = make_supernet(space), Supernet(space, recompute=True)
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


def test_blocks_that_add_their_input_start_as_the_identity():
    """So networks with and without them start equal."""
    space = spaces.get("mobile_mini", (16, 16, 1))
    supernet = Supernet(space)
    x = 255 * tf.random.stateless_uniform((4, *space.input_shape), (1, 2))
    with_blocks = random_choices(space, np.random.default_rng(0))
    with_blocks[:, VARIABLES.index("skip")] = 0
    without = with_blocks.copy()
    for choices, block in zip(without, space.blocks):
        if len(block.skip) > 1:
            choices[VARIABLES.index("skip")] = 1
    assert space.architecture(with_blocks) != space.architecture(without)
    np.testing.assert_array_equal(
        supernet(x, tf.constant(with_blocks)), supernet(x, tf.constant(without))
    )


def test_every_weight_gets_a_gradient_under_some_architecture():
    space = make_tiny_space()
    supernet = make_supernet(space)
    weights = supernet.trainable_variables
    for variable in weights:  # else some ReLUs are dead and some gates saturated for all images
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
    # A skipped block projects only if the widths differ. So the largest input width never meets the
    # largest output width, and these weights get no gradient.
    corner = unreached.pop("block_1_skip/kernel")
    assert np.all(corner[:, 2:] >= 4)
    assert len(corner) == 4 * 4
    assert not unreached


def make_halving_space(side, blocks):
    """A space whose blocks all halve the features and have one structure, but for odd sizes."""
    block = SearchBlock(filters=(4, 8), kernel_size=(3, 5), expansion=(2, 3), strides=2)
    widened = dataclasses.replace(block, filters=(8, 12))
    return Space(
        name="halving",
        input_shape=(side, side, 1),
        num_classes=3,
        stem=Stem(filters=8, kernel_size=3, strides=1, activation="relu"),
        blocks=(block, widened, *[block] * (blocks - 2)),
        head=Head(filters=16, activation="relu"),
    )


@pytest.mark.parametrize("side", [10, 24])  # 10, 5, 3, 2 and 24, 12, 6, 3
def test_gradients_are_those_of_the_plain_network(side):
    space = make_halving_space(side, blocks=3)
    supernet = Supernet(space)
    choices = np.array([[0, 1, 1, 1, 0, 0]] * 3, np.int32)  # all weights
    model = space.architecture(choices).build()
    supernet.give_weights(model)
    x = 255 * tf.random.stateless_uniform((16, *space.input_shape), (1, 2))
    with tf.GradientTape(persistent=True) as tape:
        received = tf.reduce_sum(supernet(x, tf.constant(choices)) ** 2)
        expected = tf.reduce_sum(model(x, training=True) ** 2)
    for name, layer in supernet.layers_by_plain_name().items():
        plain = {v.name: v for v in model.get_layer(name).trainable_variables}
        for variable in layer.trainable_variables:
            ours = tape.gradient(received, variable.value)
            theirs = tape.gradient(expected, plain[variable.name].value)
            # Some are 0: batch norms take away what they add.
            atol = 1e-5 + 1e-3 * np.abs(theirs).max()
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=variable.path)


def test_the_graph_does_not_grow_with_blocks_of_the_same_structure():
    def functions(blocks):
        space = make_halving_space(64, blocks)
        run = tf.function(Supernet(space))
        images = tf.TensorSpec((2, *space.input_shape))
        traced = run.get_concrete_function(images, tf.TensorSpec((blocks, 6), tf.int32))
        return len(traced.graph.as_graph_def().library.function)

    assert functions(5) == functions(3) > 0


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


def test_stem_and_body_are_all_variables_in_order():
    for space in (make_tiny_space(), spaces.get("fbnet_c", input_shape=(32, 32, 3))):
        supernet = Supernet(space)
        stem = [variable.path for variable in supernet.stem_variables]
        body = [variable.path for variable in supernet.body_variables]
        assert stem == ["stem/kernel", "stem_bn/gamma", "stem_bn/beta"]
        assert body and not set(stem) & set(body)
        assert stem + body == [variable.path for variable in supernet.trainable_variables]


def test_weights_are_given_to_every_trainable_variable():
    space = make_tiny_space()
    supernet = Supernet(space)
    for variable in supernet.trainable_variables:
        variable.assign(7 * tf.ones(variable.shape))
    for architecture in single_changes(space):
        model = architecture.build()
        supernet.give_weights(model)
        for variable in model.trainable_variables:
            assert np.all(variable.numpy() == 7), variable.path


def test_given_weights_are_the_leading_channels_and_the_middle_of_the_kernel():
    space = make_tiny_space()
    supernet = Supernet(space)
    choices = BASE.copy()
    choices[0] = [0, 0, 0, 1, 0, 1]  # 4 of 8 filters, a 3x3 kernel out of 5x5
    model = space.architecture(choices).build()
    supernet.give_weights(model)
    block = supernet.blocks[0]
    expected = block.depthwise[0].kernel.numpy()[1:4, 1:4]
    np.testing.assert_array_equal(model.get_layer("block_0_depthwise_0").kernel, expected)
    expected = block.project.kernel.numpy()[..., :4]
    np.testing.assert_array_equal(model.get_layer("block_0_project").kernel, expected)


def test_foreign_models_get_no_weights():
    space = make_tiny_space()
    supernet = Supernet(space)

    def model_with(layer, shape=(8, 8, 1)):
        inputs = keras.Input(shape)
        return keras.Model(inputs, layer(inputs))

    conv = keras.layers.Conv2D
    larger = make_tiny_space(num_classes=5).architecture(BASE).build()
    for message, model in (
        ("Received: layer=mine", model_with(conv(8, 3, name="mine"))),
        ("layer `stem` must have the weights kernel,.*bias", model_with(conv(8, 3, name="stem"))),
        (
            "weight `kernel` of the layer `stem` must fit .*Received: shape=\\(5, 5, 1, 8\\)",
            model_with(conv(8, 5, use_bias=False, name="stem")),
        ),
        ("weight `kernel` of the layer `classes` must fit", larger),
    ):
        with pytest.raises(UserError, match=message):
            supernet.give_weights(model)


@pytest.fixture
def channels_first():
    keras.config.set_image_data_format("channels_first")
    yield
    keras.config.set_image_data_format("channels_last")


def test_keras_data_format_changes_no_network(request):
    space = make_tiny_space(input_shape=(8, 8, 3))
    x = 255 * tf.random.stateless_uniform((4, *space.input_shape), (1, 2))
    found = list(single_changes(space).items())

    def outputs():
        keras.utils.set_random_seed(0)
        supernet = Supernet(space)
        for architecture, choices in found:
            model = architecture.build()
            assert model.count_params() > architecture.params()  # the moving statistics
            yield model.count_params()
            yield model(x).numpy()
            yield supernet(x, tf.constant(choices)).numpy()

    expected = list(outputs())
    request.getfixturevalue("channels_first")
    for ours, theirs in zip(outputs(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("floatx", ["float16", "float64"])
def test_other_float_types_are_refused(floatx):
    space = make_tiny_space()
    keras.config.set_floatx(floatx)
    try:
        for build in (check_floatx, space.architecture(BASE).build, lambda: Supernet(space)):
            with pytest.raises(UserError, match=f"floatx must be float32; .*floatx={floatx}$"):
                build()
    finally:
        keras.config.set_floatx("float32")


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_dtype_policies_for_mixed_precision_give_about_the_same_logits(policy):
    space = make_tiny_space()
    x = 255 * tf.random.stateless_uniform((16, *space.input_shape), (1, 2))
    expected = Supernet(space)
    keras.config.set_dtype_policy(policy)
    try:
        mixed, model = Supernet(space), space.architecture(BASE).build()
    finally:
        keras.config.set_dtype_policy("float32")
    mixed.set_weights(expected.get_weights())
    mixed.give_weights(model)
    expected = expected(x, tf.constant(BASE))
    for logits in (mixed(x, tf.constant(BASE)), model(x, training=True)):
        assert logits.dtype == tf.float32
        assert 0 < np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()
