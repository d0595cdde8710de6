"""Settings of the jobs, and the flags made from them."""

import dataclasses
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import pytest
from helpers import ROOT, environment
from hypothesis import given
from hypothesis import strategies as st

import fpnas_keras as fpnas
from export.latency import LatencySettings
from export.tflite import TfliteSettings
from fpnas_keras import __main__ as fpnas_command
from fpnas_keras.building.settings import BuildSettings
from fpnas_keras.errors import UserError
from fpnas_keras.files import find_file
from fpnas_keras.rank import RankSettings
from fpnas_keras.report.__main__ import ReportSettings
from fpnas_keras.search import SearchSettings
from fpnas_keras.settings import Settings, flag_values, setting
from fpnas_keras.train import TrainSettings

JOBS = {
    SearchSettings: {"output_dir": "x"},
    TrainSettings: {"output_dir": "x", "architecture": "a.json"},
    RankSettings: {"search_dir": "x"},
    ReportSettings: {"run_dir": "x"},
    TfliteSettings: {"model": "m.keras"},
    LatencySettings: {"space": "mobile_mini", "output": "t.json"},
    BuildSettings: {"target": "8M", "output_dir": "x"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Settings):
    """Settings of every kind."""

    name: str = setting("A name.")
    count: int = setting("A count.", 3, least=1, most=9)
    rate: float = setting("A rate.", 0.5, least=0)
    maximum: float | None = setting("A maximum.", None)
    on: bool = setting("A switch.", True)
    kind: str = setting("A kind.", "a", choices=("a", "b"))
    files: tuple[str, ...] = setting("Files.", ())


EXAMPLES = st.builds(
    Example,
    name=st.text("abc=, -ü", max_size=8).map("x".__add__),
    count=st.integers(1, 9),
    rate=st.floats(0, 1e300),
    maximum=st.none() | st.floats(-1e300, 1e300),
    on=st.booleans(),
    kind=st.sampled_from("ab"),
    files=st.lists(st.text("abc/.", min_size=1), max_size=3).map(tuple),
)


@given(EXAMPLES)
def test_flags_give_the_same_settings_again(example):
    assert Example.from_flags(example.to_flags()) == example
    names = {field.name for field in dataclasses.fields(example)}
    assert Example.from_flags([f"--name={example.name}", *example.to_flags()]) == example
    assert flag_values(example.to_flags()).keys() == names - (
        {"maximum"} if example.maximum is None else set()
    )


def test_settings_of_another_job_are_flags_of_their_own():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Outer(Settings):
        inner: Mapping[str, Any] | None = setting("I.", None, of=Example, without={"name"})

    outer = Outer(inner={"count": 4, "on": False, "files": ["a"], "maximum": 1})
    assert outer.inner == {"count": 4, "on": False, "files": ("a",), "maximum": 1.0}
    assert outer.to_flags() == [
        "--inner.count=4",
        "--inner.files=a",
        "--inner.maximum=1.0",
        "--noinner.on",
    ]
    assert Outer.from_flags(outer.to_flags()) == outer
    assert Outer.from_flags([]) == Outer(inner=None)
    for wrong, message in (
        ({"count": 0}, "`inner.count` must be an integer from 1 to 9. Received: inner.count=0"),
        ({"name": "n"}, "`inner.name` cannot be given"),
        ({"nonesuch": 1}, "`inner` must hold settings of Example. Received: inner.nonesuch=1"),
        (3, "`inner` must be a dict of settings by name. Received: inner=3"),
    ):
        with pytest.raises(UserError, match=message):
            Outer(inner=wrong)
    with pytest.raises(UserError, match=r"`inner.kind` must be one of a, b"):
        Outer.from_flags(["--inner.kind=c"])


def test_flags_stand_as_absl_writes_them():
    example = Example(name="n", rate=1e-3, on=False, files=["a.json", pathlib.Path("b.json")])
    assert example.to_flags() == [
        "--count=3",
        "--files=a.json,b.json",
        "--kind=a",
        "--name=n",
        "--noon",
        "--rate=0.001",
    ]
    assert example.to_arguments(["rate", "name", "count"]) == "--rate=0.001 --name=n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "`count` must be an integer from 1 to 9. Received: count=0"),
        ({"rate": 10**400}, "`rate` must be a finite number from 0. Received: rate=1000"),
        ({"count": 2.0}, "`count` must be an integer from 1 to 9. Received: count=2.0"),
        ({"count": True}, "`count` must be an integer from 1 to 9. Received: count=True"),
        ({"count": None}, "`count` must be an integer from 1 to 9. Received: count=None"),
        ({"rate": float("nan")}, "`rate` must be a finite number from 0. Received: rate=nan"),
        ({"maximum": "1"}, "`maximum` must be a finite number. Received: maximum=1"),
        ({"on": 1}, "`on` must be true or false. Received: on=1"),
        ({"kind": "c"}, "`kind` must be one of a, b. Received: kind=c"),
        ({"name": 3}, "`name` must be text. Received: name=3"),
        ({"files": "a"}, "`files` must be a list of texts. Received: files=a"),
        ({"files": [3]}, "`files` must be a list of texts. Received: files=[3]"),
        ({"files": ("a", None)}, "`files` must be a list of texts. Received: files=('a', None)"),
    ],
)
def test_bad_values_are_refused_by_name(changes, message):
    with pytest.raises(UserError) as caught:
        Example(**({"name": "n"} | changes))
    assert str(caught.value).startswith(message)


