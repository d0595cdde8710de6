import json

import numpy as np
import pytest
import tensorflow as tf
from helpers import all_choices, all_entries, random_choices, write_latency_table

from fpnas_keras import Architecture, FileSizeCost, LatencyCost, MacsCost, ParamsCost, spaces
from fpnas_keras.architecture import Block, Head, Part, Stem, count_part
from fpnas_keras.cost import SpaceCost, latency_table, make_cost
from fpnas_keras.cost.costs import count_contents
from fpnas_keras.method.distributions import FactorizedLogits

COSTS = [
    (MacsCost, Architecture.macs),
    (ParamsCost, Architecture.params),
    (FileSizeCost, lambda architecture: sum(map(FileSizeCost(), architecture.parts()))),
]


@pytest.mark.parametrize(("cost", "method"), COSTS)
def test_costs_in_the_graph_are_exact(cost, method):
    space = spaces.get("mobile_mini", input_shape=(96, 96, 3), num_classes=7)
    rng = np.random.default_rng(0)
    choices = np.array([random_choices(space, rng) for _ in range(100)], np.int32)
    entries = space.entries.from_choices(choices)
    costs = tf.function(SpaceCost(space, cost()))(tf.constant(entries))
    expected = [method(space.architecture(each)) for each in choices]
    assert costs.dtype == tf.float64
    np.testing.assert_allclose(costs, expected, rtol=1e-15 if cost is FileSizeCost else 0)


@pytest.mark.parametrize(("cost", "method"), COSTS)
def test_expectation_and_extremes_are_those_of_an_enumeration(tiny_space, cost, method):
    space_cost = SpaceCost(tiny_space, cost())
    distribution = FactorizedLogits(tiny_space)
    distribution.logits.assign(tf.random.stateless_normal(distribution.logits.shape, (1, 2)))
    choices = all_choices(tiny_space)
    costs = np.array([method(tiny_space.architecture(each)) for each in choices])
    log_p = distribution.log_prob(tf.constant(all_entries(tiny_space))).numpy()
    p = np.exp(log_p.astype(np.float64))
    assert float(space_cost.expected(distribution.entry_probabilities())) == pytest.approx(
        (p * costs).sum(), rel=1e-5
    )
    extremes = space_cost.least(), space_cost.largest()
    rounding = 1e-14 if cost is FileSizeCost else 0  # The others are whole numbers.
    np.testing.assert_allclose(extremes, (costs.min(), costs.max()), rtol=rounding)


@pytest.mark.parametrize("target", [0, -1, float("nan"), float("inf")])
def test_targets_must_be_positive(target):
    with pytest.raises(ValueError, match="`target` must be above 0 MACs"):
        MacsCost(target=target)


def test_a_latency_needs_a_table():
    with pytest.raises(ValueError, match="needs `table`, a latency table"):
        make_cost("latency", target=1.0)


def test_what_a_file_contains_follows_from_the_layers():
    def nonzero(layers, channels, num_classes=0):
        counts = count_contents(Part(layers, (16, 16), channels, num_classes))
        return {name: count for name, count in counts.items() if count}

    stem = Stem(8, kernel_size=3, activation="hard_silu")
    assert nonzero(stem, 3) == {"weight": 27 * 8, "channel": 8, "kernel": 1, "hard_silu": 1}
    assert nonzero(Block(8, skip=True), 8) == {}
    projection = {"weight": 8 * 12, "channel": 12, "kernel": 1}
    assert nonzero(Block(12, skip=True), 8) == projection
    # Expand, depthwise, reduce and expand of the attention, project.
    weights = 8 * 32 + 9 * 32 + 2 * 8 * 32 + 32 * 16
    assert nonzero(Block(16, expansion=4, splits=1), 8) == {
        **{"weight": weights, "channel": 3 * 32 + 8 + 16, "kernel": 5},
        "squeeze_excite": 1,
    }
    block = Block(16, expansion=4, activation="hard_silu", splits=2)
    assert nonzero(block, 8) == {
        **{"weight": weights + 9 * 32 + 8 * 32, "channel": 5 * 32 + 8 + 16, "kernel": 7},
        **{"hard_silu": 3, "2_splits": 1},
    }
    assert nonzero(Head(24, "hard_silu", dense_units=12), 16, num_classes=5) == {
        **{"weight": 16 * 24 + 24 * 12 + 12 * 5, "channel": 24 + 12 + 5, "kernel": 3},
        **{"hard_silu": 2, "class": 5, "file": 1},
    }


