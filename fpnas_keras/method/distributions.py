"""Distributions over the architectures of a space, as Keras layers that hold the logits.

    FactorizedLogits:  p(A) = prod_l prod_m softmax(alpha_{l,m})[a_{l,m}]
    JointLogits:       p(A) = prod_l softmax(alpha_l)[entry(a_l)]

with search blocks l and their variables m. In both, search blocks are independent, and each entry
of a search block has a probability. Only drawing and the gradient differ. The log-probability of a
skipped block is that of its `skip` and `filters`: its other variables are irrelevant.

Architectures are given as entries: the index of the entry of each search block, int32 of shape
`(..., blocks)`. See `fpnas_keras.spaces.Entries`.

Reference: Yan et al., "FP-NAS: Fast Probabilistic Neural Architecture Search", CVPR 2021,
arXiv:2011.10949, section on coarse-to-fine search.
"""

import keras
import numpy as np
import tensorflow as tf

from fpnas_keras.architecture import Architecture
from fpnas_keras.cost import SpaceCost
from fpnas_keras.spaces import Space

# `move_to`: relative tolerance of the cost, the largest change of a logit in one iteration, and the
# largest logit: two logits then differ by at most log(20).
_COST_TOLERANCE, _LARGEST_CHANGE, _LARGEST_LOGIT = 0.002, 0.2, 1.5
# `draw_within`: the temperatures, and how often it draws so many architectures at each.
_TEMPERATURES, _DRAWS_PER_TEMPERATURE, _DRAWS_AT_ONCE = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0), 4, 500


