"""From a distribution to its most probable architecture under a budget, with a proof.

max log p(A) subject to cost(A) <= budget is a knapsack over a chain of blocks: a block's
cost depends on its own entry and on the filters that reach it.
"""

import math
import time
import warnings
from typing import NamedTuple

import numpy as np

from fpnas_keras.architecture import Architecture
from fpnas_keras.cost import CostTable, format_cost
from fpnas_keras.errors import UserError
from fpnas_keras.spaces import Space

# Labels kept after each block in the first pass; each further pass keeps more.
_FIRST_WIDTH, _WIDTH_FACTOR = 1_000, 8
# Labels times moves that are held at once.
_CHUNK = 2_000_000
# Log-probabilities closer than this are equal.
_TOLERANCE = 1e-9


class Derivation(NamedTuple):
    """An architecture and what is proven of it.

    Attributes:
        architecture: The architecture.
        cost: Its cost.
        log_prob: log p of it.
        least: The lower limit of the cost that was kept.
        gap: No architecture that costs from `least` to the budget has a log p above
            `log_prob + gap`; 0 when it is proven to be the most probable one.
    """

    architecture: Architecture
    cost: float
    log_prob: float
    least: float
    gap: float


def most_probable(
    space: Space,
    log_probabilities: np.ndarray,
    table: CostTable,
    budget: float,
    seconds: float = 60.0,
    least: float = 0.0,
) -> Derivation:
    """The most probable architecture whose cost is at or under a budget.

    Label setting over (block, filters): a label is the beginning of an
    architecture. It is dropped when another one with the same filters is neither dearer
    nor less probable (and surely costs `least` in the end), when even its cheapest
    completion is over the budget, or when a Lagrangian bound shows that no completion
    beats the best architecture so far. Passes with more and more labels go on until one
    drops no other label, which is a proof, or until the time is over.

    Args:
        space: The space.
        log_probabilities: log p of each entry, shape `(blocks, entries)`.
        table: The cost.
        budget: In the unit of the cost.
        seconds: Time after which the best one so far is returned with its gap.
        least: Least that it should cost; where nothing that does is found in time, it is
            dropped, with a warning.

    Raises:
        UserError: When no architecture is within the budget.

    Example:

    ```python
    found = most_probable(space, distribution.log_probabilities().numpy(), table, budget=3e6)
    ```
    """
    if budget < table.least():
        raise UserError(
            f"`budget` must be at least {format_cost(table.least())}, the least cost in the space. "
            f"Received: budget={format_cost(budget)}"
        )
    budget = min(budget, table.largest())  # which may be infinite
    chain = _Chain(np.asarray(log_probabilities, np.float64), table, least)
    deadline = time.monotonic() + seconds
    best, multipliers, upper = _relax(chain, budget, least)
    limits = _Limits(chain, budget, least, multipliers)
    width = _FIRST_WIDTH
    while upper > best.log_prob + _TOLERANCE:
        found = _search(chain, limits, best, width, deadline)
        if found is None:
            break
        best, cut = found
        upper = min(upper, max(cut, best.log_prob))
        width *= _WIDTH_FACTOR
    if not best.entries:
        reason = "there is no" if upper == -math.inf else f"in {seconds:g} s there was found no"
        warnings.warn(
            f"{reason} architecture that costs from {format_cost(least)} to {format_cost(budget)}; the "
            f"most probable one up to {format_cost(budget)} is taken",
            stacklevel=2,
        )
        left = max(0.0, deadline - time.monotonic())
        return most_probable(space, log_probabilities, table, budget, left)
    entries = zip(space.blocks, best.entries, strict=True)
    choices = np.array([block.entries[index] for block, index in entries])
    gap = upper - best.log_prob
    return Derivation(
        space.architecture(choices),
        best.cost,
        best.log_prob,
        least,
        gap if gap > _TOLERANCE else 0.0,
    )


class _Found(NamedTuple):
    """Number of the entry of each block, with the cost and log p of the architecture."""

    entries: list[int]
    cost: float
    log_prob: float