def some_milliseconds(part):
    """Milliseconds that depend on everything that a part computes, as on a device."""
    return 1e-6 * count_part(part).macs + 1e-5 * len(latency_table.names(part)[0])


def test_latency_is_the_sum_of_the_entries_in_the_graph_too(tiny_space, tmp_path):
    cost = LatencyCost(write_latency_table(tmp_path / "table.json", tiny_space, some_milliseconds))
    choices = all_choices(tiny_space)[::50]
    expected = [
        sum(
            some_milliseconds(part)
            for part in tiny_space.architecture(each).parts()
            if latency_table.names(part)
        )
        for each in choices
    ]
    entries = tiny_space.entries.from_choices(choices)
    costs = tf.function(SpaceCost(tiny_space, cost))(tf.constant(entries))
    np.testing.assert_allclose(costs, expected, rtol=1e-12)
    own = [sum(map(cost, tiny_space.architecture(each).parts())) for each in choices]
    np.testing.assert_allclose(own, expected, rtol=1e-12)


def test_parts_have_the_same_name_if_they_compute_the_same(tiny_space):
    by_name = {}
    for space in (tiny_space, spaces.get("mobile_mini"), spaces.get("fbnetv2_f", (64, 64, 3))):
        rng = np.random.default_rng(0)
        for _ in range(30):
            for part in space.architecture(random_choices(space, rng)).parts():
                for name in latency_table.names(part):
                    by_name.setdefault(name, set()).add(count_part(part))
    assert all(len(counts) == 1 for counts in by_name.values())
    base = {"filters": 24, "kernel_size": 3, "expansion": 3, "strides": 2}
    changes = (
        *({"filters": 16}, {"kernel_size": 5}, {"expansion": 1}, {"expansion": 6}, {"strides": 1}),
        *({"activation": "hard_silu"}, {"splits": 1}, {"splits": 2}, {"skip": True}),
    )
    blocks = [Block(**base), *(Block(**base | change) for change in changes)]
    names = {latency_table.names(Part(block, (8, 8), 16))[0] for block in blocks}
    assert len(names) == len(blocks)
    assert latency_table.names(Part(Block(16, skip=True), (8, 8), 16)) == []


def test_a_table_that_lacks_parts_of_the_space_is_refused_with_their_names(tmp_path, tiny_space):
    table = write_latency_table(tmp_path / "table.json", tiny_space, some_milliseconds)
    other = spaces.get("mobile_mini", (16, 16, 1), 10)
    with pytest.raises(ValueError, match=r"lacks \d+ parts .*`mobile_mini`.*: stem 16x16x1 k3 f16"):
        SpaceCost(other, LatencyCost(table))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"complete": False}, "is not finished"),
        (
            {"entries": {"stem": -1.0}},
            "`entries` must be milliseconds of at least 0. Received: 'stem': -1",
        ),
        ({"entries": {"stem": "1"}}, "Received: 'stem': '1'"),
        ({"entries": {"stem": True}}, "Received: 'stem': True"),
        ({"entries": [1]}, r"`entries` must be an object with keys. Received: \[1\]"),
        ({"format": 2}, "`format` must be 1"),
        ({"device": "Pixel 8"}, "`device` must be an object with .*Received: device='Pixel 8'"),
        ({"device": {"name": "Pixel 8", "threads": 1}}, "with the keys kind, name, threads"),
        ({"more": 1}, "unknown key `more`"),
    ],
)
def test_tables_that_are_none_are_refused(tmp_path, tiny_space, changes, message):
    path = write_latency_table(tmp_path / "t.json", tiny_space, some_milliseconds, **changes)
    with pytest.raises(ValueError, match=message) as error:
        LatencyCost(path)
    assert "t.json" in str(error.value)