class BlockLogits(keras.layers.Layer):
    """The base class: chooses one entry in each search block, independently.

    Args:
        space: The space.

    Attributes:
        space: The space.
        logits: alpha, a flat float32 weight.
    """

    def __init__(self, space: Space, **kwargs):
        # The logits, their softmax and its logarithm stay float32 under any dtype policy.
        super().__init__(dtype="float32", **kwargs)
        self.space = space

    def log_probabilities(self) -> tf.Tensor:
        """log p of each entry, float32 of shape `(blocks, entries)`; -inf in the padding."""
        raise NotImplementedError

    def entry_probabilities(self) -> tf.Tensor:
        """p of each entry, float32 of shape `(blocks, entries)`; 0 in the padding."""
        return tf.exp(self.log_probabilities())

    def entry_gradient(self, coefficients: tf.Tensor) -> tf.Tensor:
        """sum_{l,j} c_{l,j} * d log p_l(j) / d alpha, in closed form (one-hot minus softmax).

        Args:
            coefficients: c_{l,j} of entry j of search block l, float32 of shape
                `(blocks, entries)`; 0 in the padding.

        Returns:
            float32 of the shape of `logits`.
        """
        raise NotImplementedError

    def _draw(self, count, uniforms):
        """Draws `count` architectures as entries, int32 of shape `(count, blocks)`.

        Args:
            count: Number of architectures.
            uniforms: A function. `uniforms(n)` draws `n` numbers from [0, 1) for each
                architecture, float32 of shape `(count, n)`.
        """
        raise NotImplementedError

    def sample(
        self,
        count: tf.Tensor | int,
        seed: tf.Tensor | int,
        step: tf.Tensor | int,
        stratified: bool = False,
    ) -> tf.Tensor:
        """Draws architectures. The result is a pure function of the arguments and the logits.

        Stratified draws divide [0, 1) into `count` equal parts and take one number from each part,
        in random order. This is done for each variable on its own (joint logits: for each search
        block). Every single sample still follows p(A). A choice of probability p is drawn
        floor(count * p) or ceil(count * p) times.

        Args:
            count: Number of architectures.
            seed: Seed of the search.
            step: Step of the search.
            stratified: Whether the draws are stratified. Otherwise they are independent.

        Returns:
            Entries, int32 of shape `(count, blocks)`.
        """
        key = tf.stack([tf.cast(seed, tf.int64), 2 * tf.cast(step, tf.int64)])

        def uniforms(width):
            values = tf.random.stateless_uniform([count, width], key)
            if not stratified:
                return values
            order = tf.cast(tf.argsort(values, axis=0), tf.float32)
            offset = tf.random.stateless_uniform([width], key + [0, 1])
            return (order + offset) / tf.cast(count, tf.float32)

        return self._draw(count, uniforms)

    def draw_architectures(self, count: int, seed: int) -> list[Architecture]:
        """Draws architectures, for use outside the graph.

        Args:
            count: Number of independent draws.
            seed: Seed of the draws.

        Returns:
            The different architectures among the draws, in the order of the first draws.
        """
        choices = self.space.entries.to_choices(self.sample(count, seed, step=0).numpy())
        return list(dict.fromkeys(map(self.space.architecture, choices)))

    def draw_within(
        self, space_cost: SpaceCost, least: float, most: float, count: int, seed: int
    ) -> np.ndarray:
        """Draws different architectures whose cost is within limits, for use outside the graph.

        A distribution that has decided gives few of them. The draws then go on from flatter and
        flatter distributions, each block's probabilities to the power of 1/T.

        Args:
            space_cost: The cost.
            least: Smallest cost.
            most: Largest cost.
            count: Number of architectures.
            seed: Seed of the draws.

        Returns:
            Entries in the order of the draws, int32 of shape `(n, blocks)`, with `n` up to `count`.
        """
        rng, found = np.random.default_rng(seed), {}
        log_p = self.log_probabilities().numpy()
        for temperature in _TEMPERATURES:
            for _ in range(_DRAWS_PER_TEMPERATURE):
                noise = rng.gumbel(size=(_DRAWS_AT_ONCE, *log_p.shape))
                drawn = np.argmax(log_p / temperature + noise, axis=-1).astype(np.int32)
                costs = space_cost(tf.constant(drawn)).numpy()
                for entries in drawn[(costs >= least) & (costs <= most)]:
                    found.setdefault(entries.tobytes(), entries)
                if len(found) >= count:
                    return np.stack(list(found.values())[:count])
        return np.array(list(found.values()), np.int32).reshape(-1, len(log_p))

    def mode(self) -> tf.Tensor:
        """The most probable architecture, as entries: int32 of shape `(blocks,)`."""
        return tf.argmax(self.log_probabilities(), axis=-1, output_type=tf.int32)

    def log_prob(self, entries: tf.Tensor) -> tf.Tensor:
        """log p(A) of architectures.

        Args:
            entries: Integers of shape `(..., blocks)`.

        Returns:
            float32 of shape `(...)`.
        """
        flat_log_p = tf.reshape(self.log_probabilities(), [-1])
        flat_entries = entries + self.space.entries.offsets
        return tf.reduce_sum(tf.gather(flat_log_p, flat_entries), axis=-1)

    def entropy(self) -> tf.Tensor:
        """H(A) = -E[log p(A)] in nats, a float32 scalar."""
        log_p = self.log_probabilities()
        return -tf.reduce_sum(tf.math.multiply_no_nan(log_p, tf.exp(log_p)))

    def gradient(self, entries: tf.Tensor, coefficients: tf.Tensor) -> tf.Tensor:
        """sum_k c_k * d log p(A_k) / d alpha, in closed form.

        Args:
            entries: A_k, integers of shape `(K, blocks)`.
            coefficients: c_k, float32 of shape `(K,)`.

        Returns:
            float32 of the shape of `logits`.
        """
        mask = self.space.entries.mask
        # The coefficient of an entry is the sum over the architectures that have it.
        repeated = tf.broadcast_to(coefficients[:, None], tf.shape(entries))
        flat_entries = entries + self.space.entries.offsets
        sums = tf.math.unsorted_segment_sum(repeated, flat_entries, mask.size)
        return self.entry_gradient(tf.reshape(sums, mask.shape))

    def probabilities(self) -> list[dict[str, dict]]:
        """The probability of each choice of each variable of each search block, as plain data.

        Variables with one choice are left out. For a variable that a skipped block does not have,
        the probability is conditional on the block not being skipped.

        Example:

        >>> search.distribution.probabilities()[1]["kernel_size"]
        {3: 0.5, 5: 0.5}
        """
        p = np.exp(self.log_probabilities().numpy().astype(np.float64))
        result = []
        for search_block, entry_p in zip(self.space.blocks, p):
            result.append({})
            for name, (choices, chosen) in search_block.variables.items():
                if len(choices) > 1:
                    # Bin 0 is for the entries where the variable is irrelevant (choice -1).
                    sums = np.bincount(chosen + 1, entry_p[: len(chosen)], len(choices) + 1)[1:]
                    result[-1][name] = dict(zip(choices, (sums / sums.sum()).tolist()))
        return result


