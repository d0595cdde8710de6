"""The same images, machine and time: `fpnas build`, a network by hand, Keras Tuner, AutoKeras.

python benchmarks/build.py --folder=FOLDER --lite0=NPZ

For each number of photos a class, on one core and for --time: `fpnas build`; MobileNetV3-Small at
the largest width within the target, trained by `fpnas train` for as long, with and without a
pretrained teacher (EfficientNet-Lite0); Hyperband of Keras Tuner over widths of MobileNetV3-Small;
AutoKeras' `ImageClassifier`. The last two run in environments that the script makes, and are left
out with a line where one cannot be installed. Every file is run on the test images, and the int8
file is timed. One method runs after the other. Finished rows are appended to --output.
"""

import contextlib
import dataclasses
import inspect
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import few_photos
import harness
import numpy as np
import rivals

from export import conversion, devices, export_tflite
from fpnas_keras import data
from fpnas_keras.building import planning
from fpnas_keras.building.build import run_build
from fpnas_keras.building.settings import BuildSettings
from fpnas_keras.building.targets import parse_time
from fpnas_keras.commands import run_command
from fpnas_keras.published import scale_published
from fpnas_keras.settings import setting
from fpnas_keras.train import TrainSettings, run_training

# What the environments of the others hold. AutoKeras 3.0 fails with later versions of Keras.
REQUIREMENTS = {
    "keras_tuner": harness.KERAS_TUNER,
    "autokeras": ("autokeras==3.0.0", "tensorflow-cpu==2.21.0", "tensorboard", "keras==3.10.0"),
}
NAMES = {
    "build": "fpnas build",
    "by_hand": "MobileNetV3-Small by hand",
    "by_hand_taught": "the same with a pretrained teacher",
    "keras_tuner": "Keras Tuner (Hyperband), MobileNetV3-Small",
    "autokeras": "AutoKeras",
}
# The files of each method.
FLOAT, INT8 = "judged.tflite", "judged_int8.tflite"
# Time for the files, of all time.
_EXPORT_SECONDS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildBenchmarkSettings(few_photos.FewPhotosSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        **few_photos.FewPhotosSettings.SMOKE,
        "photos": ("60",),  # The smallest number that was measured; the stand-ins are 16.
        "methods": ("build", "by_hand"),
        "time": "8m",
    }

    output: str = harness.output_setting("build.jsonl")
    photos: tuple[str, ...] = setting("Training photos of each class.", ("60", "400"))
    classes: int = setting("Number of classes, the first in their order.", 5, least=2)
    target: float = setting("What the networks may cost, in MACs.", 2e6, least=0)
    time: str = setting("Time of each method, on one core.", "15m")
    methods: tuple[str, ...] = setting("What to compare.", tuple(NAMES))
    method: str | None = setting("Run this method alone.", None, choices=tuple(NAMES))
    seed: int = setting("Seed.", 0, least=0)
    picture: str | None = setting("File of the picture, a PNG.", None)

    @property
    def seconds(self) -> float:
        """Time of each method."""
        return parse_time(self.time)

    def row_name(self, folder: pathlib.Path, method: str) -> str:
        """Name of the row of a method on a folder of photos."""
        return f"{folder.name} {self.time} {method} {self.seed}"


def run_method(settings: BuildBenchmarkSettings, folder: pathlib.Path) -> dict[str, Any]:
    """Runs `settings.method` on a folder of photos, and gives its row."""
    runs = harness.Runs(settings)
    directory = runs.directory(settings.row_name(folder, settings.method))
    # Of an interrupted run: going on with it would not take the time of a whole one.
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    start = time.monotonic()
    if settings.method == "build":
        lines = _build(settings, folder, directory)
    elif settings.method in REQUIREMENTS:
        lines = _run_rival(settings, folder, directory)
    else:
        lines = _train_by_hand(settings, folder, directory)
    return {"directory": str(directory), "seconds": time.monotonic() - start, "lines": lines}


