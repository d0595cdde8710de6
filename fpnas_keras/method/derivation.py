"""The most probable architecture of a distribution within a budget, with a proof.

It maximizes log p(A) subject to cost(A) <= budget. This is a knapsack problem over a chain of
search blocks: the cost of a block depends on its entry and on the filters that come into it.
"""

import math
import time
import warnings
from typing import NamedTuple

import numpy as np

from fpnas_keras.architecture import Architecture
from fpnas_keras.cost import SpaceCost, format_cost
from fpnas_keras.errors import UserError

# Labels kept after each search block in the first pass. Each further pass keeps more.
_FIRST_WIDTH, _WIDTH_FACTOR = 1_000, 8
# Labels times moves that are in memory at once.
_CHUNK = 2_000_000
# Log-probabilities that differ by less are equal.
_TOLERANCE = 1e-9


class Derivation(NamedTuple):
    """An architecture and what has been proven of it.

    Attributes:
        architecture: The architecture.
        cost: Its cost.
        log_prob: Its log p.
        least: The lower limit of the cost.
        gap: No architecture with a cost from `least` to the budget has a log p above
            `log_prob + gap`. 0 means that the architecture is proven to be the most probable one.
    """

    architecture: Architecture
    cost: float
    log_prob: float
    least: float
    gap: float


def most_probable(
    log_probabilities: np.ndarray,
    space_cost: SpaceCost,
    budget: float,
    seconds: float = 60.0,
    least: float = 0.0,
) -> Derivation:
    """Finds the most probable architecture with a cost of at most a budget.

    The algorithm is label setting. A label is the beginning of an architecture: entries for the
    first search blocks, with their cost, their log p, and the filters that leave the last of them.
    Search block by search block, every label is extended by every entry. A label is dropped if

    * another label dominates it (see `_undominated`),
    * its cheapest completion is over the budget, or its most expensive one is under `least`,
    * a Lagrangian bound shows that no completion is more probable than the best architecture so
      far.

    If too many labels remain, those with the lowest bounds are dropped too. The pass is then
    repeated with room for more labels, until one pass drops none for lack of room, which is a
    proof, or until the time limit.

    Args:
        log_probabilities: log p of each entry, shape `(blocks, entries)`.
        space_cost: The cost.
        budget: Largest cost, in the unit of the cost.
        seconds: Time limit. After it, the best architecture so far is returned with its gap.
        least: Smallest cost. If no such architecture is found in time, the limit is dropped, with
            a warning.

    Raises:
        UserError: If no architecture is within the budget.

    Example:

    ```python
    found = most_probable(distribution.log_probabilities().numpy(), space_cost, budget=3e6)
    ```
    """
    if budget < space_cost.least():
        raise UserError(
            f"`budget` must be at least {format_cost(space_cost.least())}, the least cost in the "
            f"space. Received: budget={format_cost(budget)}"
        )
    budget = min(budget, space_cost.largest())  # The budget can be infinite.
    chain = _Chain(np.asarray(log_probabilities, np.float64), space_cost, least)
    deadline = time.monotonic() + seconds
    best, upper = _find_best(chain, budget, least, deadline)
    if not best.entries:
        reason = "there is no" if upper == -math.inf else f"{seconds:g} s were too short to find an"
        warnings.warn(
            f"{reason} architecture that costs from {format_cost(least)} to {format_cost(budget)}; "
            f"the most probable one of at most {format_cost(budget)} is used",
            stacklevel=2,
        )
        left = max(0.0, deadline - time.monotonic())
        return most_probable(log_probabilities, space_cost, budget, left)
    gap = upper - best.log_prob
    return Derivation(
        space_cost.space.architecture(space_cost.space.entries.to_choices(best.entries)),
        best.cost,
        best.log_prob,
        least,
        gap if gap > _TOLERANCE else 0.0,
    )


class _Found(NamedTuple):
    """An architecture: the entry of each search block, the cost and log p. Empty: none."""

    entries: list[int]
    cost: float
    log_prob: float


class _Moves(NamedTuple):
    """The ways through a search block from one of its filters in, as arrays of one length."""

    entry: np.ndarray
    cost: np.ndarray
    log_p: np.ndarray
    filters: np.ndarray  # Index of the filters out.