class VariableArrays:
    """The variables of all search blocks of a space, as arrays of one shape.

    `FactorizedLogits` holds one number for each choice of each variable of each search block, in
    arrays of shape `(blocks, variables, choices)`. They are padded where a search block has fewer
    variables or a variable has fewer choices. The variables are those of `SearchBlock.variables`,
    in their order.

    Args:
        space: The space.

    Example:

    A block with two kernel sizes that can be skipped has three entries: kernel size 3, kernel
    size 5, skipped. Its kernel size is irrelevant in the third.

    >>> block = SearchBlock(filters=(8,), kernel_size=(3, 5), skip=(False, True))
    >>> list(block.variables)
    ['skip', 'filters', 'kernel_size', 'expansion', 'activation', 'splits']
    >>> arrays = VariableArrays(Space("example", (8, 8, 1), 2, Stem(8), [block], Head(8)))
    >>> arrays.cardinalities
    array([[2, 1, 2, 1, 1, 1]], dtype=int32)

    `skip` and `kernel_size` have two choices, and a logit for each. The filters are fixed.

    >>> arrays.choice_mask[0, :3]
    array([[ True,  True],
           [ True, False],
           [ True,  True]])
    >>> arrays.logit_mask[0, :3]
    array([[ True,  True],
           [False, False],
           [ True,  True]])

    The choices are numbered as in the flattened array: `skip` has numbers 0 and 1, the filters 2,
    `kernel_size` 4 and 5. A column for each entry; 12 is one past the end of this array:

    >>> arrays.flat_choice_of_entry[0, :3]
    array([[ 0,  0,  1],
           [ 2,  2,  2],
           [ 4,  5, 12]], dtype=int32)

    Skipped with kernel size 3 and skipped with kernel size 5 are the same entry:

    >>> arrays.entries_of([[[1, 0, 0, 0, 0, 0]], [[1, 0, 1, 0, 0, 0]]]).numpy()
    array([[2],
           [2]], dtype=int32)

    Attributes:
        cardinalities: Number of choices, int32 of shape `(blocks, variables)`; 1 for a variable
            that is fixed and for padding.
        choice_mask: True for a choice, False for padding: bool of shape
            `(blocks, variables, choices)`.
        logit_mask: True for a choice that has a logit: bool of the same shape. The choice of a
            fixed variable has none.
        flat_choice_of_entry: The choice that each entry makes, as the index in the flattened array
            of `(blocks, variables, choices)`: int32 of shape `(blocks, variables, entries)`. It is
            `choice_mask.size`, one past the end, where the variable is irrelevant or padding.
    """

    def __init__(self, space: Space):
        blocks, max_entries = space.entries.mask.shape
        variables = max(len(search_block.variables) for search_block in space.blocks)
        self.cardinalities = np.ones((blocks, variables), np.int32)
        # The choice that each entry makes, -1 where the variable is irrelevant or padding.
        choice_of_entry = np.full((blocks, variables, max_entries), -1, np.int32)
        for index, search_block in enumerate(space.blocks):
            for variable, (choices, chosen) in enumerate(search_block.variables.values()):
                self.cardinalities[index, variable] = len(choices)
                choice_of_entry[index, variable, : len(chosen)] = chosen
        max_choices = self.cardinalities.max()
        self.choice_mask = np.arange(max_choices) < self.cardinalities[..., None]
        self.logit_mask = self.choice_mask & (self.cardinalities[..., None] > 1)
        past_end = np.int32(self.choice_mask.size)
        first_choice = np.arange(0, past_end, max_choices, dtype=np.int32)
        flat_choice = first_choice.reshape(blocks, variables, 1) + choice_of_entry
        self.flat_choice_of_entry = np.where(choice_of_entry < 0, past_end, flat_choice)
        # All combinations of choices, search block after search block, in each row-major.
        self._entry_of_combination = np.concatenate(
            [_entries_of_combinations(*pair) for pair in zip(self.cardinalities, choice_of_entry)]
        )
        self._place_values = np.array(
            [[row[i + 1 :].prod() for i in range(variables)] for row in self.cardinalities],
            np.int32,
        )
        combinations = self.cardinalities.prod(axis=1)
        self._first_combination = np.cumsum([0, *combinations[:-1]]).astype(np.int32)

    def entries_of(self, choices: tf.Tensor) -> tf.Tensor:
        """The entries that choices of the variables make.

        Args:
            choices: Integers of shape `(..., blocks, variables)`; any choice, where the variable
                is irrelevant.

        Returns:
            int32 of shape `(..., blocks)`.
        """
        combinations = tf.reduce_sum(tf.cast(choices, tf.int32) * self._place_values, axis=-1)
        entry_of_combination = tf.constant(self._entry_of_combination)
        return tf.gather(entry_of_combination, self._first_combination + combinations)