def _build(settings, folder, directory):
    short = {}
    if settings.smoke:
        search = {"epochs": 1, "steps_per_epoch": 2, "warmup_steps": 1, "ranked_samples": 0}
        short = {"space": settings.space, "search": search, "train": {"epochs": 1}}
        short["export"] = {"min_agreement": 0.0, "max_accuracy_drop": 1.0}
    run = run_build(
        BuildSettings(
            **short,
            data=f"folder:{folder}",
            target=f"{settings.target / 1e6:g}M",
            input_size=settings.input_size,
            time=settings.time,
            seed=settings.seed,
            baseline=False,
            output_dir=str(directory / "run"),
        )
    )
    shutil.copy(run.path("model.tflite"), directory / FLOAT)
    shutil.copy(run.path(run.summary["file"]), directory / INT8)
    return 1


def _train_by_hand(settings, folder, directory):
    """MobileNetV3-Small, trained by `fpnas train` for as many epochs as fit into the time."""
    shape = (settings.input_size, settings.input_size, 3)
    images = data.load(f"folder:{folder}", image_size=settings.input_size)
    architecture = directory / "architecture.json"
    scale_published(
        "MobileNetV3-Small",
        *(shape, len(images.class_names), settings.target, 2 if shape[0] > 40 else 1),
        settings.published_blocks,
    ).save(architecture)
    start = time.monotonic()
    changes = {}
    if settings.method == "by_hand_taught":
        changes["teacher"] = str(harness.Runs(settings).work_dir / "lite0.keras")
    train = TrainSettings(
        architecture=str(architecture),
        data=f"folder:{folder}",
        random_flip=True,
        seed=settings.seed,
        output_dir=str(directory / "run"),
        **changes,
    )
    probe = planning.probe_training(train, images)
    left = settings.seconds - _EXPORT_SECONDS - (time.monotonic() - start)
    epochs = 1 if settings.smoke else probe.epochs_to_train(left)
    run = run_training(dataclasses.replace(train, epochs=epochs))
    for name, quantize in ((FLOAT, "none"), (INT8, "int8")):
        export_tflite(
            model=run.model_file,
            quantize=quantize,
            output=str(directory / name),
            overwrite=True,
            min_agreement=0,
            max_accuracy_drop=1,
        )
    return 3


def _run_rival(settings, folder, directory):
    images = data.load(f"folder:{folder}", image_size=settings.input_size)
    np.savez(directory / "images.npz", x_train=images.x, y_train=images.y)
    python = _environment(harness.Runs(settings).work_dir, settings.method)
    command = [
        *(str(python), str(pathlib.Path(rivals.__file__).absolute()), settings.method),
        *(
            "images.npz",
            str(directory),
            str(settings.seconds - _EXPORT_SECONDS),
            str(settings.target),
        ),
    ]
    environment = os.environ | harness.OTHERS_VARIABLES
    with (directory / "log.txt").open("w") as log:
        subprocess.run(command, check=True, cwd=directory, env=environment, stdout=log, stderr=log)
    source = inspect.getsource(getattr(rivals, settings.method))
    return len([line for line in source.splitlines() if line])


def _environment(work_dir, method):
    """Python of an environment for a method, made if it is not there yet."""
    first = [each for each in REQUIREMENTS[method] if not each.startswith("keras==")]
    against = set(REQUIREMENTS[method]) - set(first)  # against what TensorFlow asks for
    return harness.make_environment(work_dir / f"environment_{method}", first, against)


def judge(file: pathlib.Path, folder: pathlib.Path, size: int) -> float:
    """Accuracy of a `.tflite` file on the test images."""
    images = data.load(f"folder:{folder}", "test", size)
    interpreter = conversion.Interpreter(model_content=file.read_bytes())
    interpreter.allocate_tensors()
    (inputs,), (outputs,) = interpreter.get_input_details(), interpreter.get_output_details()
    right = 0
    for x, y in zip(images.x, images.y):
        interpreter.set_tensor(inputs["index"], x[None].astype(inputs["dtype"]))
        interpreter.invoke()
        right += interpreter.get_tensor(outputs["index"]).argmax() == y
    return float(right / len(images.y))


