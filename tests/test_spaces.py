import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, all_choices, make_tiny_space, random_choices
from hypothesis import given, settings
from hypothesis import strategies as st

from fpnas_keras import MacsCost, spaces
from fpnas_keras.architecture import Head, Stem
from fpnas_keras.cost import SpaceCost
from fpnas_keras.spaces import SAME, Entries, SearchBlock, Space

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
    splits=st.lists(st.sampled_from([0, 1, 2, 4]), min_size=1, unique=True),
    strides=st.integers(1, 2),
    repeats=st.integers(1, 3),
    skip=st.sampled_from([(False,), (False, True), (True, False)]),
) | st.builds(SearchBlock, **SHARED, operation=st.sampled_from([OPERATIONS, OPERATIONS[1:]]))
_IRRELEVANT = {"kernel_size": 3, "expansion": 1, "activation": "relu", "splits": 0}


@pytest.mark.parametrize(
    ("name", "input_shape", "classes", "largest_blocks", "least", "largest"),
    [
        ("mobile_40", (32, 32, 3), 10, 14, 578_176, 94_121_472),
        ("mobile_128", (96, 96, 3), 10, 14, 1_681_440, 241_084_416),
        ("mobile_224", (224, 224, 3), 1000, 22, 18_457_440, 1_996_727_232),
    ],
)
def test_wide_spaces_have_the_sizes_they_say(
    name, input_shape, classes, largest_blocks, least, largest
):
    space = spaces.get(name, input_shape, classes)
    cost = SpaceCost(space, MacsCost())
    assert (cost.least(), cost.largest()) == (least, largest)
    assert len(space.blocks) == largest_blocks
    chosen = [block.filters for block in space.blocks if not block.keeps_filters]
    assert all(3 <= max(filters) / min(filters) <= 4 for filters in chosen)


def test_mobile_mini_has_the_sizes_it_says():
    space = spaces.get("mobile_mini")
    space_cost = SpaceCost(space, MacsCost())
    assert space_cost.least() < 1e6
    assert 10e6 < space_cost.largest() < 12.5e6
    assert [block.strides for block in space.blocks] == [2, 1, 2, 1, 1, 2, 1, 1]
    # 24 combinations of the other variables, one more where a block may be skipped.
    assert space.num_architectures == (3 * 24) * 25 * (3 * 24) * 25**2 * (4 * 24) * 25**2


def test_number_of_architectures_is_that_of_an_enumeration(tiny_space):
    assert len(all_choices(tiny_space)) == tiny_space.num_architectures


@settings(max_examples=50)
@given(BLOCKS)
def test_number_of_choices_of_any_block(block):
    """Each different block is one entry, and every combination of choices is an entry."""
    rows = [block.make_blocks(choices, 16) for choices in block.entries]
    assert all(len(row) == block.repeats and set(row[1:]) <= {row[-1]} for row in rows)
    assert all(
        (each.filters, each.strides) == (row[0].filters, 1) for row in rows for each in row[1:]
    )
    blocks = [row[0] for row in rows]
    assert len(set(blocks)) == len(blocks) == len(block.entries)
    found = {dataclasses.replace(each, **_IRRELEVANT) if each.skip else each for each in blocks}
    for choices in np.ndindex(*block.cardinalities):
        each = block.make_blocks(choices, 16)[0]
        if each.skip:
            assert dataclasses.replace(each, **_IRRELEVANT) in found
        elif block.operation:
            does = {"kernel_size": each.kernel_size, "splits": each.splits} in block.operation
            assert (each in found) == does
        else:
            assert each in found


@settings(max_examples=50)
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
        ({"filters": ()}, "`filters` must be a list of at least one choice"),
        ({"kernel_size": (3, 3)}, "`kernel_size` must have no choice twice"),
        ({"kernel_size": (3, 4)}, "`kernel_size` must be odd"),
        ({"skip": (True,)}, "`skip` must have the choice False"),
        ({"splits": (0, 3)}, "`splits` must be"),
        ({"filters": (SAME, 8)}, "`filters` must be an integer"),
        ({"strides": 0}, "`strides` must be"),
        ({"repeats": 0}, "`repeats` must be an integer from 1"),
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


EXAMPLE = ROOT / "configs" / "spaces" / "example.json"
PYTHON_SPACE = """
from fpnas_keras.architecture import Head, Stem
from fpnas_keras.spaces import SearchBlock, Space

def space(input_shape, num_classes):
    blocks = [SearchBlock(filters=(8, 16), kernel_size=(3, 5))]
    return Space("mine", input_shape, num_classes, Stem(8), blocks, Head(16))
"""