def _entries_of_combinations(cardinalities, choice_of_entry):
    """The entry of each combination of choices of a search block, row-major.

    Args:
        cardinalities: Number of choices of each variable, shape `(variables,)`.
        choice_of_entry: The choice that each entry makes, shape `(variables, entries)`; -1 where
            the variable is irrelevant, so that all its choices make this entry.
    """
    result = np.zeros(cardinalities, np.int32)
    for entry in np.flatnonzero((choice_of_entry >= 0).any(axis=0)):
        choices = choice_of_entry[:, entry]
        result[tuple(slice(None) if choice < 0 else choice for choice in choices)] = entry
    return result.ravel()


class FactorizedLogits(BlockLogits):
    """p(A) as a product of independent softmaxes, one for each variable of each search block.

    `logits` holds those of all variables that have more than one choice: search block after search
    block, variable after variable.

    Args:
        space: The space.

    Reference: FP-NAS (arXiv:2011.10949), section on coarse-to-fine search,
    factorized distribution.
    """

    def __init__(self, space: Space, **kwargs):
        kwargs.setdefault("name", "factorized_logits")
        super().__init__(space, **kwargs)
        self.variable_arrays = VariableArrays(space)
        self.build()

    def build(self, input_shape: object = None) -> None:
        self.logits = self.add_weight(
            name="logits",
            shape=(int(self.variable_arrays.logit_mask.sum()),),
            initializer="zeros",
            autocast=False,  # Not even inside a model that computes in bfloat16.
        )
        self.built = True

    def log_probabilities(self) -> tf.Tensor:
        # The 0 past the end is for irrelevant variables.
        flat_log_p = tf.concat([tf.reshape(self.log_softmax(), [-1]), [0.0]], axis=0)
        log_p = tf.gather(flat_log_p, self.variable_arrays.flat_choice_of_entry)
        return tf.where(self.space.entries.mask, tf.reduce_sum(log_p, axis=1), -np.inf)

    def entry_gradient(self, coefficients: tf.Tensor) -> tf.Tensor:
        arrays = self.variable_arrays
        flat_choices, size = arrays.flat_choice_of_entry, arrays.choice_mask.size
        # The coefficient of a choice is the sum over the entries that make it.
        repeated = tf.broadcast_to(coefficients[:, None], flat_choices.shape)
        sums = tf.math.unsorted_segment_sum(repeated, flat_choices, size + 1)[:size]
        sums = tf.reshape(sums, arrays.choice_mask.shape)
        softmax = tf.exp(self.log_softmax())
        gradient = sums - softmax * tf.reduce_sum(sums, axis=-1, keepdims=True)
        return tf.boolean_mask(gradient, arrays.logit_mask)

    def move_to(self, space_cost: SpaceCost, cost: float) -> None:
        """Moves a uniform distribution to an expected cost, along the gradient of E[cost].

        No choice becomes more than 20 times as probable as another one of its variable. So an
        expected cost that is near the limits of the space is not reached.

        Args:
            space_cost: The cost.
            cost: The expected cost.
        """
        while True:
            expected, slope = space_cost.expected_and_slope(self.entry_probabilities())
            excess = float(expected) / cost - 1
            gradient = self.entry_gradient(slope).numpy() / cost
            if abs(excess) < _COST_TOLERANCE or not gradient.any():
                break
            change = -excess * gradient / np.sum(gradient**2)
            change *= min(1.0, _LARGEST_CHANGE / np.abs(change).max())
            moved = self.logits.numpy() + change
            if np.abs(moved).max() > _LARGEST_LOGIT:
                break
            self.logits.assign(moved)

    def log_softmax(self) -> tf.Tensor:
        """log p of each choice of each variable, float32; -inf in the padding.

        Its shape is `(blocks, variables, choices)`, as in `VariableArrays`.
        """
        arrays = self.variable_arrays
        logits = tf.tensor_scatter_nd_add(
            tf.where(arrays.choice_mask, 0.0, -np.inf),
            np.argwhere(arrays.logit_mask),
            self.logits.value,
        )
        return tf.nn.log_softmax(logits)

    def _draw(self, count, uniforms):
        arrays = self.variable_arrays
        rows = tf.reshape(tf.exp(self.log_softmax()), (-1, arrays.choice_mask.shape[2]))
        drawn = _inverse_cumulative(rows, uniforms(rows.shape[0]), arrays.cardinalities.ravel())
        return arrays.entries_of(tf.reshape(drawn, (count, *arrays.cardinalities.shape)))


