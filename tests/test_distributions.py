import numpy as np
import pytest
import tensorflow as tf
from helpers import all_choices, all_entries

from fpnas_keras import spaces
from fpnas_keras.architecture import Head, Stem
from fpnas_keras.method.distributions import FactorizedLogits, JointLogits, VariableArrays
from fpnas_keras.spaces import SearchBlock, Space

KINDS = (FactorizedLogits, JointLogits)


@pytest.fixture(params=KINDS)
def distribution(request, tiny_space):
    """A distribution that is far from uniform."""
    layer = request.param(tiny_space)
    layer.logits.assign(1.5 * tf.random.stateless_normal(layer.logits.shape, (1, 1)))
    return layer


def space_of(*search_blocks):
    return Space("some", (8, 8, 1), 2, Stem(8), search_blocks, Head(8))


def wide_block(**changes):
    choices = {
        "filters": (8, 16, 24, 32, 40, 48, 56, 64, 72, 80),
        "kernel_size": (3, 5),
        "expansion": (1, 2, 3, 4, 5, 6),
        "activation": ("relu", "relu6", "hard_silu"),
        "splits": (0, 1),
    }
    return SearchBlock(**choices | changes)


def test_number_of_logits():
    """The sum of the cardinalities (factorized) and their product (joint), as in the paper."""
    fixed = SearchBlock(filters=(8,), kernel_size=(3, 5))
    assert FactorizedLogits(space_of(wide_block())).count_params() == 23
    assert FactorizedLogits(space_of(wide_block(), fixed)).count_params() == 25
    assert JointLogits(space_of(wide_block())).count_params() == 720
    assert JointLogits(space_of(wide_block(), fixed)).count_params() == 722
    # A skipped block has its filters alone.
    assert JointLogits(space_of(wide_block(skip=(False, True)))).count_params() == 720 + 10


def test_uniform_entropy_is_the_sum_of_log_cardinalities():
    block = SearchBlock(filters=(8, 16, 24), kernel_size=(3, 5), activation=("relu", "hard_silu"))
    for kind in KINDS:
        entropy = kind(space_of(block, block)).entropy()
        assert float(entropy) == pytest.approx(2 * np.log(3 * 2 * 2), rel=1e-6)


def test_log_probabilities_are_products_of_softmaxes(tiny_space):
    """Compares with the products, for some architectures."""
    distribution = FactorizedLogits(tiny_space)
    logits = np.random.default_rng(0).normal(size=distribution.logits.shape)
    distribution.logits.assign(logits)
    searched = tiny_space.cardinalities > 1
    tables, start = {}, 0
    for block, variable in np.argwhere(searched):
        end = start + tiny_space.cardinalities[block, variable]
        tables[block, variable] = logits[start:end] - np.log(np.exp(logits[start:end]).sum())
        start = end
    for choices in all_choices(tiny_space)[::97]:
        entries = tiny_space.entries.from_choices(choices)
        total = 0
        for (block, variable), table in tables.items():
            search_block = tiny_space.blocks[block]
            skipped = search_block.skip[choices[block, 0]]
            if not (skipped and variable > 1):  # after skip and filters
                total += table[choices[block, variable]]
        log_p = float(distribution.log_prob(entries))
        assert log_p == pytest.approx(total, abs=1e-4)


