import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import make_tiny_space

import fpnas_keras as fpnas
from fpnas_keras.estimator import hinge
from fpnas_keras.searcher import _loss_and_accuracy
from fpnas_keras.supernet import Supernet


def tiny_images(count=60, seed=0):
    """Three classes that a network can tell apart: where the bright square is."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 3
    x = rng.uniform(0, 60, (count, 8, 8, 1))
    for image, label in zip(x, y):
        image[2 * label : 2 * label + 3, 2 * label : 2 * label + 3] += 150
    return x.astype(np.float32), y.astype(np.int32)


def batches(steps=4, **kwargs):
    return fpnas.data.search_batches(*tiny_images(), batch_size=10, steps_per_epoch=steps, **kwargs)


def make_search(optimizer=None, architecture_optimizer=None, warmup_steps=0, **kwargs):
    search = fpnas.ArchitectureSearch(make_tiny_space(), warmup_steps=warmup_steps, **kwargs)
    search.compile(optimizer or "sgd", architecture_optimizer or "adam")
    return search


def test_one_step_is_the_formula():
    """Against sums over the samples written out, with plain automatic differentiation."""
    target, scale, beta, count = 20_000.0, 3.0, 0.5, 5
    search = make_search(
        keras.optimizers.SGD(1.0),
        keras.optimizers.SGD(1.0),
        samples=count,
        cost=fpnas.MacsCost(target=target),
        cost_coefficient=beta,
        likelihood_scale=scale,
        seed=11,
    )
    logits = search.distribution.logits
    logits.assign(tf.random.stateless_normal(logits.shape, (1, 1)))
    weights = search.supernet.trainable_variables
    before = [w.numpy() for w in weights], logits.numpy()
    ((x_t, y_t), (x_v, y_v)) = next(iter(batches()))
    choices = search.distribution.sample(count, 11, 0)

    with tf.GradientTape() as tape:
        l_t = tf.stack([-_loss_and_accuracy(y_t, search.supernet(x_t, c))[0] for c in choices])
        r_t = tf.stop_gradient(tf.nn.softmax(scale * l_t))
        objective = tf.reduce_sum(r_t * l_t)
    weight_gradients = tape.gradient(
        objective, [w.value for w in weights], unconnected_gradients="zero"
    )
    l_v = tf.stack([-_loss_and_accuracy(y_v, search.supernet(x_v, c))[0] for c in choices])
    costs = [search.space.architecture(c).macs() for c in choices.numpy()]
    penalties = tf.cast(hinge(tf.constant(costs, tf.float64), target), tf.float32)
    assert np.count_nonzero(penalties) > 0
    with tf.GradientTape() as tape:
        log_p = search.distribution.log_prob(choices)
        loss = -tf.reduce_sum((tf.nn.softmax(scale * l_v) - 1 / count) * log_p)
        loss += beta / count * tf.reduce_sum((penalties - tf.reduce_mean(penalties)) * log_p)
    logits_gradient = tape.gradient(loss, logits.value)

    one_step = tf.data.Dataset.from_tensors(((x_t, y_t), (x_v, y_v)))
    history = search.fit(one_step, verbose=0, shuffle=False).history
    logs = {name: values[0] for name, values in history.items()}

    for weight, old, gradient in zip(weights, before[0], weight_gradients):
        np.testing.assert_allclose(
            weight, old + gradient, rtol=1e-3, atol=1e-4, err_msg=weight.path
        )
    np.testing.assert_allclose(logits, before[1] - logits_gradient, rtol=1e-4, atol=1e-5)
    assert logs["train_loss"] == pytest.approx(-float(tf.reduce_mean(l_t)), rel=1e-4)
    assert logs["validation_loss"] == pytest.approx(-float(tf.reduce_mean(l_v)), rel=1e-4)
    assert logs["samples"] == count
    assert (int(search.step.numpy()), int(search.total_samples.numpy())) == (1, count)


def test_each_optimizer_owns_its_variables_alone():
    search = make_search(
        keras.optimizers.SGD(0.1, momentum=0.9), keras.optimizers.SGD(0.1, momentum=0.9)
    )
    slots = len(search.supernet.trainable_variables)
    assert len(search.optimizer.variables) == 2 + slots  # iterations, learning rate
    assert len(search.architecture_optimizer.variables) == 2 + 1
    weights_only = make_search(architecture_optimizer=keras.optimizers.SGD(0.0))
    before = weights_only.distribution.logits.numpy()
    weights_only.fit(batches(), verbose=0, shuffle=False)
    assert np.array_equal(before, weights_only.distribution.logits)
    logits_only = make_search(keras.optimizers.SGD(0.0))
    before = [w.numpy() for w in logits_only.supernet.variables]
    logits_only.fit(batches(), verbose=0, shuffle=False)
    assert all(map(np.array_equal, before, logits_only.supernet.variables))
    assert np.any(logits_only.distribution.logits.numpy() != 0)


def test_nothing_is_retraced_while_the_number_of_samples_changes(monkeypatch):
    calls = []
    call = Supernet.call
    monkeypatch.setattr(Supernet, "call", lambda *args: calls.append(1) or call(*args))
    search = make_search(
        architecture_optimizer=keras.optimizers.Adam(0.3),
        samples=fpnas.AdaptiveSamples(scale=1.0),
    )
    data = batches(steps=5)
    history = search.fit(data, epochs=1, verbose=0, shuffle=False).history
    traced = len(calls)
    more = search.fit(data, epochs=4, verbose=0, shuffle=False).history
    assert len(calls) == traced == 2  # the training and the validation batch
    assert more["samples"][-1] < history["samples"][0]


def test_search_finds_what_the_cost_asks_for():
    """With the weights still, the target alone decides: entropy and K fall, the cost is met."""
    target = 16_000
    search = make_search(
        keras.optimizers.SGD(0.0),
        keras.optimizers.Adam(0.1),
        samples=fpnas.AdaptiveSamples(scale=2.0),
        cost=fpnas.MacsCost(target=target),
        cost_coefficient=100.0,
    )
    before = float(search.cost_table.expected(search.distribution.entry_probabilities()))
    history = search.fit(batches(steps=20), epochs=5, verbose=0, shuffle=False).history
    assert before > 1.2 * target
    assert history["expected_cost"][-1] < 1.05 * target
    assert search.derive().macs() <= target
    assert np.all(np.diff(history["entropy"]) < 0)
    assert history["samples"][-1] < history["samples"][0]
    assert int(search.total_samples.numpy()) == pytest.approx(20 * sum(history["samples"]))


def test_the_shared_weights_learn():
    search = make_search(keras.optimizers.SGD(0.05, momentum=0.9), samples=3)
    search.fit(batches(steps=60), epochs=3, verbose=0, shuffle=False)
    x, y = tiny_images(30, seed=1)
    result = search.evaluate(x, y, batch_size=30, verbose=0, return_dict=True)
    assert result["validation_accuracy"] > 0.8
    assert search.predict(x, verbose=0).shape == (30, 3)


def test_warm_up_trains_the_weights_and_leaves_the_logits():
    search = make_search(samples=4, warmup_steps=6, warmup_samples=3)
    weight = search.supernet.classes.kernel
    before = weight.numpy()
    history = search.fit(batches(steps=5), epochs=2, verbose=0, shuffle=False).history
    assert history["samples"] == [3.0, pytest.approx((3 + 4 * 4) / 5)]
    assert not np.array_equal(weight, before)
    # The optimizer of the logits has seen the 4 steps after the warm-up, no more.
    assert int(search.architecture_optimizer.iterations.numpy()) == 4
    first = make_search(samples=4, warmup_steps=100)
    first.fit(batches(steps=5), verbose=0, shuffle=False)
    assert np.all(first.distribution.logits.numpy() == 0)
    with pytest.raises(ValueError, match="5 steps, all of them in its warm-up"):
        first.derive()


def test_same_seed_same_search_and_another_seed_another():
    def run(seed):
        keras.utils.set_random_seed(seed)
        search = make_search(seed=seed)
        history = search.fit(batches(seed=seed), epochs=2, verbose=0, shuffle=False).history
        return history, search.distribution.logits.numpy()

    first, second, other = run(3), run(3), run(4)
    assert first[0] == second[0]
    assert np.array_equal(first[1], second[1])
    assert not np.array_equal(first[1], other[1])


def test_saved_weights_load_again(tmp_path):
    search = make_search(samples=2)
    search.fit(batches(steps=3), verbose=0, shuffle=False)
    search.save_weights(tmp_path / "search.weights.h5")
    keras.utils.set_random_seed(99)
    other = make_search(samples=2)
    other.load_weights(tmp_path / "search.weights.h5")
    x, _ = tiny_images(10)
    assert other.derive() == search.derive()
    assert int(other.step.numpy()) == 3
    np.testing.assert_array_equal(other.predict(x, verbose=0), search.predict(x, verbose=0))


def test_evaluate_weighs_a_smaller_last_batch():
    search = make_search(samples=2)
    x, y = tiny_images(30)
    y[20:] = 0  # the last batch is another matter

    def loss(part):
        logs = search.evaluate(x[part], y[part], batch_size=20, verbose=0, return_dict=True)
        return logs["validation_loss"]

    expected = (2 * loss(slice(20)) + loss(slice(20, 30))) / 3
    assert loss(slice(30)) == pytest.approx(expected, rel=1e-5)


def test_logits_stay_float32_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        search = make_search(samples=2)
        history = search.fit(batches(steps=2), verbose=0, shuffle=False).history
    finally:
        keras.config.set_dtype_policy("float32")
    assert search(tiny_images(4)[0]).dtype == tf.float32
    assert search.distribution.logits.dtype == "float32"
    assert np.isfinite(history["train_loss"][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cost": fpnas.MacsCost(target=1000)}, "`target` must be at least .* the least cost"),
        ({"cost": fpnas.ParamsCost(target=10)}, "parameters, the least cost in the space `tiny`"),
        ({"samples": 1}, "`samples` must be at least 2 a step with the control variate"),
        ({"samples": fpnas.AdaptiveSamples(minimum=1)}, "`samples` must be at least 2"),
        ({"samples": 0, "control_variate": False}, "`samples` must be at least 1 a step"),
    ],
)
def test_searches_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fpnas.ArchitectureSearch(make_tiny_space(), **arguments)


def test_without_control_variate_one_sample_is_allowed():
    search = make_search(samples=1, control_variate=False)
    search.fit(batches(steps=2), verbose=0, shuffle=False)
    assert np.any(search.distribution.logits.numpy() != 0)