def report(rows: Mapping[str, harness.Row]) -> None:
    """Prints the table."""
    print(
        "\n| images | photos a class | time | method | seed | test accuracy, % | "
        f"of the int8 file | its ms | its kB | minutes | lines of the user |\n{'|---' * 11}|"
    )
    for row in rows.values():
        print(
            f"| {row['images']} | {row['photos']} | {row['time']} | "
            f"{NAMES[row['method']]} | {row['seed']} | "
            f"{100 * row.get('float_accuracy', np.nan):.2f} | {100 * row['accuracy']:.2f} | "
            f"{row['milliseconds']:.3g} | {row['bytes'] / 1e3:.0f} | {row['seconds'] / 60:.1f} | "
            f"{row['lines']} |"
        )


def draw(rows: Mapping[str, harness.Row], picture: str) -> None:
    """Draws accuracy against milliseconds, for each folder, number of photos and time.

    A panel needs at least two methods to compare.
    """
    import matplotlib.pyplot as plt  # Not in the processes that are timed.

    panels = {}
    for row in rows.values():
        panels.setdefault((row["images"], int(row["photos"]), row["time"]), []).append(row)
    panels = {
        panel: shown
        for panel, shown in sorted(panels.items())
        if len({row["method"] for row in shown}) > 1
    }
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False, layout="constrained"
    )
    for axis, (panel, shown) in zip(axes[0], panels.items()):
        for method, name in NAMES.items():
            own = [row for row in shown if row["method"] == method]
            axis.scatter(
                [row["milliseconds"] for row in own],
                [100 * row["accuracy"] for row in own],
                s=90 if method == "build" else 50,
                label=name,
            )
        title = "{}: {:,} photos a class, {}".format(*panel)
        axis.set(title=title, xlabel="ms of the int8 file", xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("test accuracy of the int8 file, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def run(settings: BuildBenchmarkSettings) -> None:
    """Runs the methods that have no row yet, and reports."""
    runs = harness.Runs(settings)
    folders = few_photos.make_folders(settings, runs)
    if settings.method is not None:
        (folder,) = folders.values()
        print(json.dumps(run_method(settings, folder)))
        return
    teacher = runs.work_dir / "lite0.keras"
    if not teacher.exists() and "by_hand_taught" in settings.methods:
        few_photos.build_lite0(settings.teacher_size, np.load(settings.lite0)).save(teacher)
    rows = harness.finished(settings.output, "name")
    for photos, folder in folders.items():
        for method in settings.methods:
            name = settings.row_name(folder, method)
            if name in rows:
                continue
            print(f"{name} ...", flush=True)
            if method in REQUIREMENTS:
                try:
                    _environment(runs.work_dir, method)  # Its time does not count.
                except (subprocess.CalledProcessError, OSError) as error:
                    print(f"left out: {name}: {error}")
                    continue
            row = _run_alone(settings, photos, method)
            directory = pathlib.Path(row.pop("directory"))
            file = directory / INT8
            with contextlib.closing(devices.Host()) as host:
                (times,) = devices.times(host, {name: file}, 30).values()
            rows[name] = {
                "name": name,
                "images": settings.images,
                "photos": photos,
                "seed": settings.seed,
                "method": method,
                "accuracy": judge(file, folder, settings.input_size),
                "float_accuracy": judge(directory / FLOAT, folder, settings.input_size),
                "milliseconds": devices.tenth_percentile(times),
                "bytes": file.stat().st_size,
                "macs_target": settings.target,
                "time": settings.time,
                **row,
            }
            harness.append(settings.output, rows[name])
    report(rows)
    if settings.picture:
        draw(rows, settings.picture)


def _run_alone(settings, photos, method):
    """The row of a method, from a process of its own on one core."""
    alone = dataclasses.replace(settings, photos=(photos,), method=method)
    if settings.smoke:
        (folder,) = few_photos.make_folders(alone, harness.Runs(alone)).values()
        return run_method(alone, folder)
    core = min(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(core), sys.executable, __file__, *alone.to_flags()]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


COMMAND = harness.make_command(__file__, __doc__, BuildBenchmarkSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
