import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import all_choices, all_entries, make_tiny_space

import fpnas_keras as fpnas
from fpnas_keras.method.architecture_search import _clip, _loss_and_accuracy
from fpnas_keras.method.distributions import JointLogits
from fpnas_keras.networks.supernet import Supernet
from fpnas_keras.runs.callbacks import StopOnDivergence


def tiny_images(count=60, seed=0):
    """Images of three classes, which differ in the position of a bright square."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 3
    x = rng.uniform(0, 60, (count, 8, 8, 1))
    for image, label in zip(x, y):
        image[2 * label : 2 * label + 3, 2 * label : 2 * label + 3] += 150
    return x.astype(np.float32), y.astype(np.int32)


def batches(steps=4, **kwargs):
    return fpnas.data.search_batches(*tiny_images(), batch_size=10, steps_per_epoch=steps, **kwargs)


def make_search(optimizer=None, architecture_optimizer=None, blocks=1, **kwargs):
    """A compiled search. One block is the fastest to trace, for tests of any space."""
    space = make_tiny_space(blocks=blocks)
    paper = {"warmup_steps": 0, "start": "uniform", "cost_window": 0.0}
    search = fpnas.ArchitectureSearch(space, **paper | kwargs)
    search.compile(optimizer or "sgd", architecture_optimizer or "adam")
    return search


def kernels_of(name, library):
    """The functions with batch norms that a function runs, itself among them."""
    found, todo = set(), [name]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        for node in library[name].node_def:
            for value in node.attr.values():
                todo += [value.func.name] if value.HasField("func") else []
                todo += [function.name for function in value.list.func]
    return {each for each in found if any("BatchNorm" in n.op for n in library[each].node_def)}


def test_the_halves_of_a_step_share_no_kernels():
    """Nothing orders them, and TensorFlow's batch norms must not run twice at once."""
    step = tf.function(make_search(blocks=4).train_step)
    graph = step.get_concrete_function(next(iter(batches()))).graph
    library = {each.signature.name: each for each in graph.as_graph_def().library.function}
    weights, logits = (
        kernels_of(each.get_attr("body").name, library)
        for each in graph.get_operations()
        if each.type in ("While", "StatelessWhile")
    )
    assert weights and logits and not weights & logits


@pytest.mark.parametrize(
    ("penalty", "deduplicate", "blocks"),
    [
        ("expected", True, 4),
        ("hinge", True, 2),
        ("log", True, 2),
        ("expected", False, 2),
        ("hinge", False, 2),
        ("log", False, 2),
    ],
)
def test_one_step_is_the_formula(penalty, deduplicate, blocks):
    """Compares with plain sums over the draws and automatic differentiation."""
    target, scale, beta, count = 20_000.0, 3.0, 0.5, 5
    search = make_search(
        keras.optimizers.SGD(1.0),
        keras.optimizers.SGD(1.0),
        samples=count,
        cost=fpnas.MacsCost(target=target),
        cost_coefficient=beta,
        cost_penalty=penalty,
        likelihood_scale=scale,
        deduplicate=deduplicate,
        seed=11,
        blocks=blocks,
    )
    # One network is most probable, so that it comes more than once.
    logits = search.distribution.logits
    logits.assign(4 * tf.random.stateless_normal(logits.shape, (0, 1)))
    weights = search.supernet.trainable_variables
    before = [w.numpy() for w in weights], logits.numpy()
    ((x_t, y_t), (x_v, y_v)) = next(iter(batches()))
    entries = search.distribution.sample(count, 11, 0, stratified=True)
    choices = search.space.entries.to_choices(entries)
    different = len(np.unique(entries, axis=0))
    assert different < count

    with tf.GradientTape() as tape:
        l_t = tf.stack([-_loss_and_accuracy([y_t], search.supernet(x_t, c))[0] for c in choices])
        r_t = tf.stop_gradient(tf.nn.softmax(scale * l_t))
        objective = tf.reduce_sum(r_t * l_t)
    weight_gradients = tape.gradient(
        objective, [w.value for w in weights], unconnected_gradients="zero"
    )
    l_v = tf.stack([-_loss_and_accuracy([y_v], search.supernet(x_v, c))[0] for c in choices])
    costs = np.array([search.space.architecture(c).macs() for c in choices])
    penalties = np.maximum(0, costs / target - 1).astype(np.float32)
    assert np.count_nonzero(penalties) > 0
    with tf.GradientTape() as tape:
        log_p = search.distribution.log_prob(entries)
        loss = -tf.reduce_sum((tf.nn.softmax(scale * l_v) - 1 / count) * log_p)
        if penalty == "expected":
            every = all_choices(search.space)
            macs = [search.space.architecture(c).macs() for c in every]
            p = tf.exp(search.distribution.log_prob(all_entries(search.space)))
            loss += beta * tf.reduce_sum(p * np.array(macs, np.float32)) / target
        else:
            term = tf.reduce_sum((penalties - penalties.mean()) * log_p) / count
            loss += beta * term / (penalties.mean() if penalty == "log" else 1)
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
    assert logs["evaluated"] == (different if deduplicate else count)
    assert logs["cost_coefficient"] == beta
    assert (int(search.step.numpy()), int(search.total_samples.numpy())) == (1, count)


