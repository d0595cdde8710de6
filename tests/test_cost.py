import numpy as np
import pytest
import tensorflow as tf
from helpers import all_choices, random_choices

from fpnas_keras import MacsCost, ParamsCost, spaces
from fpnas_keras.cost import CostTable
from fpnas_keras.distributions import FactorizedLogits

COSTS = [(MacsCost, "macs"), (ParamsCost, "params")]


@pytest.mark.parametrize(("cost", "method"), COSTS)
def test_table_in_the_graph_is_exact(cost, method):
    space = spaces.get("mobile_mini", input_shape=(96, 96, 3), num_classes=7)
    rng = np.random.default_rng(0)
    choices = np.array([random_choices(space, rng) for _ in range(100)], np.int32)
    costs = tf.function(CostTable(space, cost()))(tf.constant(choices))
    expected = [getattr(space.architecture(each), method)() for each in choices]
    assert costs.dtype == tf.float64
    assert costs.numpy().tolist() == expected


@pytest.mark.parametrize(("cost", "method"), COSTS)
def test_expectation_and_extremes_are_those_of_an_enumeration(tiny_space, cost, method):
    table = CostTable(tiny_space, cost())
    distribution = FactorizedLogits(tiny_space.blocks)
    distribution.logits.assign(tf.random.stateless_normal(distribution.logits.shape, (1, 2)))
    choices = all_choices(tiny_space)
    costs = np.array([getattr(tiny_space.architecture(each), method)() for each in choices])
    p = np.exp(distribution.log_prob(tf.constant(choices)).numpy().astype(np.float64))
    assert float(table.expected(distribution.entry_probabilities())) == pytest.approx(
        (p * costs).sum(), rel=1e-5
    )
    assert (table.least(), table.largest()) == (costs.min(), costs.max())


@pytest.mark.parametrize("target", [0, -1, float("nan"), float("inf")])
def test_targets_must_be_positive(target):
    with pytest.raises(ValueError, match="`target` must be above 0 MACs"):
        MacsCost(target=target)
