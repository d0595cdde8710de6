"""The code blocks of README and docs run as they stand, on small data and for few steps.

Searches of `mobile_mini` for MACs search a small space instead. A block after the comment
`<!-- not run: reason -->` is only checked for its syntax and flags. `test_benchmarks.py` runs the
benchmarks. All pages share one folder: a run that two pages name is made once.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import shlex

import numpy as np
import pytest
from helpers import ROOT, SMALL_SPACE, run
from PIL import Image

import export.latency
import export.tflite
import fpnas_keras as fpnas
import fpnas_keras.building.build
import fpnas_keras.rank
import fpnas_keras.search
import fpnas_keras.train
from fpnas_keras import __main__ as fpnas_command
from fpnas_keras.building.settings import BuildSettings

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# These measure a latency table, and make five trainings.
SLOW = {"README.md", "latency.md", "python.md", "spaces.md", "training.md"}
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# It runs where TensorFlow and absl are not.
NOT_OF_ABSL = {"benchmarks/torch_trainings.py"}
# What makes each job short. Files that an earlier page wrote are replaced.
SHORT = {
    fpnas_keras.search: (
        "run_search",
        {"epochs": 2, "steps_per_epoch": 2, "warmup_steps": 1, "ranked_samples": 1},
    ),
    fpnas_keras.train: ("run_training", {"epochs": 1, "ema_momentum": 0.0}),
    fpnas_keras.rank: ("run_ranking", {"samples": 2, "evaluation_images": 100}),
    export.tflite: ("run_export", {"overwrite": True, "min_agreement": 0.0}),
    fpnas_keras.building.build: (
        "run_build",
        {
            "search": {"epochs": 1, "steps_per_epoch": 2, "warmup_steps": 1, "ranked_samples": 0},
            "train": {"epochs": 1},
            "export": {"min_agreement": 0.0, "max_accuracy_drop": 1.0},
            "input_size": 32,
            "time": None,
        },
    ),
    export.latency: (
        "run_measuring",
        {"rounds": 1, "network_seconds": 0.0, "max_entries": 50, "proof_networks": 5},
    ),
}


def smaller(settings, space_file):
    """A search of a small space instead of `mobile_mini`, for a cost that this one has."""
    if isinstance(settings, BuildSettings):
        return {"space": str(space_file), "target": "200k"}
    if (settings.space, settings.cost) != ("mobile_mini", "macs"):
        return {}
    channels = 1 if settings.data == "digits" else 3
    space = fpnas.spaces.get(space_file, (settings.input_size, settings.input_size, channels), 3)
    cost = fpnas.cost.SpaceCost(space, fpnas.MacsCost())
    return {"space": str(space_file), "target": (cost.least() * cost.largest()) ** 0.5}


def blocks(page):
    """Reason not to run it, language and code of each block."""
    return [found.group("reason", "language", "code") for found in BLOCK.finditer(page.read_text())]


def commands(code):
    """The words of each command of a block."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def commands_of_the_project(code):
    """The words of the commands among other lines of a shell script."""
    beginnings = ("fpnas ", "python -m ", "python benchmarks/")
    own = [line for line in code.splitlines() if line.startswith(beginnings)]
    return commands("\n".join(own))


def to_module(words):
    """The module that a command runs, and its flags; `None` for another program."""
    if words[0] == "fpnas":
        return fpnas_command.MODULES.get(words[1]), words[2:]
    if words[:2] == ["python", "-m"] and words[2].split(".")[0] in ("fpnas_keras", "export"):
        return words[2], words[3:]
    if words[1:] and words[1].startswith("benchmarks/") and words[1] not in NOT_OF_ABSL:
        return pathlib.Path(words[1]).stem, words[2:]
    return None, words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with 40 small photos of each of three classes."""
    folder = tmp_path_factory.mktemp("docs")
    rng = np.random.default_rng(0)
    for index, name in enumerate(("daisy", "rose", "tulip")):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(40):
            pixels = rng.integers(0, 100, (64, 64, 3))
            pixels[..., index] += 100
            photo = Image.fromarray(pixels.astype(np.uint8))
            photo.save(folder / "photos" / name / f"{number}.jpg")
    photo.save(folder / "new_photo.jpg")
    (folder / "small.json").write_text(json.dumps(SMALL_SPACE))
    return folder


@pytest.fixture
def shortened(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for module, (name, changes) in SHORT.items():
        function = getattr(module, name)

        def short(settings, function=function, changes=changes):
            if isinstance(settings, (fpnas_keras.search.SearchSettings, BuildSettings)):
                changes = changes | smaller(settings, folder / "small.json")
            return function(dataclasses.replace(settings, **changes))

        monkeypatch.setattr(module, name, short)


def run_words(words):
    """Runs one command, or fails."""
    module, arguments = to_module(words)
    if words[0] == "python" and words[1].startswith("benchmarks/"):
        assert (ROOT / words[1]).is_file()
    elif words[0] == "fpnas" and words[1].startswith("--"):
        assert fpnas_command.main(words[1:]) == 0
    else:
        assert module is not None, f"{shlex.join(words)}: say why it is not run"
        result = run(module, *arguments)
        assert result.returncode == 0, f"{shlex.join(words)}: {result.stderr}"


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow) if page.name in SLOW else page for page in PAGES],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_blocks_run(page, shortened):
    names = {"__name__": "__main__"}
    for reason, language, code in blocks(page):
        if reason is None and language == "python":
            exec(compile(code, page.name, "exec"), names)
        elif reason is None and language == "bash":
            for words in commands(code):
                run_words(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_that_are_not_run_are_valid(page, monkeypatch):
    """Python parses; commands of the project have flags that exist, with values in range."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for reason, language, code in blocks(page):
        if reason is None:
            continue
        if language == "python":
            compile(code, page.name, "exec")
        for words in commands_of_the_project(code) if language == "bash" else ():
            module, arguments = to_module(words)
            if module is not None:
                importlib.import_module(module).COMMAND.settings.from_flags(arguments)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.flags")), ids=lambda f: f.name)
def test_flag_files_are_valid(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = fpnas_keras.train if file.stem.endswith("_train") else fpnas_keras.search
    module.COMMAND.settings.from_flags([f"--flagfile={file}"])


def test_architectures_and_spaces_of_the_package_are_valid():
    for file in (ROOT / "configs" / "architectures").iterdir():
        assert fpnas.Architecture.load(file).macs() > 0
    for file in (ROOT / "configs" / "spaces").iterdir():
        assert fpnas.spaces.get(file, (64, 64, 3), 3).num_architectures > 1


def test_links_lead_to_files():
    for page in [*PAGES, ROOT / "BUILD.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in link:
                target = pathlib.Path(os.path.normpath(page.parent / link))
                assert target.exists(), f"{page.name}: {link}"
