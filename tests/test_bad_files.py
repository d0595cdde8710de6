"""Files that are not what they should be: one line of error, never another exception."""

import contextlib
import copy
import json
import os
import re

import numpy as np
import pytest
from helpers import ROOT, make_tiny_space, write_latency_table
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fpnas_keras as fpnas
from fpnas_keras.cost import SpaceCost
from fpnas_keras.search import SearchSettings

SPACE = make_tiny_space()
ARCHITECTURE = SPACE.architecture(np.zeros(SPACE.cardinalities.shape, int)).to_dict()
SPACE_FILE = json.loads((ROOT / "configs" / "spaces" / "example.json").read_text())
QUICK = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**30)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([1e308, -(10**400), "relu", "same"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def places(data, path=()):
    """All paths into nested JSON."""
    yield path
    inner = data.items() if isinstance(data, dict) else enumerate(data) if _is_list(data) else ()
    for key, value in inner:
        yield from places(value, (*path, key))


def _is_list(data):
    return isinstance(data, list | tuple)


@st.composite
def changed(draw, data):
    """The text of a file with one or two places changed, removed, doubled or cut off."""
    data = json.loads(json.dumps(data))
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from([each for each in places(data) if each]))
        target = data
        for key in path:
            target = target[key]
        if draw(st.booleans()):
            target[last] = draw(values)
        elif isinstance(target, dict):
            target[draw(st.text(max_size=5))] = target.pop(last)
        else:
            target.append(copy.deepcopy(target[last]))
    text = json.dumps(data)
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 5)) == 0 else text


DEEP = "[" * 100_000
DOUBLE = '{"format": 1, "format": 1}'
LINE_BREAK = '{"format": 1, "a\\nb": 1}'


def check(path, text, read):
    """Success, or a `ValueError` in one line; the file stays as it was."""
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    before = path.read_bytes()
    try:
        read(path)
    except ValueError as error:
        assert "\n" not in str(error).strip()
        assert str(error).strip()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@QUICK
@example(DEEP)
@example(DOUBLE)
@example(LINE_BREAK)
@given(changed(ARCHITECTURE))
def test_architecture_files(tmp_path, text):
    def read(path):
        architecture = fpnas.Architecture.load(path)
        architecture.macs(), architecture.params()

    check(tmp_path / "a.json", text, read)


@QUICK
@example(DEEP)
@example(DOUBLE)
@example(LINE_BREAK)
@given(changed(SPACE_FILE))
def test_space_files(tmp_path, text):
    check(tmp_path / "s.json", text, lambda path: fpnas.spaces.get(str(path), (8, 8, 1), 3))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "t.json"
    return json.loads(write_latency_table(path, SPACE, lambda part: 0.1).read_text())


@QUICK
@example(data=None)
@given(st.data())
def test_latency_tables(tmp_path, table, data):
    def read(path):
        SpaceCost(SPACE, fpnas.LatencyCost(str(path)))

    check(tmp_path / "t.json", data.draw(changed(table)) if data else DEEP, read)


flag_lines = st.one_of(
    st.text(max_size=30),
    st.builds(
        "--{}={}".format,
        st.sampled_from(["epochs", "space", "target", "flagfile", "cost", "seed", "nonesuch"]),
        st.text(max_size=10) | st.integers() | st.floats(),
    ),
)


@QUICK
@given(st.lists(flag_lines, max_size=5).map("\n".join) | st.binary(max_size=60))
def test_flag_files(tmp_path, content):
    path = tmp_path / "x.flags"
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    with contextlib.suppress(fpnas.UserError):
        SearchSettings.from_flags([f"--flagfile={path}", "--output_dir=x"])
    assert path.read_bytes() == data


def test_the_table_of_faults_names_tests_that_exist():
    text = (ROOT / "docs" / "faults.md").read_text()
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", text)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / f"{file}.py").read_text(), test
