"""Networks to compare with: random ones and the largest one of a space."""

import fpnas_keras as fpnas
from fpnas_keras.cost import SpaceCost
from fpnas_keras.method import FactorizedLogits
from fpnas_keras.spaces import Space

LEAST_SHARE = 0.95


def largest_network(space: Space) -> fpnas.Architecture:
    """The architecture of most MACs in a space whose last choices are the largest ones."""
    choices = space.cardinalities - 1
    choices[:, fpnas.spaces.VARIABLES.index("skip")] = 0
    return space.architecture(choices)


def draw_random_networks(space: Space, target: float, count: int) -> list[fpnas.Architecture]:
    """Uniformly drawn networks that cost 95% to 100% of a target in MACs."""
    found, distribution = [], FactorizedLogits(space)
    cost = SpaceCost(space, fpnas.MacsCost())
    for step in range(1000):
        drawn = distribution.sample(1000, seed=0, step=step)
        costs = cost(drawn).numpy()
        is_near = (costs >= LEAST_SHARE * target) & (costs <= target)
        found += map(space.architecture, space.entries.to_choices(drawn.numpy()[is_near]))
        if len(found) >= count:
            return found[:count]
    raise RuntimeError("the space has too few networks that use the target")