def test_clipping_is_that_of_keras():
    weights = []
    for clip_norm, global_clipnorm in ((0.01, None), (None, 0.01), (None, None)):
        keras.utils.set_random_seed(0)
        search = make_search()
        optimizer = keras.optimizers.SGD(1.0, global_clipnorm=global_clipnorm)
        search.compile(optimizer, "adam", clip_norm=clip_norm)
        search.fit(batches(steps=1), verbose=0)
        weights.append(search.supernet.get_weights())
    ours, theirs, unclipped = weights
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert any(np.abs(one - other).max() > 0.01 for one, other in zip(ours, unclipped))


@pytest.mark.parametrize("value", [0.0, 0.1, 5.0, np.inf, np.nan])
def test_clipping_is_that_of_tensorflow(value):
    gradients = [tf.constant([1.0, value]), tf.constant([[2.0]])]
    expected, _ = tf.clip_by_global_norm(gradients, 2.5)
    for one, other in zip(_clip(gradients, 2.5), expected):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("clip_norm", [0, -1.0, np.nan])
def test_bad_norms_are_refused(clip_norm):
    with pytest.raises(fpnas.UserError, match="`clip_norm` must be above 0"):
        make_search().compile(clip_norm=clip_norm)


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
    logits = Supernet.logits
    monkeypatch.setattr(Supernet, "logits", lambda *args: calls.append(1) or logits(*args))
    search = make_search(
        architecture_optimizer=keras.optimizers.Adam(0.3),
        samples=fpnas.AdaptiveSamples(scale=4.0),
    )
    data = batches(steps=5)
    history = search.fit(data, epochs=1, verbose=0, shuffle=False).history
    traced = len(calls)
    more = search.fit(data, epochs=4, verbose=0, shuffle=False).history
    assert len(calls) == traced == 2  # the training and the validation batch
    assert more["samples"][-1] < history["samples"][0]


def expected_cost(search):
    return float(search.space_cost.expected(search.distribution.entry_probabilities()))


@pytest.mark.parametrize("target", [16_000, 45_000])
def test_the_controller_settles_at_the_target(target):
    """From both sides, with likelihoods that do not depend on the cost."""
    search = make_search(
        architecture_optimizer=keras.optimizers.Adam(0.02),
        samples=fpnas.AdaptiveSamples(scale=2.0),
        cost=fpnas.MacsCost(target=target),
        cost_coefficient=fpnas.CostController(anneal_steps=100),
        blocks=4,
    )
    before = expected_cost(search)
    assert 1.2 * 16_000 < before < 45_000 / 1.2
    tell, ask = tf.function(search.tell, reduce_retracing=True), tf.function(search.ask)
    costs = []
    for step in range(400):
        samples = ask()
        noise = 0.1 * tf.random.stateless_normal(tf.shape(samples.counts), (step, 5))
        logs = tell(samples, noise)
        costs.append(float(logs["expected_cost"]))
    assert np.abs(np.array(costs[-100:]) / target - 1).max() < 0.1
    # The goal moved in equal ratios.
    assert costs[50] == pytest.approx(np.sqrt(before * target), rel=0.15)
    assert search.derive().macs() <= target


def test_one_sided_control_does_not_reward_cost():
    search = make_search(
        cost=fpnas.MacsCost(target=30_000),
        cost_coefficient=fpnas.CostController(two_sided=False, anneal_steps=0),
    )
    history = search.fit(batches(), verbose=0, shuffle=False).history
    assert history["cost_coefficient"] == [0.0]
    two_sided = make_search(cost=fpnas.MacsCost(target=30_000))
    history = two_sided.fit(batches(), verbose=0, shuffle=False).history
    assert history["cost_coefficient"][0] < 0