def test_lists_hold_paths_as_text():
    example = Example(name="n", files=(pathlib.Path("a.json"), "b.json"))
    assert example.files == ("a.json", "b.json")


def test_limits_are_written_in_full():
    with pytest.raises(UserError, match=r"from 0 to 4,294,967,295. Received: seed=-1"):
        RankSettings(search_dir="x", seed=-1)


def test_flags_and_python_refuse_with_the_same_message():
    for text, value in (("0", 0), ("10", 10), ("2.5", 2.5)):
        with pytest.raises(UserError) as by_flag:
            Example.from_flags(["--name=n", f"--count={text}"])
        with pytest.raises(UserError) as by_python:
            Example(name="n", count=value)
        assert str(by_flag.value) == str(by_python.value)


def test_settings_that_must_be_given_are_asked_for():
    with pytest.raises(UserError, match="--search_dir must be given: Directory of a finished"):
        RankSettings.from_flags([])


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_the_settings_of_every_job(job):
    """Flags give them again; every setting is described; a newcomer is shown a few."""
    settings = job(**JOBS[job])
    assert job.from_flags(settings.to_flags()) == settings
    basic = [field for field in dataclasses.fields(job) if field.metadata["basic"]]
    assert 1 <= len(basic) <= 7
    for field in dataclasses.fields(job):
        assert field.metadata["help"].endswith("."), field.name


def test_files_of_the_package_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("configs/quickstart.flags", "quickstart.flags"):
        assert find_file(name) == str(ROOT / "configs" / "quickstart.flags")
    settings = SearchSettings.from_flags(["--flagfile=configs/quickstart.flags"])
    assert (settings.target, settings.output_dir) == (4e5, "runs/quickstart")
    settings = SearchSettings.from_flags(["--flagfile=configs/flowers.flags"])
    assert settings.space == str(ROOT / "configs" / "spaces" / "photos_128.json")
    assert find_file("/configs/quickstart.flags") == "/configs/quickstart.flags"
    assert find_file("nonesuch.json") == "nonesuch.json"
    architecture = fpnas.Architecture.load("configs/architectures/mobilenet_v2.json")
    assert architecture.input_shape == (224, 224, 3)
    assert fpnas.spaces.get("configs/spaces/example.json").name == "example"
    # The user's own file goes first.
    (tmp_path / "quickstart.flags").write_text("--epochs=1")
    assert find_file("quickstart.flags") == "quickstart.flags"


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "fpnas_keras", "--help"],
        ["-m", "fpnas_keras", "--version"],
        ["-m", "fpnas_keras", "search", "--help"],
        ["-m", "fpnas_keras.train", "--help"],
        ["-m", "fpnas_keras", "build", "--help"],
        ["-m", "fpnas_keras", "build", "--target=8", "--output_dir=x"],
        ["-m", "export.tflite", "--help"],
        ["-m", "export.latency", "--epochs=1"],
        ["-m", "fpnas_keras.search", "--nonesuch"],
        ["-m", "fpnas_keras", "rank", "--samples=many", "--search_dir=x"],
        ["-c", "import fpnas_keras, fpnas_keras.spaces, fpnas_keras.architecture, export"],
    ],
    ids=" ".join,
)
def test_answers_come_without_tensorflow(arguments, tmp_path):
    """Neither TensorFlow nor Keras is imported; so it takes a fraction of a second."""
    for name in ("tensorflow", "keras"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    path = f"{tmp_path}:{ROOT}"
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=path),
    )
    assert "imported" not in result.stderr
    assert "Traceback" not in result.stderr
    bad = not {"--help", "--version", "-c"} & set(arguments)
    assert result.returncode == bad, result.stderr
    assert result.stderr.startswith("error: ") == bad
    assert time.monotonic() - start < 20


def test_the_console_command_names_its_commands(capsys):
    assert fpnas_command.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("build", "search", "train", "rank", "report", "export", "latency"):
        assert f"\n  {name} " in text
    assert fpnas_command.main(["evaluate"]) == 2
    assert "must be one of build, search, train" in capsys.readouterr().err
    assert fpnas_command.main(["search", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.index("Start with these") < text.index("--data=digits") < text.index("--seed=0")
    for field in dataclasses.fields(SearchSettings):
        assert text.count(f"--{field.name}") + text.count(f"--[no]{field.name}") >= 1