def test_space_from_json():
    space = spaces.get(EXAMPLE, input_shape=(64, 64, 3), num_classes=5)
    assert (space.name, space.input_shape, space.num_classes) == ("example", (64, 64, 3), 5)
    # Row by row; a skipped group counts once.
    assert space.num_architectures == 8 * 54 * (6 + 1) * 8 * 3
    assert [block.repeats for block in space.blocks] == [1, 1, 2, 1, 1]
    architecture = space.architecture(space.cardinalities - 1)
    assert len(architecture.blocks) == 6
    assert architecture.blocks[2] == architecture.blocks[3]


def test_space_from_python(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PYTHON_SPACE)
    space = spaces.get(str(file), input_shape=(16, 16, 1), num_classes=4)
    assert (space.num_architectures, space.input_shape) == (4, (16, 16, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("head"), "the space lacks the key `head`"),
        (lambda d: d.update(format=2), "`format` must be 1"),
        (lambda d: d.update(blocks={}), "`blocks` must be a list"),
        (lambda d: d.update(blocks=[]), "must have 1 to 1000 blocks"),
        (lambda d: d["blocks"][1].update(kernel=3), "`blocks.1.` has the unknown key `kernel`"),
        (lambda d: d["blocks"][1].pop("filters"), "`blocks.1.` lacks the key `filters`"),
        (lambda d: d["blocks"][1].update(filters=16), "in `blocks.1.`: `filters` must be a list"),
        (lambda d: d["blocks"][1].update(filters="same"), "`filters` must be a list"),
        (lambda d: d["blocks"][1].update(filters=[[16]]), "`filters` must be an integer"),
        (lambda d: d["blocks"][1].update(skip=[0]), "`skip` must be true or false"),
        (lambda d: d["blocks"][4].update(operation=[1]), "`operation` must be a list of objects"),
        (lambda d: d["blocks"][4].update(operation=3), "`operation` must be a list of objects"),
        (lambda d: d["blocks"][4].update(operation={}), "`operation` must be a list of objects"),
        (lambda d: d["blocks"][4].update(operation=[]), "`operation` must set some of"),
        (lambda d: d["blocks"][1].update(splits=[0, 1, 2.0]), "`splits` must be one of 0, 1, 2, 4"),
        (lambda d: d["blocks"][2].update(repeats=True), "`repeats` must be an integer"),
        (
            lambda d: d.update(blocks=[{"filters": [8], "repeats": 600}] * 2),
            "must have 1 to 1000 blocks. Received: 1200 blocks",
        ),
        (
            lambda d: d["blocks"][4].update(operation=[{"kernel_size": [3]}]),
            "in `blocks.4.`: `kernel_size` must be an integer",
        ),
        (lambda d: d["stem"].update(filters=0), "in `stem`: `filters` must be an integer"),
    ],
)
def test_bad_space_files_are_refused_by_key(tmp_path, change, message):
    content = json.loads(EXAMPLE.read_text())
    change(content)
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        spaces.get(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "must have a function `space"),
        ("def space(input_shape, num_classes): return 3", "must have a function `space"),
        ("def space(): pass", "fails: TypeError"),
        ("1 / 0", "fails: ZeroDivisionError"),
        ("import sys; sys.exit(3)", "fails: SystemExit"),
        (
            PYTHON_SPACE.replace("blocks, Head", "[3], Head"),
            "`blocks` of a space must be a list of SearchBlock",
        ),
        (PYTHON_SPACE.replace("Stem(8)", "8"), "`stem` of a space must be a Stem"),
        (PYTHON_SPACE.replace("num_classes, Stem", "7, Stem"), "must make a space for images of"),
    ],
)
def test_bad_python_spaces_are_refused(tmp_path, text, message):
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        spaces.get(str(file))
    with pytest.raises(ValueError, match="there is no such file"):
        spaces.get(str(tmp_path / "nonesuch.py"))


def test_a_file_does_not_take_the_name_of_another_space(tmp_path):
    file = tmp_path / "fpnas.json"
    file.write_text(EXAMPLE.read_text())
    with pytest.raises(ValueError, match="must not have the name of a built-in space"):
        spaces.get(file)