# A network that all kinds of published tables can name.
PUBLISHED = Architecture(
    (32, 32, 3),
    10,
    Stem(16, 3, 2),
    (Block(24, 5, 3, 2, "relu6"), Block(24, skip=True), Block(24, 3, 6)),
    Head(64),
)
TABLES = {
    "mobile_trim.yaml": {
        "Conv-input:32x32x3-output:16x16x16": 1,
        "expanded_conv-input:16x16x16-output:8x8x24-expand:3-kernel:5-stride:2-idskip:0": 2,
        "expanded_conv-input:8x8x24-output:8x8x24-expand:6-kernel:3-stride:1-idskip:1": 4,
        "Conv_1-input:8x8x24-output:8x8x64": 8,
        "Logits-input:8x8x64-output:10": 16,
    },
    "note10.yaml": {
        "Conv-input:32x32x3-output:16x16x16": 1,
        "expanded_conv-input:16x16x16-output:8x8x24-"
        "expand:48-kernel:5-stride:2-idskip:0-se:0-hs:0": 2,
        "expanded_conv-input:8x8x24-output:8x8x24-"
        "expand:144-kernel:3-stride:1-idskip:1-se:0-hs:0": 4,
        "Conv_1-input:8x8x24-output:8x8x64": 8,
        "AvgPool2D-input:8x8x64-output:1x1x64": 7,
        "Logits-input:1x1x64-output:10": 9,
    },
    "224_lookup_table.yaml": {
        "first_conv-input:32x32x3-output:16x16x16": 1,
        "MBConv-input:16x16x16-output:8x8x24-expand:3-kernel:5-stride:2-idskip:0-se:0": 2,
        "MBConv-input:8x8x24-output:8x8x24-expand:6-kernel:3-stride:1-idskip:1-se:0": 4,
        "final_expand_layer-input:8x8x24-output:8x8x64": 8,
        "classifier-input:64-output:10": 16,
    },
}


@pytest.mark.parametrize("name", TABLES)
def test_published_tables(tmp_path, name):
    entries = TABLES[name]
    path = tmp_path / name
    path.write_text("".join(f"{key}: {{count: 3, mean: {ms}}}\n" for key, ms in entries.items()))
    assert sum(map(LatencyCost(path), PUBLISHED.parts())) == 31
    path = tmp_path / "table.csv"
    path.write_text("name,mean\n" + "".join(f"{key},{ms}\n" for key, ms in entries.items()))
    assert sum(map(LatencyCost(path), PUBLISHED.parts())) == 31
    # As Windows and Excel leave them, and as JSON.
    marked = tmp_path / "TABLE.CSV"
    marked.write_text(path.read_text(), encoding="utf-8-sig")
    assert sum(map(LatencyCost(marked), PUBLISHED.parts())) == 31
    as_json = tmp_path / "table.json"
    as_json.write_text(json.dumps({key: {"mean": ms, "count": 3} for key, ms in entries.items()}))
    assert sum(map(LatencyCost(as_json), PUBLISHED.parts())) == 31
    # What is missing is named as it is in that table.
    with pytest.raises(ValueError, match=r"lacks \d+ parts .*: (Conv|first_conv)-input:64x64x3"):
        SpaceCost(spaces.get("mobilenet_v3", (64, 64, 3)), LatencyCost(path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.yaml", "a: [1", "is not a latency table: while parsing"),
        ("t.yaml", "a: 1", "`name: {mean: milliseconds}`"),
        ("t.yaml", "!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("t.yaml", "Conv-input:1: {mean: .nan}", "`mean` must be milliseconds"),
        ("t.yaml", "Conv-input:1: {mean: 1}", "no entry is named"),
        ("t.csv", "a,b\n1,2", "columns name and mean"),
        ("t.csv", "name,mean\na,b", "could not convert"),
        ("t.csv", "name,mean\na,1\nb\n", "line 3 must have the columns name, mean. Received: b"),
        ("t.csv", "name,mean\nConv-input:1,1\nConv-input:1,2\n", "line 3: Conv-input:1 stands"),
        ("t.yaml", "a: {mean: 1}\nb: {mean: 1}\na: {mean: 2}", "line 3: a stands twice"),
        ("t.yaml", "MBConv-input:1: {mean: 0}", "`mean` must be above 0"),
        ("t.json", '{"MBConv-input:1": {"mean": 0}}', "`mean` must be above 0"),
        ("t.json", '{"MBConv-input:1": {"mean": 1, "mean": 2}}', "mean stands twice"),
        ("t.yaml", "[1]: {mean: 1}", "unhashable"),
        ("none.csv", None, "cannot read the latency table"),
    ],
)
def test_bad_published_tables_are_refused(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        LatencyCost(tmp_path / name)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert name in str(error.value)