@pytest.mark.parametrize("distribution", ["factorized", "joint"])
@pytest.mark.parametrize("target", [20_000, 26_000])
def test_the_search_starts_at_the_target(distribution, target):
    kwargs = {"cost": fpnas.MacsCost(target), "distribution": distribution, "blocks": 4}
    search = make_search(start="target", **kwargs)
    probabilities = search.distribution.entry_probabilities()
    assert float(search.space_cost.expected(probabilities)) == pytest.approx(target, rel=0.003)
    uniform = make_search(**kwargs).distribution
    assert search.distribution.entropy() < uniform.entropy()
    for block, before in zip(search.distribution.probabilities(), uniform.probabilities()):
        for name, choices in block.items():
            assert max(choices.values()) <= 20.1 * min(choices.values())
            assert len(set(np.round(list(before[name].values()), 6))) == 1
    # Without a target there is nothing to move to.
    free = make_search(start="target", distribution=distribution, blocks=4).distribution
    np.testing.assert_array_equal(free.logits, uniform.logits)


@pytest.mark.parametrize("target", [7_500, 140_000])
def test_a_start_at_the_limits_of_the_space_decides_nothing(target):
    search = make_search(start="target", cost=fpnas.MacsCost(target), blocks=4)
    for block in search.distribution.probabilities():
        for choices in block.values():
            assert max(choices.values()) <= 20.1 * min(choices.values())


@pytest.mark.parametrize("stratified", [True, False])
def test_samples_cost_the_target_within_the_window(stratified):
    target, window = 22_000, 0.1
    search = make_search(
        samples=16,
        cost=fpnas.MacsCost(target),
        cost_window=window,
        stratified=stratified,
        blocks=4,
    )
    seen = set()
    for step in range(5):
        search.step.assign(step)
        samples = search.ask()
        assert int(tf.reduce_sum(samples.counts)) == 16
        costs = [each.macs() for each in search.architectures(samples)]
        assert max(costs) <= (1 + window) * target
        assert min(costs) >= (1 - window) * target
        seen.update(map(tuple, samples.entries.numpy()))
    assert len(seen) > 60


def test_where_the_window_has_too_few_architectures_the_nearest_are_drawn():
    search = make_search(samples=8, cost=fpnas.MacsCost(22_000), cost_window=1e-9, blocks=4)
    costs = np.array([each.macs() for each in search.architectures(search.ask())])
    others = search.distribution.sample(1000, 1, 1)
    assert np.abs(costs - 22_000).max() < np.median(np.abs(search.space_cost(others) - 22_000))


def test_the_gradient_of_draws_within_the_window_is_that_of_the_conditional_distribution():
    """By automatic differentiation of log p(A | window), over an enumeration."""
    space, target, window = make_tiny_space(blocks=2), 13_000, 0.2
    search = fpnas.ArchitectureSearch(
        space, samples=6, cost=fpnas.MacsCost(target), cost_window=window, warmup_steps=0
    )
    logits = search.distribution.logits
    logits.assign(tf.random.stateless_normal(logits.shape, (0, 1)))
    every = all_entries(space)
    inside = np.abs(search.space_cost(tf.constant(every)).numpy() / target - 1) <= window
    assert 0 < inside.sum() < len(every)
    samples = search.ask()
    log_likelihoods = tf.random.stateless_normal(tf.shape(samples.counts), (1, 2))
    coefficients = fpnas.method.estimator.likelihood_coefficients(log_likelihoods, samples.counts)
    with tf.GradientTape() as tape:
        total = tf.reduce_logsumexp(search.distribution.log_prob(every[inside]))
        log_p = search.distribution.log_prob(samples.entries) - total
        loss = tf.reduce_sum(coefficients * log_p)
    np.testing.assert_allclose(
        search.distribution.gradient(samples.entries, coefficients),
        tape.gradient(loss, logits.value),
        atol=1e-5,
    )