class _Chain:
    """The search blocks as moves from filters to filters. The head is the last one, with one move.

    Args:
        log_probabilities: log p of each entry, shape `(blocks, entries)`.
        space_cost: The cost.
        least: Smallest cost of an architecture.
    """

    def __init__(self, log_probabilities, space_cost, least):
        self.start_cost = space_cost.stem_cost
        # For each search block, for each of its filters in.
        self.moves: list[list[_Moves]] = []
        for index, costs in enumerate(space_cost.block_costs):
            log_p = log_probabilities[index, : costs.shape[1]]
            # Without a lower limit, a dominated move is never part of the best architecture.
            safe = np.full(len(log_p), least <= 0)
            self.moves.append([])
            for own_costs, filters in zip(costs, space_cost.filters_out(index)):
                kept = _undominated(filters, own_costs, log_p, safe)
                self.moves[-1].append(_Moves(kept, own_costs[kept], log_p[kept], filters[kept]))
        zero, nothing = np.zeros(1, int), np.zeros(1)
        heads = space_cost.head_costs
        self.moves.append([_Moves(zero, np.array([cost]), nothing, zero) for cost in heads])

    def best_completions(self, multiplier, likelihood=1.0):
        """Maximizes likelihood * log p - multiplier * cost over all completions.

        Returns:
            For each search block and each of its filters in: the value of the best completion from
            there on, and the number of its first move.
        """
        values, choices = [np.zeros(1)], []
        for moves_by_filters in reversed(self.moves):
            scores = [
                likelihood * moves.log_p - multiplier * moves.cost + values[0][moves.filters]
                for moves in moves_by_filters
            ]
            choices.insert(0, [int(np.argmax(each)) for each in scores])
            values.insert(0, np.array([np.max(each) for each in scores]))
        return values, choices

    def follow(self, choices):
        """The architecture that takes the given move from each of the filters in."""
        filters, cost, log_prob, entries = 0, self.start_cost, 0.0, []
        for moves_by_filters, choice in zip(self.moves, choices):
            moves, move = moves_by_filters[filters], choice[filters]
            entries.append(moves.entry[move])
            cost, log_prob = cost + moves.cost[move], log_prob + moves.log_p[move]
            filters = moves.filters[move]
        return _Found(entries[:-1], float(cost), float(log_prob))


def _undominated(filters, cost, log_p, safe):
    """Numbers of the labels that no other label dominates.

    A label dominates another one if it has the same filters, costs no more and is at least as
    probable: whatever completes the other one, also completes it, for a better architecture.

    For example, of five labels, after a search block with two choices of filters:

    | label | filters | cost | log p | |
    |---|---|---|---|---|
    | 0 | 0 | 10 | -3.0 | kept: the cheapest with these filters |
    | 1 | 0 | 12 | -3.5 | dominated by 0, which costs less and is more probable |
    | 2 | 0 | 12 | -1.0 | kept: it costs more than 0, but is more probable |
    | 3 | 1 | 15 | -4.0 | kept: the only one with these filters |
    | 4 | 0 | 14 | -1.5 | dominated by 2 |

    >>> filters = np.array([0, 0, 0, 1, 0])
    >>> cost = np.array([10, 12, 12, 15, 14])
    >>> log_p = np.array([-3.0, -3.5, -1.0, -4.0, -1.5])
    >>> _undominated(filters, cost, log_p, safe=np.full(5, True))
    array([0, 2, 3])

    With a lower limit of the cost, a cheaper label is not always better: its completions can be too
    cheap. A label is safe if even its cheapest completion reaches the lower limit. Only safe labels
    dominate labels that cost more. If labels 0, 1 and 2 are not safe, then label 2 still dominates
    label 1, which costs the same, but no longer label 4:

    >>> _undominated(filters, cost, log_p, safe=np.array([False, False, False, True, True]))
    array([4, 3, 0, 2])

    Args:
        filters: Index of the filters of each label.
        cost: Cost of each label.
        log_p: log p of each label.
        safe: Whether each label is safe.

    Returns:
        Numbers of labels, sorted by filters and cost. Labels that are not safe come last.
    """
    groups = filters
    if not safe.all():
        # Labels that are not safe are compared with labels of the same cost only.
        _, code = np.unique(cost, return_inverse=True)
        groups = np.where(safe, filters, (code + 1) * (filters.max() + 1) + filters)
    order = np.lexsort((-log_p, cost, groups))
    return order[_is_front(groups[order], log_p[order])]


def _is_front(groups, log_p):
    """Whether each label is more probable than all earlier ones of its group.

    The labels are sorted by group and cost. The running maximum starts again in each group, because
    the ranks of a group are raised above those of all earlier groups.
    """
    _, rank = np.unique(log_p, return_inverse=True)
    starts = np.r_[True, groups[1:] != groups[:-1]]
    rank = rank + np.cumsum(starts) * len(groups)
    return starts | (rank > np.r_[-1, np.maximum.accumulate(rank)[:-1]])


def _find_best(chain, budget, least, deadline):
    """The best architecture that is found in time, and an upper bound of log p."""
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
    return best, upper