class JointLogits(BlockLogits):
    """p(A) as a product of softmaxes, one for each search block, over all of its entries.

    Args:
        space: The space.

    Reference: FP-NAS (arXiv:2011.10949), section on coarse-to-fine search,
    joint distribution. PARSEC (Casale et al., arXiv:1902.05116) has the same distribution.
    """

    def __init__(self, space: Space, **kwargs):
        kwargs.setdefault("name", "joint_logits")
        super().__init__(space, **kwargs)
        self.build()

    def build(self, input_shape: object = None) -> None:
        self.logits = self.add_weight(
            name="logits",
            shape=(int(self.space.entries.mask.sum()),),
            initializer="zeros",
            autocast=False,
        )
        self.built = True

    def assign(self, distribution: BlockLogits) -> None:
        """Makes p(A) equal to that of another distribution over the same space, exactly.

        Args:
            distribution: The other distribution.
        """
        log_p = distribution.log_probabilities()
        self.logits.assign(tf.boolean_mask(log_p, self.space.entries.mask))

    def log_probabilities(self) -> tf.Tensor:
        mask = self.space.entries.mask
        logits = tf.tensor_scatter_nd_update(
            tf.fill(mask.shape, -np.inf), np.argwhere(mask), self.logits.value
        )
        return tf.nn.log_softmax(logits)

    def entry_gradient(self, coefficients: tf.Tensor) -> tf.Tensor:
        softmax = tf.exp(self.log_probabilities())
        gradient = coefficients - softmax * tf.reduce_sum(coefficients, axis=-1, keepdims=True)
        return tf.boolean_mask(gradient, self.space.entries.mask)

    def _draw(self, count, uniforms):
        rows = tf.exp(self.log_probabilities())
        return _inverse_cumulative(rows, uniforms(rows.shape[0]), self.space.entries.counts)


def _inverse_cumulative(probabilities, uniforms, counts):
    """Draws from categorical distributions, by inverting the cumulative distribution.

    Args:
        probabilities: One distribution in each row, shape `(rows, choices)`; 0 in the padding.
        uniforms: In [0, 1), shape `(samples, rows)`.
        counts: Number of choices of each row, without the padding.

    Returns:
        int32 of shape `(samples, rows)`.
    """
    cumulative = tf.cumsum(probabilities, axis=-1)
    drawn = tf.searchsorted(cumulative, tf.transpose(uniforms), side="right")
    # Rounding can leave the last cumulative probability just below 1.
    return tf.minimum(tf.transpose(drawn), counts - 1)