def test_derive_meets_budgets():
    search = make_search(cost=fpnas.MacsCost(target=30_000), blocks=4)
    logits = search.distribution.logits
    logits.assign(tf.random.stateless_normal(logits.shape, (3, 2)))
    choices = all_choices(search.space)
    log_p = search.distribution.log_prob(all_entries(search.space)).numpy()
    macs = np.array([search.space.architecture(each).macs() for each in choices])

    def best(budget):
        return search.space.architecture(choices[np.argmax(np.where(macs <= budget, log_p, -99))])

    mode = search.derive(budget=None)
    assert mode == best(np.inf) and mode.macs() > 30_000
    exact = search.derive(budget=30_000, least_share=0)
    assert search.derive(least_share=0) == exact == best(30_000)
    used = search.derive(budget=35_000, least_share=0.95)
    assert 0.95 * 35_000 <= used.macs() <= 35_000
    family = search.derive(budget=[15_000, 30_000, 1e9], least_share=0)
    assert family == [best(15_000), best(30_000), mode]
    least = macs.min()
    with pytest.raises(ValueError, match=f"`budget` must be at least {least:,}, the least cost"):
        search.derive(budget=least - 1)
    assert make_search(blocks=4).derive() == make_search(blocks=4).derive(budget=None)


@pytest.mark.parametrize("arguments", [("mode",), (float("nan"),), (0,), (3e4, 60.0, 1.5)])
def test_bad_budgets_are_refused(arguments):
    with pytest.raises(ValueError, match="`budget` must be a cost above 0, 'target' or None"):
        make_search().derive(*arguments)


def test_an_unproven_derivation_says_so():
    search = make_search(cost=fpnas.MacsCost(target=30_000), blocks=4)
    logits = search.distribution.logits
    logits.assign(tf.random.stateless_normal(logits.shape, (3, 2)))
    assert search.derivation("target", seconds=0).gap > 0
    with pytest.warns(UserWarning, match="not proven in 0 s: another architecture that costs"):
        architecture = search.derive(seconds=0)
    assert architecture.macs() <= 30_000


def test_coarse_to_fine_keeps_the_distribution_and_traces_once(monkeypatch):
    calls = []
    logits = Supernet.logits
    monkeypatch.setattr(Supernet, "logits", lambda *args: calls.append(1) or logits(*args))
    search = make_search(
        architecture_optimizer=keras.optimizers.Adam(0.1),
        distribution="coarse_to_fine",
        blocks=2,
    )
    entries = tf.constant(all_entries(search.space))

    class Look(keras.callbacks.Callback):
        """Runs after `CoarseToFine` at the start of the same epoch."""

        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                before, after = search.distributions
                assert search.distribution is after
                assert np.any(before.logits.numpy() != 0)
                np.testing.assert_allclose(
                    before.log_prob(entries), after.log_prob(entries), atol=1e-5
                )
                assert int(search.architecture_optimizer.iterations.numpy()) == 0
                self.traced = len(calls)

        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                optimizer = search.architecture_optimizer
                assert int(optimizer.iterations.numpy()) == 3
                moments = {v.path: v.numpy() for v in optimizer.variables if "joint" in v.path}
                assert len(moments) == 2
                assert all(np.any(value != 0) for value in moments.values())

    look = Look()
    search.fit(
        batches(steps=3),
        epochs=4,
        verbose=0,
        shuffle=False,
        callbacks=[fpnas.CoarseToFine(epoch=1), look],
    )
    assert look.traced == 2 and len(calls) == 4  # training and validation batch, each twice
    moved = search.distributions[0].log_prob(entries) - search.distribution.log_prob(entries)
    assert np.abs(moved).max() > 0.01
    with pytest.raises(ValueError, match="only a search with distribution='coarse_to_fine'"):
        search.refine()


def test_parsec_is_a_setting():
    """PARSEC is joint, with a fixed K, b = 0 and no cost: the gradient is -sum r_k d log p."""
    search = make_search(
        blocks=4,
        architecture_optimizer=keras.optimizers.SGD(1.0),
        distribution="joint",
        samples=4,
        control_variate=False,
        stratified=False,
        deduplicate=False,
    )
    samples = search.ask()
    assert samples.counts.numpy().tolist() == [1] * 4
    log_likelihoods = tf.constant([-1.0, -2.0, -0.5, -0.1])
    gradient = search.distribution.gradient(samples.entries, -tf.nn.softmax(log_likelihoods))
    expected = search.distribution.logits.numpy() - gradient
    search.tell(samples, log_likelihoods)
    np.testing.assert_allclose(search.distribution.logits, expected, atol=1e-6)