def test_probabilities_and_entropy_are_those_of_an_enumeration(tiny_space, distribution):
    log_p = distribution.log_prob(all_entries(tiny_space)).numpy().astype(np.float64)
    assert np.exp(log_p).sum() == pytest.approx(1.0, abs=1e-5)
    assert float(distribution.entropy()) == pytest.approx(-(np.exp(log_p) * log_p).sum(), rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_joint_logits_take_over_the_factorized_distribution_exactly(tiny_space, seed):
    factorized, joint = FactorizedLogits(tiny_space), JointLogits(tiny_space)
    factorized.logits.assign(3 * tf.random.stateless_normal(factorized.logits.shape, (seed, 0)))
    joint.assign(factorized)
    entries = all_entries(tiny_space)
    np.testing.assert_allclose(joint.log_prob(entries), factorized.log_prob(entries), atol=1e-4)
    assert float(joint.entropy()) == pytest.approx(float(factorized.entropy()), rel=1e-5)
    assert np.array_equal(joint.mode(), factorized.mode())
    for own, other in zip(joint.probabilities(), factorized.probabilities()):
        for name in other:
            assert own[name] == pytest.approx(other[name], abs=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_mode_is_the_best_of_an_enumeration(tiny_space, distribution, seed):
    distribution.logits.assign(tf.random.stateless_normal(distribution.logits.shape, (seed, 0)))
    entries = all_entries(tiny_space)
    best = entries[np.argmax(distribution.log_prob(entries))]
    assert np.array_equal(distribution.mode(), best)


def pearson(space, distribution, drawn):
    """Pearson's statistic of drawn architectures, and its degrees of freedom."""
    entries, count = all_entries(space), len(drawn)
    p = np.exp(distribution.log_prob(entries).numpy())
    index = {each.tobytes(): i for i, each in enumerate(entries)}
    frequencies = np.zeros(len(entries))
    for each, times in zip(*np.unique(drawn, axis=0, return_counts=True)):
        frequencies[index[each.tobytes()]] = times
    # Over the architectures that are expected often enough.
    common = p * count > 20
    expected = np.append(p[common], p[~common].sum()) * count
    observed = np.append(frequencies[common], frequencies[~common].sum())
    return ((observed - expected) ** 2 / expected).sum(), len(expected) - 1


def test_samples_follow_the_distribution(tiny_space, distribution):
    drawn = distribution.sample(200_000, seed=0, step=0).numpy()
    statistic, freedom = pearson(tiny_space, distribution, drawn)
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_each_stratified_sample_follows_the_distribution(tiny_space, distribution):
    """Tests the first and the last of 5 samples on their own, over many steps."""
    draw = tf.function(lambda step: distribution.sample(5, 0, step, stratified=True))
    drawn = np.array([draw(tf.constant(step)) for step in range(20_000)])
    for position in (0, 4):
        statistic, freedom = pearson(tiny_space, distribution, drawn[:, position])
        assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def sample_choices(distribution, count, step, stratified=False):
    entries = distribution.sample(count, 0, step, stratified).numpy()
    return distribution.space.entries.to_choices(entries)


def test_stratified_choices_come_as_evenly_as_they_can(tiny_space):
    distribution = FactorizedLogits(tiny_space)
    distribution.logits.assign(tf.random.stateless_normal(distribution.logits.shape, (1, 1)))
    count = 13
    kernel_size = distribution.probabilities()[0]["kernel_size"][5]  # of a block never skipped
    skip = distribution.probabilities()[1]["skip"][True]
    joint = JointLogits(tiny_space)
    joint.assign(distribution)
    entry = float(joint.entry_probabilities()[0, 7])
    uneven = set()
    for step in range(50):
        drawn = sample_choices(distribution, count, step, stratified=True)
        uneven.add(sample_choices(distribution, count, step)[:, 0, 2].sum())
        assert abs(drawn[:, 0, 2].sum() - count * kernel_size) < 1
        assert abs(drawn[:, 1, 0].sum() - count * skip) < 1
        drawn = joint.sample(count, 0, step, stratified=True)
        times = np.sum(drawn.numpy()[:, 0] == 7)
        assert abs(times - count * entry) < 1
    assert len(uneven) > 3


def test_stratified_variables_are_independent_of_each_other(tiny_space):
    distribution = FactorizedLogits(tiny_space)
    drawn = np.concatenate(
        [sample_choices(distribution, 8, step, stratified=True) for step in range(1000)]
    )
    first, second = drawn[:, 0, 1], drawn[:, 0, 2]  # filters and kernel size, 2 choices each
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04


def test_samples_are_a_function_of_seed_and_step(distribution):
    draw = tf.function(distribution.sample)
    for stratified in (False, True):
        arguments = (tf.constant(50), 7, tf.constant(3, tf.int64), stratified)
        first = draw(*arguments).numpy()
        assert np.array_equal(first, draw(*arguments))
        other = draw(tf.constant(50), 7, tf.constant(4, tf.int64), stratified)
        assert not np.array_equal(first, other)
        other = draw(tf.constant(50), 8, tf.constant(3, tf.int64), stratified)
        assert not np.array_equal(first, other)


def test_drawn_architectures_are_different(tiny_space):
    distribution = FactorizedLogits(tiny_space)
    distribution.logits.assign(3 * tf.random.stateless_normal(distribution.logits.shape, (1, 1)))
    drawn = distribution.draw_architectures(300, seed=1)
    entries = distribution.sample(300, seed=1, step=0).numpy()
    assert len(drawn) == len(set(drawn)) == len(np.unique(entries, axis=0)) < 300
    first = tiny_space.architecture(tiny_space.entries.to_choices(entries[0]))
    assert drawn[0] == first


def test_gradient_is_that_of_automatic_differentiation(distribution):
    entries = distribution.sample(32, 0, 0)
    coefficients = tf.random.stateless_normal((32,), (2, 2))
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(coefficients * distribution.log_prob(entries))
    expected = tape.gradient(total, distribution.logits.value)
    np.testing.assert_allclose(
        distribution.gradient(entries, coefficients), expected, rtol=1e-4, atol=1e-4
    )


def test_irrelevant_variables_of_a_skipped_block_get_no_gradient(tiny_space):
    distribution = FactorizedLogits(tiny_space)
    skipped = np.zeros((1, 4, 6), np.int32)
    skipped[0, 1, 0] = 1  # block 1: skip is its second choice
    entries = tiny_space.entries.from_choices(skipped)
    gradient = distribution.gradient(entries, tf.ones(1)).numpy()
    owners = np.argwhere(VariableArrays(tiny_space).logit_mask)  # (block, variable, choice)
    irrelevant = (owners[:, 0] == 1) & (owners[:, 1] >= 2)
    assert irrelevant.sum() == 2 + 3 + 2
    assert np.all(gradient[irrelevant] == 0)
    assert np.all(gradient[~irrelevant & (owners[:, 0] == 1)] != 0)


def test_probabilities_by_name(distribution):
    first, second, third, last = distribution.probabilities()
    assert list(first) == ["filters", "kernel_size", "expansion", "activation", "splits"]
    assert list(second["splits"]) == [4, 0]
    assert list(third) == ["skip", "activation"]
    assert list(last) == ["skip", "filters"]
    for choices in (*first.values(), *second.values(), *third.values(), *last.values()):
        assert sum(choices.values()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_operation_is_one_variable(kind):
    distribution = kind(spaces.get("nas_bench_macro"))
    assert distribution.count_params() == 8 * 3
    assert float(distribution.entropy()) == pytest.approx(8 * np.log(3), rel=1e-6)
    names = ["skip=True", "kernel_size=3, expansion=3", "kernel_size=5, expansion=6"]
    assert list(distribution.probabilities()[0]) == ["operation"]
    assert list(distribution.probabilities()[0]["operation"]) == names
    drawn = sample_choices(distribution, 300, 0, stratified=True)
    for block in drawn.transpose(1, 0, 2):
        found, counts = np.unique(block, axis=0, return_counts=True)
        assert found.tolist() == [[0] * 6, [0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
        assert counts.tolist() == [100, 100, 100]


def test_an_operation_beside_other_variables():
    operation = ({"kernel_size": 3, "splits": 1}, {"skip": True}, {"kernel_size": 5, "splits": 0})
    block = SearchBlock(filters=(8, 16), expansion=(2, 3, 4), operation=operation)
    assert len(block.entries) == 2 * (2 * 3 + 1)
    factorized = FactorizedLogits(space_of(block))
    assert factorized.count_params() == 3 + 2 + 3
    factorized.logits.assign(np.log([0.2, 0.5, 0.3, 0.1, 0.9, 0.6, 0.3, 0.1]))
    (found,) = factorized.probabilities()
    assert list(found["operation"].values()) == pytest.approx([0.2, 0.5, 0.3])
    assert list(found["filters"].values()) == pytest.approx([0.1, 0.9])
    assert list(found["expansion"].values()) == pytest.approx([0.6, 0.3, 0.1])
    p = {}
    for choices, value in zip(block.entries, factorized.entry_probabilities()[0].numpy()):
        p[block.make_blocks(choices, 8)[0]] = value
    assert sum(p.values()) == pytest.approx(1)
    skipped = [value for each, value in p.items() if each.skip]
    assert skipped == pytest.approx([0.5 * 0.1, 0.5 * 0.9])
    best = max(p, key=p.get)
    assert best.skip and best.filters == 16
    kept = [value for each, value in p.items() if each.kernel_size == 5 and not each.skip]
    assert max(kept) == pytest.approx(0.3 * 0.9 * 0.6)


def test_choices_of_irrelevant_variables_do_not_change_the_entry(tiny_space):
    """Compares with `Space`, for all combinations of choices of a block that can be skipped."""
    arrays, cardinalities = VariableArrays(tiny_space), tiny_space.cardinalities
    for own in np.ndindex(*cardinalities[1]):
        choices = np.zeros(cardinalities.shape, np.int32)
        choices[1] = own
        known = tiny_space.choices(tiny_space.architecture(choices))
        expected = tiny_space.entries.from_choices(known)
        assert arrays.entries_of(choices).numpy().tolist() == expected.tolist()
