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

# Most labels after each search block: in the first pass, and the factor from pass to pass.
_FIRST_MAX_LABELS, _MAX_LABELS_FACTOR = 1_000, 8
# Number of relaxations that are solved to find the multiplier with the lowest bound.
_RELAXATIONS = 60
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

    Returns:
        The architecture, and what is proven of it.

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
    chain = _Chain(np.asarray(log_probabilities, np.float64), space_cost, budget, least)
    deadline = time.monotonic() + seconds
    best, bound = _find_best(chain, deadline)
    if not best.entries:
        reason = "there is no" if bound == -math.inf else f"{seconds:g} s were too short to find an"
        warnings.warn(
            f"{reason} architecture that costs from {format_cost(least)} to {format_cost(budget)}; "
            f"the most probable one of at most {format_cost(budget)} is used",
            stacklevel=2,
        )
        remaining = max(0.0, deadline - time.monotonic())
        return most_probable(log_probabilities, space_cost, budget, remaining)
    gap = bound - best.log_prob
    return Derivation(
        space_cost.space.architecture(space_cost.space.entries.to_choices(best.entries)),
        best.cost,
        best.log_prob,
        least,
        gap if gap > _TOLERANCE else 0.0,
    )


class _Candidate(NamedTuple):
    """An architecture: the entry of each search block, the cost and log p. No entries: none."""

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
        budget: Largest cost of an architecture.
        least: Smallest cost of an architecture.
    """

    def __init__(self, log_probabilities, space_cost, budget, least):
        self.budget, self.least = budget, least
        self.start_cost = space_cost.stem_cost
        # For each search block, for each of its filters in.
        self.moves: list[list[_Moves]] = []
        for index, block_costs in enumerate(space_cost.block_costs):
            log_p = log_probabilities[index, : block_costs.shape[1]]
            # Without a lower limit, a dominated move is never part of the best architecture.
            safe = np.full(len(log_p), least <= 0)
            moves_by_filters = []
            for costs, filters in zip(block_costs, space_cost.filters_out(index)):
                entries = _undominated(filters, costs, log_p, safe)
                moves_by_filters.append(
                    _Moves(entries, costs[entries], log_p[entries], filters[entries])
                )
            self.moves.append(moves_by_filters)
        zero, certain = np.zeros(1, int), np.zeros(1)
        heads = space_cost.head_costs
        self.moves.append([_Moves(zero, np.array([cost]), certain, zero) for cost in heads])

    def allows(self, cost):
        """Whether a cost is from `least` to `budget`."""
        return self.least <= cost <= self.budget

    def limit(self, multiplier):
        """The limit of the cost that a multiplier enforces. A negative multiplier rewards cost."""
        return self.budget if multiplier >= 0 else self.least

    def best_completions(self, multiplier, likelihood=1.0):
        """Maximizes likelihood * log p - multiplier * cost over all completions.

        Returns:
            For each search block and each of its filters in: the value of the best completion from
            there on, and the number of its first move.
        """
        values, first_moves = [np.zeros(1)], []
        for moves_by_filters in reversed(self.moves):
            scores = [
                likelihood * moves.log_p - multiplier * moves.cost + values[0][moves.filters]
                for moves in moves_by_filters
            ]
            first_moves.insert(0, [int(np.argmax(row)) for row in scores])
            values.insert(0, np.array([np.max(row) for row in scores]))
        return values, first_moves

    def follow(self, move_numbers):
        """The architecture that takes the given move from each of the filters in."""
        filters, cost, log_prob, entries = 0, self.start_cost, 0.0, []
        for moves_by_filters, numbers in zip(self.moves, move_numbers):
            moves, number = moves_by_filters[filters], numbers[filters]
            entries.append(moves.entry[number])
            cost, log_prob = cost + moves.cost[number], log_prob + moves.log_p[number]
            filters = moves.filters[number]
        return _Candidate(entries[:-1], float(cost), float(log_prob))  # Without the head's entry.


def _undominated(filters, cost, log_p, safe):
    """Numbers of the labels that no other label dominates.

    A label dominates another one if it has the same filters, costs no more and is at least as
    probable. Every completion of the other one also completes it, with a result at least as good.

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


