import json

import pytest
from helpers import counted_macs, make_tiny_space
from hypothesis import given, settings
from hypothesis import strategies as st

from fpnas_keras import spaces
from fpnas_keras.architecture import (
    ACTIVATIONS,
    SPLITS,
    Architecture,
    Block,
    Head,
    Stem,
    make_divisible,
)

BLOCKS = st.builds(
    Block,
    filters=st.integers(1, 40),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    expansion=st.one_of(st.just(1), st.floats(0.3, 6)),
    strides=st.integers(1, 2),
    activation=st.sampled_from(ACTIVATIONS),
    splits=st.sampled_from(SPLITS),
    skip=st.booleans(),
)
ARCHITECTURES = st.builds(
    Architecture,
    input_shape=st.tuples(st.integers(5, 33), st.integers(5, 33), st.sampled_from([1, 3])),
    num_classes=st.integers(2, 11),
    stem=st.builds(Stem, st.integers(1, 24), st.sampled_from([1, 3, 5]), st.integers(1, 2)),
    blocks=st.lists(BLOCKS, min_size=1, max_size=4),
    head=st.builds(
        Head, st.integers(1, 50), st.sampled_from(ACTIVATIONS), st.none() | st.integers(1, 20)
    ),
    space=st.none() | st.just("somewhere"),
)


@settings(max_examples=40)
@given(ARCHITECTURES)
def test_macs_and_params_are_those_of_the_built_model(architecture):
    model = architecture.build()
    assert architecture.macs() == counted_macs(model)
    assert architecture.params() == sum(
        w.value.shape.num_elements() for w in model.trainable_weights
    )
    assert model.output_shape == (None, architecture.num_classes)


@settings(max_examples=100)
@given(ARCHITECTURES)
def test_json_round_trip(architecture):
    assert Architecture.from_dict(json.loads(json.dumps(architecture.to_dict()))) == architecture


@pytest.mark.parametrize(
    ("value", "expected"), [(1, 8), (11, 16), (12, 16), (20, 24), (19, 24), (83, 80), (90, 88)]
)
def test_make_divisible_is_mobilenets(value, expected):
    assert make_divisible(value) == expected


def test_what_skip_makes_irrelevant_does_not_tell_blocks_apart():
    one = Block(16, 5, 6.0, 1, "hard_silu", 1, skip=True)
    other = Block(16, skip=True)
    assert one == other
    assert one != Block(24, skip=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("head"), "lacks the key `head`"),
        (lambda d: d.update(extra=1), "unknown key `extra`"),
        (lambda d: d.update(format=2), "`format` must be 1. Received: format=2"),
        (lambda d: d.update(blocks=[]), "`blocks` must hold"),
        (lambda d: d.update(blocks={}), "`blocks` must be a list"),
        (lambda d: d.update(input_shape=[8, 8]), "`input_shape` must be"),
        (lambda d: d.update(num_classes=1e400), "`num_classes` must be"),
        (lambda d: d.update(space=3), "`space` must be"),
        (lambda d: d["stem"].update(filters=0), "in `stem`: `filters` must be"),
        (lambda d: d["blocks"][1].pop("splits"), "`blocks[1]` lacks the key `splits`"),
        (
            lambda d: d["blocks"][0].update(kernel_size=4),
            "in `blocks[0]`: `kernel_size` must be odd",
        ),
        (lambda d: d["blocks"][0].update(activation="gelu"), "`activation` must be one of relu"),
        (lambda d: d["blocks"][0].update(activation=["relu"]), "`activation` must be one of"),
        (lambda d: d["blocks"][0].update(expansion=10**400), "`expansion` must be a number"),
        (lambda d: d["blocks"][0].update(splits=3), "`splits` must be one of 0, 1, 2, 4"),
        (lambda d: d["blocks"][0].update(splits=True), "`splits` must be one of 0, 1, 2, 4"),
        (lambda d: d["blocks"][0].update(expansion=True), "`expansion` must be a number"),
        (lambda d: d["blocks"][0].update(expansion=float("nan")), "`expansion` must be a number"),
        (lambda d: d["blocks"][0].update(skip=1), "`skip` must be true or false"),
        (lambda d: d["blocks"][0].update(filters=10**30), "`filters` must be an integer"),
        (lambda d: d["head"].update(dense_units="8"), "`dense_units` must be an integer"),
    ],
)
def test_bad_files_are_refused_by_key(tmp_path, change, message):
    space = make_tiny_space()
    architecture = space.architecture(0 * space.cardinalities)
    data = architecture.to_dict()
    change(data)
    path = tmp_path / "architecture.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="is not an architecture file") as error:
        Architecture.load(path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": 1, "format": 1}', "`format` appears twice"),
        ("[1]", "must be an object"),
        ("\udcff", "codec can't decode"),
    ],
)
def test_files_that_are_no_architecture(tmp_path, text, message):
    path = tmp_path / "architecture.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"architecture\.json") as error:
        Architecture.load(path)
    assert message in str(error.value)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "architecture.json"
    space = spaces.get("mobile_mini")
    architecture = space.architecture(0 * space.cardinalities)
    architecture.save(path)
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        architecture.save(path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["architecture.json"]