class _Chain:
    """Blocks as moves from filters to filters; the head is the last block."""

    def __init__(self, log_probabilities, table, least):
        self.fixed = table.fixed
        # For each block and filters in: entry, cost, log p and filters out of each useful move.
        self.moves = []
        for index, costs in enumerate(table.blocks):
            log_p = log_probabilities[index, : costs.shape[1]]
            filters = table.filters_of_entries(index)
            self.moves.append([])
            for state, row in enumerate(costs):
                chooses = table.sources[index + 1] == index
                to = filters if chooses else np.full_like(filters, state)
                kept = _undominated(to, row, log_p, np.full(len(row), least <= 0))
                self.moves[-1].append((kept, row[kept], log_p[kept], to[kept]))
        zeros = np.zeros(1)
        self.moves.append(
            [(np.zeros(1, int), np.array([cost]), zeros, np.zeros(1, int)) for cost in table.heads]
        )

    def best(self, multiplier, likelihood=1.0):
        """max of likelihood * log p - multiplier * cost over all ways to the end.

        Returns:
            For each block, by filters, the value of the best way from there, and the
            number of its first move.
        """
        values, choices = [np.zeros(1)], []
        for block in reversed(self.moves):
            scores = [
                likelihood * log_p - multiplier * cost + values[0][states]
                for _, cost, log_p, states in block
            ]
            choices.insert(0, [int(np.argmax(each)) for each in scores])
            values.insert(0, np.array([np.max(each) for each in scores]))
        return values, choices

    def follow(self, choices):
        """The architecture that takes the given move of each (block, filters)."""
        state, cost, log_prob, entries = 0, self.fixed, 0.0, []
        for block, move in zip(self.moves, choices):
            entry, costs, log_p, states = (each[move[state]] for each in block[state])
            cost, log_prob, state = cost + costs, log_prob + log_p, states
            entries.append(entry)
        return _Found(entries[:-1], float(cost), float(log_prob))


def _undominated(states, cost, log_p, safe):
    """Labels, in order, for which no other of the same state is as cheap and as probable.

    Only those that are safe, which cost enough however they go on, may take the place of a
    dearer one.
    """
    groups = states
    if not safe.all():
        _, code = np.unique(cost, return_inverse=True)
        groups = np.where(safe, states, (code + 1) * (states.max() + 1) + states)
    order = np.lexsort((-log_p, cost, groups))
    return order[_is_front(groups[order], log_p[order])]


def _is_front(groups, log_p):
    """Which of the labels, sorted by (group, cost), are more probable than all cheaper ones."""
    # A running maximum that starts anew in each group: ranks of later groups are all higher.
    _, rank = np.unique(log_p, return_inverse=True)
    starts = np.r_[True, groups[1:] != groups[:-1]]
    rank = rank + np.cumsum(starts) * len(groups)
    return starts | (rank > np.r_[-1, np.maximum.accumulate(rank)[:-1]])


def _relax(chain, budget, least):
    """Lagrangian relaxation, which bounds log p(A) for any multiplier m:

        log p(A) <= max(log p - m * cost) + m * (budget if m >= 0 else least)

    Returns:
        The best architecture met that costs what it should, the multipliers worth using, and
        the least upper bound.
    """
    best = _Found([], math.nan, -math.inf)
    if least <= 0:
        best = chain.follow(chain.best(1.0, likelihood=0.0)[1])  # the cheapest
    upper, tightest = math.inf, 0.0
    low, high, multiplier, sign = 0.0, None, 0.0, 1
    sides = {}  # the last choices on each side of the limit
    for _ in range(60):
        values, choices = chain.best(multiplier)
        found = chain.follow(choices)
        bound = values[0][0] + multiplier * ((budget if multiplier >= 0 else least) - chain.fixed)
        if bound < upper:
            upper, tightest = bound, multiplier
        if least <= found.cost <= budget:
            best = max(best, found, key=lambda each: each.log_prob)
            if multiplier == 0:
                break
        if multiplier == 0:
            sign = 1 if found.cost > budget else -1
        crossed = (found.cost <= budget) if sign > 0 else (found.cost >= least)
        sides[crossed] = choices
        if crossed:
            high = multiplier
        else:
            low = multiplier
        # Doubled until on the other side, then halved.
        further = 2 * low if low else sign / budget
        multiplier = further if high is None else (low + high) / 2
    if len(sides) == 2:
        # Multipliers jump over what lies between: the first blocks of one, the rest of the other.
        for first, rest in (sides.values(), reversed(sides.values())):
            for count in range(1, len(first)):
                found = chain.follow(first[:count] + rest[count:])
                if least <= found.cost <= budget:
                    best = max(best, found, key=lambda each: each.log_prob)
    return best, sorted({factor * tightest for factor in (0, 0.5, 0.8, 1, 1.25, 2)}), upper