def test_the_shared_weights_learn():
    search = make_search(keras.optimizers.SGD(0.05, momentum=0.9), samples=3)
    search.fit(batches(steps=60), epochs=3, verbose=0, shuffle=False)
    x, y = tiny_images(30, seed=1)
    result = search.evaluate(x, y, batch_size=30, verbose=0, return_dict=True)
    assert result["accuracy"] > 0.8
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
    first = make_search(samples=4, warmup_steps=5)
    first.fit(batches(steps=5), verbose=0, shuffle=False)
    assert np.all(first.distribution.logits.numpy() == 0)
    with pytest.raises(ValueError, match="5 steps, all of them in its warm-up"):
        first.derive()


def test_in_the_warm_up_one_sample_is_evaluated_for_the_metrics():
    search = make_search(warmup_steps=1, warmup_samples=4, samples=4)
    samples = search.ask()
    ((x_t, y_t), (x_v, y_v)) = next(iter(batches()))
    first = search.evaluate_samples(samples, (x_v, y_v))[0]
    evaluated, evaluate = [], search.evaluate_samples

    def counting(samples, batch):
        evaluated.append(int(tf.size(samples.counts)))
        return evaluate(samples, batch)

    search.evaluate_samples = counting
    search.compile("sgd", "adam", run_eagerly=True)
    data = tf.data.Dataset.from_tensors(((x_t, y_t), (x_v, y_v)))
    history = search.fit(data, epochs=2, verbose=0, shuffle=False).history
    assert evaluated[0] == 1 < evaluated[1]
    assert history["validation_loss"][0] == pytest.approx(float(first[0]), rel=1e-5)


@pytest.mark.parametrize("distribution", ["factorized", "joint"])
def test_finalists_are_different_and_within_the_budget(distribution):
    search = make_search(cost=fpnas.MacsCost(22_000), blocks=4, distribution=distribution)
    finalists = search.finalists(50, least_share=0.9)
    assert len(np.unique(finalists, axis=0)) == len(finalists) == 50
    costs = search.space_cost(tf.constant(finalists)).numpy()
    assert 0.9 * 22_000 <= costs.min() <= costs.max() <= 22_000
    np.testing.assert_array_equal(finalists, search.finalists(50, least_share=0.9))
    # The likely ones come first, and a decided distribution still gives others.
    logits = search.distribution.logits
    logits.assign(8 * tf.random.stateless_normal(logits.shape, (3, 1)))
    decided = search.finalists(20, budget=None)
    assert len(np.unique(decided, axis=0)) == len(decided) == 20
    first, last = search.distribution.log_prob(decided).numpy()[[0, -1]]
    assert first > last + 2


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
    search = make_search(samples=2, distribution="coarse_to_fine")
    search.fit(
        batches(steps=1),
        epochs=3,
        verbose=0,
        shuffle=False,
        callbacks=[fpnas.CoarseToFine(epoch=1)],
    )
    search.save_weights(tmp_path / "search.weights.h5")
    keras.utils.set_random_seed(99)
    other = make_search(samples=2, distribution="coarse_to_fine")
    other.load_weights(tmp_path / "search.weights.h5")
    x, _ = tiny_images(10)
    assert other.derive() == search.derive()
    assert type(other.distribution) is JointLogits
    assert int(other.step.numpy()) == 3
    np.testing.assert_array_equal(other.predict(x, verbose=0), search.predict(x, verbose=0))


def test_loading_weights_sets_the_phase_of_a_search_that_has_run(tmp_path):
    fine = make_search(samples=2, distribution="coarse_to_fine")
    fine.fit(batches(steps=1), verbose=0, shuffle=False, callbacks=[fpnas.CoarseToFine(epoch=0)])
    fine.save_weights(tmp_path / "fine.weights.h5")
    search = make_search(samples=2, distribution="coarse_to_fine")
    search.fit(batches(steps=1), verbose=0, shuffle=False)
    search.load_weights(tmp_path / "fine.weights.h5")
    before = [each.logits.numpy() for each in search.distributions]
    search.fit(batches(steps=1), verbose=0, shuffle=False)
    assert np.array_equal(search.distributions[0].logits, before[0])
    assert not np.array_equal(search.distributions[1].logits, before[1])


def test_coarse_to_fine_needs_joint_logits_and_can_be_resumed():
    callback = fpnas.CoarseToFine(epoch=1)
    with pytest.raises(ValueError, match="needs a search with distribution='coarse_to_fine'"):
        make_search().fit(batches(), epochs=2, verbose=0, callbacks=[callback])
    search = make_search(samples=2, distribution="coarse_to_fine")
    for initial_epoch in (2, 0):  # later than the switch; and again
        search.fit(
            batches(steps=1),
            epochs=initial_epoch + 1,
            initial_epoch=initial_epoch,
            verbose=0,
            shuffle=False,
            callbacks=[callback],
        )
        assert type(search.distribution) is JointLogits
    with pytest.raises(ValueError, match="`refine` needs a search that is compiled"):
        fpnas.ArchitectureSearch(make_tiny_space(), distribution="coarse_to_fine").refine()