def test_blocks_that_share_their_choices_must_be_equal():
    space = spaces.get("fbnetv2_f")
    architecture = space.architecture(0 * space.cardinalities)
    blocks = list(architecture.blocks)
    blocks[3] = dataclasses.replace(blocks[3], kernel_size=5)
    foreign = dataclasses.replace(architecture, blocks=tuple(blocks))
    with pytest.raises(ValueError, match="where it shares the choices of block 2"):
        space.choices(foreign)


@pytest.mark.parametrize(
    ("name", "blocks", "rows", "least", "largest"),
    [
        ("fbnet_c", 22, 22, 50e6, 573e6),
        ("fbnetv2_f", 18, 10, 25e6, 429e6),
        ("fbnetv2_f_fine", 18, 18, 25e6, 429e6),
        ("fpnas", 28, 28, 51e6, 3032e6),
        ("mobilenet_v3", 21, 21, 121e6, 566e6),
    ],
)
def test_large_spaces_have_the_sizes_they_say(name, blocks, rows, least, largest):
    space = spaces.get(name, input_shape=(224, 224, 3), num_classes=1000)
    space_cost = SpaceCost(space, MacsCost())
    assert len(space.blocks) == rows
    assert len(space.architecture(0 * space.cardinalities).blocks) == blocks
    assert space_cost.least() == pytest.approx(least, rel=0.02)
    assert space_cost.largest() == pytest.approx(largest, rel=0.002)


@settings(max_examples=20)
@given(st.sampled_from(spaces.names()), st.integers(0, 2**32 - 1))
def test_every_space_reads_its_own_architectures(name, seed):
    space = spaces.get(name)
    choices = random_choices(space, np.random.default_rng(seed))
    assert np.array_equal(space.choices(space.architecture(choices)), choices)


def one_of_each_operation():
    """A space with compound variables, also in blocks that share them."""
    operations = ({"skip": True}, {"kernel_size": 3, "splits": 1}, {"kernel_size": 5, "splits": 0})
    blocks = [
        SearchBlock(filters=(8, 12), strides=2, operation=operations[1:]),
        SearchBlock(filters=(SAME,), operation=operations, repeats=2),
        SearchBlock(filters=(12, 8), operation=operations[:2]),
    ]
    return Space("operations", (9, 7, 1), 3, Stem(8), blocks, Head(16))


@pytest.mark.parametrize(
    "space", [make_tiny_space(), make_tiny_space(blocks=3), one_of_each_operation()]
)
def test_parts_are_the_union_of_those_of_all_architectures(space):
    found = list(space.parts())
    entries = np.stack(
        np.unravel_index(np.arange(space.num_architectures), space.entries.counts), -1
    )
    expected = set()
    for choices in space.entries.to_choices(entries):
        expected.update(space.architecture(choices).parts())
    assert set(found) == expected
    assert len(found) == len(expected)
    assert found[0].layers == space.stem
    heads = [part for part in found if part.layers == space.head]
    assert found[-len(heads) :] == heads
    assert found == list(space.parts())


@settings(max_examples=50)
@given(st.lists(BLOCKS, min_size=1, max_size=3), st.integers(0, 99))
def test_entries_to_choices_and_back(search_blocks, seed):
    entries = Entries(search_blocks)
    drawn = np.random.default_rng(seed).integers(0, entries.counts, (2, 5, len(search_blocks)))
    choices = entries.to_choices(drawn)
    assert np.array_equal(entries.from_choices(choices), drawn)
    for index, search_block in enumerate(search_blocks):
        assert np.array_equal(choices[..., index, :], search_block.entries[drawn[..., index]])
    flat = entries.choices.reshape(-1, choices.shape[-1])[drawn + entries.offsets]
    assert np.array_equal(flat, choices)
    assert np.array_equal(entries.mask.sum(axis=1), entries.counts)


def test_choices_that_are_no_entry_are_refused():
    space = spaces.get("nas_bench_macro")
    choices = space.entries.to_choices(np.zeros(8, int))
    choices[0] = [0, 0, 1, 0, 0, 0]  # Kernel size 5 with expansion 3 is none of the operations.
    with pytest.raises(ValueError, match="must be choices of entries"):
        space.entries.from_choices(choices)


def test_architectures_spaces_and_costs_load_without_tensorflow():
    modules = "fpnas_keras.architecture, fpnas_keras.cost.costs, fpnas_keras.spaces as spaces"
    code = f"import sys, {modules}; spaces.get('fpnas').entries; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "numpy" in loaded
    assert not {"tensorflow", "keras"} & set(loaded)