class _Labels(NamedTuple):
    """Beginnings of architectures, one an element."""

    parent: np.ndarray
    entry: np.ndarray
    state: np.ndarray
    cost: np.ndarray
    log_p: np.ndarray

    def take(self, index):
        return _Labels(*(each[index] for each in self))


class _Limits:
    """What labels must meet after each block: costs, bounds, dominance, number."""

    def __init__(self, chain, budget, least, multipliers):
        self.budget, self.least = budget, least
        self.cheapest = [-values for values in chain.best(1.0, likelihood=0.0)[0]]
        self.dearest = chain.best(-1.0, likelihood=0.0)[0]
        self.completions = [(each, chain.best(each)[0]) for each in multipliers]

    def prune(self, labels, index, best, width):
        """The labels that may begin a better architecture than `best`.

        Returns:
            At most `width` labels, and the highest bound of those beyond (-inf: none).
        """
        costs = labels.cost + self.cheapest[index][labels.state]
        dearest = labels.cost + self.dearest[index][labels.state]
        completed = [
            values[index][labels.state] + m * (self._limit(m) - labels.cost)
            for m, values in self.completions
        ]
        bound = labels.log_p + np.min(completed, axis=0)
        better = bound > best.log_prob + _TOLERANCE
        kept = np.flatnonzero((costs <= self.budget) & (dearest >= self.least) & better)
        own = labels.take(kept)
        kept = kept[_undominated(own.state, own.cost, own.log_p, costs[kept] >= self.least)]
        cut = -math.inf
        if len(kept) > width:
            order = np.argsort(-bound[kept], kind="stable")
            cut = bound[kept[order[width]]]
            kept = np.sort(kept[order[:width]])
        return labels.take(kept), cut

    def _limit(self, multiplier):
        return self.budget if multiplier >= 0 else self.least


def _search(chain, limits, best, width, deadline):
    """One pass with at most `width` labels after each block.

    Returns:
        The best architecture and the highest bound of a dropped label (-inf: none was);
        `None` when the time is over.
    """
    none, zero = np.zeros(0, int), np.zeros(1, int)
    labels = _Labels(zero, zero, zero, np.array([chain.fixed]), np.zeros(1))
    history, cut = [], -math.inf
    for index, block in enumerate(chain.moves, 1):
        kept = _Labels(none, none, none, np.zeros(0), np.zeros(0))
        # As many at once as fit into memory.
        step = 1 + _CHUNK // max(len(moves[0]) for moves in block)
        for start in range(0, len(labels.state), step):
            if time.monotonic() > deadline:
                return None
            new = _extend(block, labels, np.arange(start, min(start + step, len(labels.state))))
            new = _Labels(*map(np.concatenate, zip(kept, new)))
            kept, dropped = limits.prune(new, index, best, width)
            cut = max(cut, dropped)
        labels = kept
        history.append(labels)
    if len(labels.log_p):
        last = position = int(np.argmax(labels.log_p))
        entries = []
        for each in reversed(history):
            entries.insert(0, each.entry[position])
            position = each.parent[position]
        best = _Found(entries[:-1], float(labels.cost[last]), float(labels.log_p[last]))
    return best, cut


def _extend(block, labels, numbers):
    """The labels with these numbers and all moves from there."""
    parts = []
    for value, (entries, costs, log_ps, states) in enumerate(block):
        own = numbers[labels.state[numbers] == value]
        shape = (len(own), len(entries))
        parts.append(
            (
                np.repeat(own, len(entries)),
                np.broadcast_to(entries, shape).ravel(),
                np.broadcast_to(states, shape).ravel(),
                (labels.cost[own, None] + costs).ravel(),
                (labels.log_p[own, None] + log_ps).ravel(),
            )
        )
    return _Labels(*map(np.concatenate, zip(*parts)))