def _relax(chain, budget, least):
    """Lagrangian relaxation. Every multiplier m gives an upper bound of log p(A):

        log p(A) <= max(log p - m * cost) + m * (budget if m >= 0 else least)

    Bisection finds the m with the lowest bound.

    Returns:
        The best architecture found with a cost from `least` to `budget`, multipliers that give
        tight bounds, and the lowest upper bound.
    """
    best = _Found([], math.nan, -math.inf)
    if least <= 0:
        best = chain.follow(chain.best_completions(1.0, likelihood=0.0)[1])  # The cheapest.
    upper, tightest = math.inf, 0.0
    low, high, multiplier, sign = 0.0, None, 0.0, 1
    sides = {}  # The last choices on each side of the limit.
    for _ in range(60):
        values, choices = chain.best_completions(multiplier)
        found = chain.follow(choices)
        limit = budget if multiplier >= 0 else least
        bound = values[0][0] + multiplier * (limit - chain.start_cost)
        if bound < upper:
            upper, tightest = bound, multiplier
        if least <= found.cost <= budget:
            best = max(best, found, key=lambda each: each.log_prob)
            if multiplier == 0:
                break
        if multiplier == 0:
            sign = 1 if found.cost > budget else -1
        is_beyond = (found.cost <= budget) if sign > 0 else (found.cost >= least)
        sides[is_beyond] = choices
        if is_beyond:
            high = multiplier
        else:
            low = multiplier
        # The multiplier is doubled until it is on the other side, then the interval is halved.
        further = 2 * low if low else sign / budget
        multiplier = further if high is None else (low + high) / 2
    if len(sides) == 2:
        crossed = _cross(chain, *sides.values())
        allowed = [found for found in crossed if least <= found.cost <= budget]
        best = max([best, *allowed], key=lambda each: each.log_prob)
    return best, sorted({factor * tightest for factor in (0, 0.5, 0.8, 1, 1.25, 2)}), upper


def _cross(chain, one, other):
    """Architectures that begin with the choices of one and end with those of the other.

    No multiplier gives an architecture between the last two of a bisection. These often do.
    """
    for first, rest in ((one, other), (other, one)):
        for count in range(1, len(first)):
            yield chain.follow(first[:count] + rest[count:])


class _Labels(NamedTuple):
    """Beginnings of architectures, as arrays with one element for each."""

    parent: np.ndarray  # Number of the label that this one extends.
    entry: np.ndarray  # Entry of the last search block.
    filters: np.ndarray  # Index of the filters that leave it.
    cost: np.ndarray
    log_p: np.ndarray

    def take(self, index):
        return _Labels(*(each[index] for each in self))


class _Limits:
    """What labels must meet to be kept: limits of the cost, the bound, dominance, the number."""

    def __init__(self, chain, budget, least, multipliers):
        self.budget, self.least = budget, least
        # Costs of the cheapest and the most expensive completion.
        self.cheapest = [-values for values in chain.best_completions(1.0, likelihood=0.0)[0]]
        self.dearest = chain.best_completions(-1.0, likelihood=0.0)[0]
        self.completions = [(each, chain.best_completions(each)[0]) for each in multipliers]

    def prune(self, labels, index, best, width):
        """The labels that can begin a better architecture than `best`.

        Args:
            labels: The labels.
            index: Number of search blocks that the labels have behind them.
            best: The best architecture so far.
            width: Largest number of labels to keep.

        Returns:
            The labels, and the highest bound of those that were dropped for lack of room (-inf if
            none was).
        """
        cheapest = labels.cost + self.cheapest[index][labels.filters]
        dearest = labels.cost + self.dearest[index][labels.filters]
        completed = [
            values[index][labels.filters] + m * (self._limit(m) - labels.cost)
            for m, values in self.completions
        ]
        bound = labels.log_p + np.min(completed, axis=0)
        better = bound > best.log_prob + _TOLERANCE
        kept = np.flatnonzero((cheapest <= self.budget) & (dearest >= self.least) & better)
        own = labels.take(kept)
        kept = kept[_undominated(own.filters, own.cost, own.log_p, cheapest[kept] >= self.least)]
        cut = -math.inf
        if len(kept) > width:
            order = np.argsort(-bound[kept], kind="stable")
            cut = bound[kept[order[width]]]
            kept = np.sort(kept[order[:width]])
        return labels.take(kept), cut

    def _limit(self, multiplier):
        return self.budget if multiplier >= 0 else self.least


def _search(chain, limits, best, width, deadline):
    """One pass that keeps at most `width` labels after each search block.

    Returns:
        The best architecture, and the highest bound of a label that was dropped for lack of room
        (-inf if none was). `None` if the time is over.
    """
    none, zero = np.zeros(0, int), np.zeros(1, int)
    labels = _Labels(zero, zero, zero, np.array([chain.start_cost]), np.zeros(1))
    history, cut = [], -math.inf
    for index, moves_by_filters in enumerate(chain.moves, 1):
        kept = _Labels(none, none, none, np.zeros(0), np.zeros(0))
        # As many labels at once as fit into memory.
        step = 1 + _CHUNK // max(len(moves.entry) for moves in moves_by_filters)
        count = len(labels.filters)
        for start in range(0, count, step):
            if time.monotonic() > deadline:
                return None
            numbers = np.arange(start, min(start + step, count))
            new = _extend(moves_by_filters, labels, numbers)
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


def _extend(moves_by_filters, labels, numbers):
    """Extends the labels with these numbers by all moves from their filters."""
    parts = []
    for filters, moves in enumerate(moves_by_filters):
        own = numbers[labels.filters[numbers] == filters]
        shape = (len(own), len(moves.entry))
        parts.append(
            (
                np.repeat(own, len(moves.entry)),
                np.broadcast_to(moves.entry, shape).ravel(),
                np.broadcast_to(moves.filters, shape).ravel(),
                (labels.cost[own, None] + moves.cost).ravel(),
                (labels.log_p[own, None] + moves.log_p).ravel(),
            )
        )
    return _Labels(*map(np.concatenate, zip(*parts)))
