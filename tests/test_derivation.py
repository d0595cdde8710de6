import doctest

import numpy as np
import pytest
import tensorflow as tf
from helpers import all_entries

from fpnas_keras import MacsCost, spaces
from fpnas_keras.cost import SpaceCost
from fpnas_keras.method import derivation
from fpnas_keras.method.derivation import most_probable
from fpnas_keras.method.distributions import FactorizedLogits, JointLogits


def random_distribution(space, seed, kind=FactorizedLogits):
    distribution = kind(space)
    distribution.logits.assign(tf.random.stateless_normal(distribution.logits.shape, (seed, 0)))
    return distribution


def test_the_worked_example_of_dominance():
    (example,) = doctest.DocTestFinder().find(derivation._undominated, globs=vars(derivation))
    assert len(example.examples) == 5
    assert doctest.DocTestRunner().run(example).failed == 0


def test_dominated_labels_are_those_of_the_definition():
    """Compares every pair of labels, for random labels."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        filters, cost, log_p = rng.integers(0, [[2], [4], [4]], (3, 8))
        safe = rng.random(8) < 0.5 if rng.random() < 0.5 else np.full(8, True)
        kept = derivation._undominated(filters, cost, log_p, safe)

        def dominates(a, b, filters=filters, cost=cost, log_p=log_p, safe=safe):
            may = cost[a] == cost[b] or (safe[a] and safe[b] and cost[a] < cost[b])
            return filters[a] == filters[b] and safe[a] == safe[b] and may and log_p[a] >= log_p[b]

        assert len(set(kept)) == len(kept)
        for b in range(8):
            if b not in kept:
                assert any(dominates(a, b) for a in kept)
        assert not any(dominates(a, b) for a in kept for b in kept if a != b)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", [FactorizedLogits, JointLogits])
def test_it_is_the_best_of_an_enumeration(tiny_space, kind, seed):
    distribution = random_distribution(tiny_space, seed, kind)
    space_cost = SpaceCost(tiny_space, MacsCost())
    entries = tf.constant(all_entries(tiny_space))
    log_p, costs = distribution.log_prob(entries).numpy(), space_cost(entries).numpy()
    for quantile in (0, 0.01, 0.1, 0.4, 0.9, 1):
        budget = np.quantile(costs, quantile)
        found = most_probable(distribution.log_probabilities().numpy(), space_cost, budget)
        within = costs <= budget
        assert found.log_prob == pytest.approx(log_p[within].max(), abs=1e-5)
        assert found.cost <= budget
        assert found.gap == 0
        own = tiny_space.entries.from_choices(tiny_space.choices(found.architecture))
        assert float(space_cost(own[None])[0]) == found.cost
        assert float(distribution.log_prob(own)) == pytest.approx(found.log_prob, abs=1e-5)


def test_a_large_space_is_solved_and_proven():
    space = spaces.get("mobile_mini")
    space_cost = SpaceCost(space, MacsCost())
    for seed in range(3):
        log_p = random_distribution(space, seed).log_probabilities().numpy()
        found = [most_probable(log_p, space_cost, budget) for budget in (1e6, 2e6, 4e6, 8e6, 1e9)]
        assert [each.gap for each in found] == [0.0] * 5
        probable = [each.log_prob for each in found]
        assert np.all(np.diff(probable) >= 0)
        mode = log_p.max(axis=1).sum()
        assert probable[-1] == pytest.approx(mode, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [FactorizedLogits, JointLogits])
def test_between_two_costs_it_is_the_best_of_an_enumeration(tiny_space, kind, seed):
    distribution = random_distribution(tiny_space, seed, kind)
    space_cost = SpaceCost(tiny_space, MacsCost())
    entries = tf.constant(all_entries(tiny_space))
    log_p, costs = distribution.log_prob(entries).numpy(), space_cost(entries).numpy()
    log_probabilities = distribution.log_probabilities().numpy()
    for budget, share in ((15_000, 0.9), (25_000, 0.99), (40_000, 0.8), (60_000, 0.95)):
        least = share * budget
        found = most_probable(log_probabilities, space_cost, budget, least=least)
        within = (costs <= budget) & (costs >= least)
        assert found.log_prob == pytest.approx(log_p[within].max(), abs=1e-5)
        assert least <= found.cost == found.architecture.macs() <= budget
        assert found.gap == 0
    least = costs.max() - 1
    dearest = most_probable(log_probabilities, space_cost, float("inf"), least=least)
    assert dearest.cost == costs.max()
    with pytest.warns(UserWarning, match="there is no architecture that costs from 71,158 to"):
        found = most_probable(log_probabilities, space_cost, 71_159, least=71_158)
    assert found == most_probable(log_probabilities, space_cost, 71_159)


@pytest.mark.parametrize("share", [0, 0.95])
def test_passes_with_few_labels_and_small_chunks_end_in_the_same_proof(monkeypatch, share):
    space = spaces.get("mobile_mini")
    space_cost = SpaceCost(space, MacsCost())
    log_p = random_distribution(space, 1).log_probabilities().numpy()
    expected = most_probable(log_p, space_cost, 2e6, least=share * 2e6)
    monkeypatch.setattr(derivation, "_FIRST_MAX_LABELS", 2)
    monkeypatch.setattr(derivation, "_CHUNK", 50)
    found = most_probable(log_p, space_cost, 2e6, least=share * 2e6)
    assert found == expected and found.gap == 0


def test_an_operation_is_derived_too():
    space = spaces.get("nas_bench_macro")
    space_cost = SpaceCost(space, MacsCost())
    log_p = random_distribution(space, 1).log_probabilities().numpy()
    every = np.indices((3,) * 8).reshape(8, -1).T
    costs = space_cost(tf.constant(every)).numpy()
    total = log_p[np.arange(8), every].sum(axis=1)
    for budget in (25e6, 40e6, 80e6):
        found = most_probable(log_p, space_cost, budget)
        assert found.log_prob == pytest.approx(total[costs <= budget].max(), abs=1e-5)
        assert found.architecture.macs() == found.cost <= budget


def test_without_time_the_gap_is_true():
    space = spaces.get("mobile_mini")
    space_cost = SpaceCost(space, MacsCost())
    for seed in range(5):
        log_p = random_distribution(space, seed).log_probabilities().numpy()
        quick = most_probable(log_p, space_cost, 2e6, seconds=0)
        proven = most_probable(log_p, space_cost, 2e6)
        assert proven.gap == 0 and quick.cost <= 2e6
        assert quick.log_prob <= proven.log_prob <= quick.log_prob + quick.gap + 1e-9
        assert quick.gap > 0 or quick.log_prob == proven.log_prob


def test_a_budget_that_nothing_meets_is_refused(tiny_space):
    space_cost = SpaceCost(tiny_space, MacsCost())
    log_p = random_distribution(tiny_space, 0).log_probabilities().numpy()
    with pytest.raises(ValueError, match=f"at least {space_cost.least():,.0f}, the least cost"):
        most_probable(log_p, space_cost, space_cost.least() - 1)
