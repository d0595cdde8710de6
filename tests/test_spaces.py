import dataclasses

import numpy as np
import pytest
from helpers import all_choices, random_choices
from hypothesis import given, settings
from hypothesis import strategies as st

from fpnas_keras import MacsCost, spaces
from fpnas_keras.cost import CostTable
from fpnas_keras.spaces import SAME, SearchBlock

SHARED = {
    "filters": st.just((SAME,)) | st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True),
    "expansion": st.lists(st.sampled_from([1, 2.5, 3, 6]), min_size=1, unique=True),
    "activation": st.lists(st.sampled_from(["relu", "hard_silu"]), min_size=1, unique=True),
}
OPERATIONS = ({"skip": True}, {"kernel_size": 3, "splits": 1}, {"kernel_size": 5, "splits": 1})
BLOCKS = st.builds(
    SearchBlock,
    **SHARED,
    kernel_size=st.lists(st.sampled_from([3, 5, 7]), min_size=1, unique=True),
    splits=st.lists(st.sampled_from([0, 1]), min_size=1, unique=True),
    skip=st.sampled_from([(False,), (False, True), (True, False)]),
) | st.builds(SearchBlock, **SHARED, operation=st.sampled_from([OPERATIONS, OPERATIONS[1:]]))
_IRRELEVANT = {"kernel_size": 3, "expansion": 1, "activation": "relu", "splits": 0}


def test_mobile_mini_has_the_sizes_it_says():
    space = spaces.get("mobile_mini")
    table = CostTable(space, MacsCost())
    assert table.least() < 1e6
    assert 10e6 < table.largest() < 12.5e6
    assert [block.strides for block in space.blocks] == [2, 1, 2, 1, 1, 2, 1, 1]
    # 24 combinations of the other variables, one more where a block may be skipped.
    assert space.num_architectures == (3 * 24) * 25 * (3 * 24) * 25**2 * (4 * 24) * 25**2


def test_number_of_architectures_is_that_of_an_enumeration(tiny_space):
    assert len(all_choices(tiny_space)) == tiny_space.num_architectures


@settings(max_examples=50, deadline=None)
@given(BLOCKS)
def test_number_of_choices_of_any_block(block):
    """Each different block once, and every combination of choices is one of them."""
    blocks = block.all_blocks(16)
    assert len(set(blocks)) == len(blocks) == len(block.entries)
    found = {dataclasses.replace(each, **_IRRELEVANT) if each.skip else each for each in blocks}
    for choices in np.ndindex(*block.cardinalities):
        each = block.block(choices, 16)
        if each.skip:
            assert dataclasses.replace(each, **_IRRELEVANT) in found
        elif block.operation:
            does = {"kernel_size": each.kernel_size, "splits": each.splits} in block.operation
            assert (each in found) == does
        else:
            assert each in found


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_choices_is_the_inverse_of_architecture(seed):
    space = spaces.get("mobile_mini", input_shape=(28, 28, 1))
    choices = random_choices(space, np.random.default_rng(seed))
    architecture = space.architecture(choices)
    assert np.array_equal(space.choices(architecture), choices)
    assert architecture.input_shape == (28, 28, 1)


def test_architectures_outside_the_space_are_refused(tiny_space):
    other = spaces.get("mobile_mini", input_shape=(8, 8, 1), num_classes=3)
    foreign = other.architecture(0 * other.cardinalities)
    with pytest.raises(ValueError, match="`stem` must be"):
        tiny_space.choices(foreign)
    mine = tiny_space.architecture(0 * tiny_space.cardinalities)
    blocks = list(mine.blocks)
    blocks[2] = dataclasses.replace(blocks[2], filters=24)
    with pytest.raises(ValueError, match="`filters` of block 2 must be one of"):
        tiny_space.choices(dataclasses.replace(mine, blocks=blocks))


def test_nas_bench_macro_has_the_networks_it_says():
    space = spaces.get("nas_bench_macro")
    assert space.num_architectures == 3**8
    # The published best, 22212220: 93.13% of CIFAR-10.
    code, entry = "22212220", {"0": (1, 0, 0), "1": (0, 0, 0), "2": (0, 1, 1)}
    choices = np.zeros((8, 6), np.int32)
    choices[:, [0, 2, 3]] = [entry[each] for each in code]
    architecture = space.architecture(choices)
    assert (architecture.macs(), architecture.params()) == (85_164_544, 1_985_514)
    choices[0, 3] = 0  # kernel size 5 with expansion 3 is none of the operations
    foreign = space.architecture(choices)
    with pytest.raises(ValueError, match="block 0 must be one of the operations"):
        space.choices(foreign)


def test_unknown_space_is_refused_by_name():
    with pytest.raises(ValueError, match="Received: space='nonesuch'"):
        spaces.get("nonesuch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filters": ()}, "`filters` must have at least one choice"),
        ({"kernel_size": (3, 3)}, "`kernel_size` must have at least one choice and none twice"),
        ({"kernel_size": (3, 4)}, "`kernel_size` must be odd"),
        ({"skip": (True,)}, "`skip` must have the choice False"),
        ({"splits": (0, 3)}, "`splits` must be"),
        ({"filters": (SAME, 8)}, "`filters` must be an integer"),
        ({"strides": 0}, "`strides` must be"),
        ({"operation": ({"skip": True},)}, "`operation` must set some of the variables"),
        ({"operation": ({"depth": 3},)}, "`operation` must set some of the variables"),
        ({"operation": ({"splits": 1}, {"splits": 1})}, "`operation` must have no choice twice"),
        ({"operation": ({"splits": 1}, {"expansion": 3})}, "must set the same variables"),
        (
            {"operation": ({"splits": 1},), "splits": (0, 1)},
            "`splits` is set by `operation` and must not be given too",
        ),
        ({"operation": ({"kernel_size": 4},)}, "`kernel_size` must be odd"),
    ],
)
def test_impossible_blocks_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SearchBlock(**{"filters": (8,)} | change)