def _find_best(chain, deadline):
    """The best architecture that is found in time, and an upper bound of log p."""
    best, bound, multipliers = _relax(chain)
    pruning = _Pruning(chain, multipliers)
    max_labels = _FIRST_MAX_LABELS
    while bound > best.log_prob + _TOLERANCE:
        result = _label_setting_pass(chain, pruning, best, max_labels, deadline)
        if result is None:
            break
        best, dropped_bound = result
        bound = min(bound, max(dropped_bound, best.log_prob))
        max_labels *= _MAX_LABELS_FACTOR
    return best, bound


class _Relaxation(NamedTuple):
    """The solution of max(log p - multiplier * cost) over all architectures.

    Attributes:
        multiplier: The multiplier m.
        bound: No architecture that the chain allows has a log p above it:
            log p(A) <= max(log p - m * cost) + m * limit(m).
        moves: The solution, as `_Chain.follow` takes it.
        candidate: The solution.
    """

    multiplier: float
    bound: float
    moves: list[list[int]]
    candidate: _Candidate


def _solve(chain, multiplier):
    values, moves = chain.best_completions(multiplier)
    bound = values[0][0] + multiplier * (chain.limit(multiplier) - chain.start_cost)
    return _Relaxation(multiplier, bound, moves, chain.follow(moves))


def _relax(chain):
    """Lagrangian relaxation: the limits of the cost are replaced by multiplier * cost.

    Returns:
        The best allowed architecture of all relaxations, the lowest upper bound, and multipliers
        that give low bounds.
    """
    relaxations, outside, inside = _bisect(chain)
    candidates = [relaxation.candidate for relaxation in relaxations]
    if inside is not None:
        candidates += _cross(chain, outside.moves, inside.moves)
    best = _Candidate([], math.nan, -math.inf)
    if chain.least <= 0:
        best = chain.follow(chain.best_completions(1.0, likelihood=0.0)[1])  # The cheapest.
    allowed = [candidate for candidate in candidates if chain.allows(candidate.cost)]
    best = max([best, *allowed], key=lambda candidate: candidate.log_prob)
    tightest = min(relaxations, key=lambda relaxation: relaxation.bound)
    multipliers = {factor * tightest.multiplier for factor in (0, 0.5, 0.8, 1, 1.25, 2)}
    return best, tightest.bound, sorted(multipliers)


def _bisect(chain):
    """Finds the multiplier with the lowest bound by bisection.

    The cost of the solution falls as the multiplier grows. If the solution for multiplier 0 is over
    the budget (or under `least`), the multiplier is doubled until the solution meets that limit.
    Then the interval between the last two is halved.

    Returns:
        All relaxations; the last one whose solution does not meet the limit; the last one whose
        solution does. The latter is `None` if there is no such one, or if the solution for
        multiplier 0 is allowed: it is the most probable architecture of all.
    """
    outside, inside = _solve(chain, 0.0), None
    relaxations = [outside]
    if chain.allows(outside.candidate.cost):
        return relaxations, outside, None
    is_over = outside.candidate.cost > chain.budget
    multiplier = (1 if is_over else -1) / chain.budget
    while len(relaxations) < _RELAXATIONS:
        relaxation = _solve(chain, multiplier)
        relaxations.append(relaxation)
        cost = relaxation.candidate.cost
        if (cost <= chain.budget) if is_over else (cost >= chain.least):
            inside = relaxation
        else:
            outside = relaxation
        if inside is None:
            multiplier *= 2
        else:
            multiplier = (outside.multiplier + inside.multiplier) / 2
    return relaxations, outside, inside