def test_all_distributions_start_from_one_distribution():
    entries = all_entries(make_tiny_space())
    kinds = ("factorized", "joint")
    factorized, joint = (make_search(distribution=each, blocks=4) for each in kinds)
    np.testing.assert_allclose(
        factorized.distribution.log_prob(entries), joint.distribution.log_prob(entries), atol=1e-5
    )


def test_evaluate_weighs_a_smaller_last_batch():
    search = make_search(samples=2)
    x, y = tiny_images(30)
    y[20:] = 0  # the last batch is another matter

    def loss(part):
        logs = search.evaluate(x[part], y[part], batch_size=20, verbose=0, return_dict=True)
        return logs["loss"]

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


@pytest.mark.parametrize("floatx", ["float16", "float64"])
def test_another_floatx_is_refused(floatx):
    keras.config.set_floatx(floatx)
    try:
        with pytest.raises(fpnas.UserError, match=f"floatx must be float32.*floatx={floatx}"):
            fpnas.ArchitectureSearch(make_tiny_space(blocks=1))
    finally:
        keras.config.set_floatx("float32")


def test_architectures_of_samples_are_those_that_the_supernet_runs():
    search = make_search(samples=6, blocks=2)
    samples = search.ask()
    architectures = search.architectures(samples)
    assert len(set(architectures)) == len(architectures) == len(samples.counts) > 1
    x, y = tiny_images(10)
    losses = search.evaluate_samples(samples, (x, y)).numpy()[:, 0]
    for architecture, loss in zip(architectures, losses):
        model = architecture.build()
        search.supernet.give_weights(model)
        expected = _loss_and_accuracy([y], model(x, training=True))[0]
        assert loss == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cost": fpnas.MacsCost(target=1000)}, "`target` must be from 7,192 to 148,312 MACs"),
        (
            {"cost": fpnas.ParamsCost(target=10)},
            "parameters, the least and the largest cost",
        ),
        ({"samples": 1}, "`samples` must be at least 2: for 1 sample the control variate makes"),
        ({"samples": fpnas.AdaptiveSamples(minimum=1)}, "`minimum` of `samples` must be at lea"),
        ({"samples": 0, "control_variate": False}, "`samples` must be at least 1. Received: sampl"),
        ({"cost": fpnas.MacsCost(target=1e6)}, "`target` must be from 7,192 to 148,312 MACs"),
        ({"warmup_samples": 0}, "`warmup_samples` must be at least 1"),
        ({"cost_coefficient": float("nan")}, "`cost_coefficient` must be a `CostController` or"),
        ({"distribution": "fine"}, "`distribution` must be one of factorized, joint, coarse_to"),
        ({"cost_penalty": "l2"}, "`cost_penalty` must be one of expected, hinge, log"),
        ({"start": "middle"}, "`start` must be one of target, uniform"),
        ({"cost_window": -0.1}, "`cost_window` must be at least 0"),
        (
            {"cost": fpnas.MacsCost(target=40_000), "control_variate": False},
            "`cost_window` must be .* 0 without the control variate",
        ),
    ],
)
def test_searches_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fpnas.ArchitectureSearch(make_tiny_space(), **arguments)


def test_without_control_variate_one_sample_is_allowed():
    search = make_search(samples=1, control_variate=False)
    search.fit(batches(steps=2), verbose=0, shuffle=False)
    assert np.any(search.distribution.logits.numpy() != 0)


def test_labels_out_of_range_are_an_error():
    x, y = tiny_images()
    search = make_search()
    with pytest.raises(tf.errors.InvalidArgumentError, match="label value"):
        search.fit(fpnas.data.search_batches(x, y + 1, 10, steps_per_epoch=1), verbose=0)


def test_nan_in_a_batch_ends_within_the_epoch():
    x, y = tiny_images()
    x[5] = np.nan
    search = make_search()
    with pytest.raises(ValueError, match=r"diverged: \w+ is nan in epoch 1"):
        search.fit(
            fpnas.data.search_batches(x, y, 10, steps_per_epoch=6),
            epochs=3,
            verbose=0,
            callbacks=[StopOnDivergence()],
        )