def _cross(chain, one, other):
    """Architectures that begin with the moves of one and end with those of the other.

    No multiplier gives an architecture with a cost between those of the last two of a bisection.
    The combinations of the two often have such a cost.
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

    def take(self, numbers):
        return _Labels(*(column[numbers] for column in self))


class _Pruning:
    """Drops labels: by the limits of the cost, the bound of log p, dominance, and their number."""

    def __init__(self, chain, multipliers):
        self.chain = chain
        # Costs of the cheapest and the most expensive completion.
        self.cheapest = [-values for values in chain.best_completions(1.0, likelihood=0.0)[0]]
        self.dearest = chain.best_completions(-1.0, likelihood=0.0)[0]
        self.completions = [(m, chain.best_completions(m)[0]) for m in multipliers]

    def prune(self, labels, index, best, max_labels):
        """The labels that can begin a better architecture than `best`.

        Args:
            labels: The labels.
            index: Number of search blocks that the labels contain.
            best: The best architecture so far.
            max_labels: Largest number of labels to keep.

        Returns:
            The labels, and the highest bound of those that were dropped for lack of room (-inf if
            none was).
        """
        cheapest = labels.cost + self.cheapest[index][labels.filters]
        dearest = labels.cost + self.dearest[index][labels.filters]
        # As for `_Relaxation.bound`, for the completions of each label.
        bounds = [
            values[index][labels.filters] + m * (self.chain.limit(m) - labels.cost)
            for m, values in self.completions
        ]
        bound = labels.log_p + np.min(bounds, axis=0)
        is_allowed = (cheapest <= self.chain.budget) & (dearest >= self.chain.least)
        numbers = np.flatnonzero(is_allowed & (bound > best.log_prob + _TOLERANCE))
        safe = cheapest[numbers] >= self.chain.least
        remaining = labels.take(numbers)
        numbers = numbers[_undominated(remaining.filters, remaining.cost, remaining.log_p, safe)]
        dropped_bound = -math.inf
        if len(numbers) > max_labels:
            order = np.argsort(-bound[numbers], kind="stable")
            dropped_bound = bound[numbers[order[max_labels]]]
            numbers = np.sort(numbers[order[:max_labels]])
        return labels.take(numbers), dropped_bound


def _label_setting_pass(chain, pruning, best, max_labels, deadline):
    """One pass over all search blocks, with at most `max_labels` labels after each.

    Returns:
        The best architecture, and the highest bound of a label that was dropped for lack of room
        (-inf if none was). `None` if the time is over.
    """
    zero = np.zeros(1, int)
    labels = _Labels(zero, zero, zero, np.array([chain.start_cost]), np.zeros(1))
    history, dropped_bound = [], -math.inf
    for index, moves_by_filters in enumerate(chain.moves, 1):
        extended = labels.take(slice(0))  # None yet.
        # As many labels at once as fit into memory.
        step = 1 + _CHUNK // max(len(moves.entry) for moves in moves_by_filters)
        count = len(labels.filters)
        for start in range(0, count, step):
            if time.monotonic() > deadline:
                return None
            numbers = np.arange(start, min(start + step, count))
            new = _extend(moves_by_filters, labels, numbers)
            extended = _Labels(*map(np.concatenate, zip(extended, new)))
            extended, dropped = pruning.prune(extended, index, best, max_labels)
            dropped_bound = max(dropped_bound, dropped)
        labels = extended
        history.append(labels)
    return (_backtrack(history) if len(labels.log_p) else best), dropped_bound


def _extend(moves_by_filters, labels, numbers):
    """Extends the labels with these numbers by all moves from their filters."""
    parts = []
    for filters, moves in enumerate(moves_by_filters):
        parents = numbers[labels.filters[numbers] == filters]
        shape = (len(parents), len(moves.entry))
        parts.append(
            (
                np.repeat(parents, len(moves.entry)),
                np.broadcast_to(moves.entry, shape).ravel(),
                np.broadcast_to(moves.filters, shape).ravel(),
                (labels.cost[parents, None] + moves.cost).ravel(),
                (labels.log_p[parents, None] + moves.log_p).ravel(),
            )
        )
    return _Labels(*map(np.concatenate, zip(*parts)))


def _backtrack(history):
    """The most probable architecture of the last labels.

    Args:
        history: The labels after each search block and after the head.
    """
    number = int(np.argmax(history[-1].log_p))
    cost, log_prob = float(history[-1].cost[number]), float(history[-1].log_p[number])
    entries = []
    for labels in reversed(history):
        entries.insert(0, labels.entry[number])
        number = labels.parent[number]
    return _Candidate(entries[:-1], cost, log_prob)  # Without the head's entry.
