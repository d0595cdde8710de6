"""What each format of `.tflite` file costs: accuracy, bytes, milliseconds, and who runs it.

python benchmarks/formats.py --data_dir=DATA --flowers=FOLDER

The networks are the four that the project comes with (`docs/networks.md`), a random one of each of
three other spaces, and MobileNetV3-Small. Each is trained by the short protocol: on 10,000 images
of Fashion-MNIST, or on the flowers. Then it is exported in every format with the defaults of
`fpnas export`, whatever accuracy is lost. The files of a network are timed in turn.

A file of int8 numbers is also compiled by Vela for Arm's Ethos NPU, if `ethos-u-vela` is installed.
Finished rows are appended to --output. A run that was interrupted continues from there.
"""

import contextlib
import dataclasses
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import harness
import numpy as np
from networks import draw_random_networks

import fpnas_keras as fpnas
from export import devices, export_tflite
from fpnas_keras.commands import run_command
from fpnas_keras.errors import UserError
from fpnas_keras.published import scale_published
from fpnas_keras.runs import TrainingRun
from fpnas_keras.settings import setting

FORMATS = ("none", "float16", "dynamic", "int8", "qat")
_FASHION, _FLOWERS = "fashion_mnist", "flowers"


class Network(NamedTuple):
    """A network to export.

    Attributes:
        architecture: The network.
        data: What it is trained on: "fashion_mnist" or "flowers".
    """

    architecture: fpnas.Architecture
    data: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatsSettings(harness.ProjectSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        **harness.ProjectSettings.SMOKE,
        "input_size": 8,
        "rounds": 1,
    }

    output: str = harness.output_setting("formats.jsonl")
    flowers: str | None = setting("Image folder of the flowers.", None, basic=True)
    rounds: int = setting("Rounds in which the files of a network are timed.", 100, least=1)

    def check(self) -> None:
        """Raises `UserError` when the flowers are not given."""
        if not self.smoke and self.flowers is None:
            raise UserError("--flowers must be given")


def make_networks(settings: FormatsSettings) -> dict[str, Network]:
    """The networks by name."""
    if settings.smoke:
        space = fpnas.spaces.get(settings.space, (8, 8, 1), 10)
        return {
            "fashion_mnist_1000k_macs": Network(draw_random_networks(space, 30e3, 1)[0], _FASHION)
        }
    folder = harness.ROOT / "configs" / "architectures"
    found = {
        name: Network(fpnas.Architecture.load(folder / f"{name}.json"), data)
        for name, data in {
            "fashion_mnist_2500k_macs": _FASHION,
            "fashion_mnist_1000k_macs": _FASHION,
            "fashion_mnist_30us_host": _FASHION,
            "flowers_20m_macs": _FLOWERS,
        }.items()
    }
    grey, photo = ((28, 28, 1), 10), ((64, 64, 3), 5)
    for space, data, (shape, classes), target in (
        ("mobile_40", _FASHION, grey, 1.5e6),
        ("fbnetv2_f", _FLOWERS, photo, 8e6),
        ("fpnas", _FLOWERS, photo, 20e6),
    ):
        drawn = draw_random_networks(fpnas.spaces.get(space, shape, classes), target, 1)
        found[f"random of {space}"] = Network(drawn[0], data)
    published = scale_published("MobileNetV3-Small", *grey, 1.5e6)
    return found | {"MobileNetV3-Small": Network(published, _FASHION)}


def trainings(
    runs: harness.Runs, settings: FormatsSettings, networks: Mapping[str, Network]
) -> dict[str, harness.Job]:
    """The trainings by name."""
    jobs = {}
    for name, (architecture, data) in networks.items():
        file = runs.work_dir / f"{name.replace(' ', '_')}.json"
        architecture.save(file)
        changes = {}
        if data == _FLOWERS:
            changes = {"data": f"folder:{pathlib.Path(settings.flowers).absolute()}"}
            changes |= {"train_images": None, "batch_size": 32, "random_crop": 6}
        jobs |= runs.train(f"train {name}", file, **changes, random_flip=True)
    return jobs


def export_formats(
    settings: FormatsSettings,
    name: str,
    model: pathlib.Path,
    folder: pathlib.Path,
    rows: Mapping[str, harness.Row],
) -> list[harness.Row]:
    """Exports a network in the formats that have no row yet, and times all files in turn.

    Args:
        settings: The settings.
        name: Name of the network.
        model: Its `model.keras`.
        folder: Where the files go.
        rows: The rows so far, by name.
    """
    folder.mkdir(exist_ok=True)
    rows = {quantize: rows.get(f"{name} {quantize}") for quantize in FORMATS}
    files = {quantize: folder / f"{quantize}.tflite" for quantize in FORMATS}
    for quantize, file in files.items():
        if rows[quantize] is not None and file.exists():
            continue
        exported = export_tflite(
            model=model,
            quantize=quantize,
            output=str(file),
            overwrite=True,
            max_accuracy_drop=1.0,
            min_agreement=0.0,
        )
        rows[quantize] = {
            "name": f"{name} {quantize}",
            **exported.report,
            "vela": compile_for_npu(file) if quantize in ("int8", "qat") else None,
        }
    with contextlib.closing(devices.Host()) as host:
        times = devices.times(host, files, settings.rounds)
    for quantize, row in rows.items():
        row["milliseconds"] = devices.tenth_percentile(times[quantize])
    return list(rows.values())


def compile_for_npu(file: pathlib.Path) -> str | None:
    """What Vela says of the operators on the NPU; `None` where it is not installed."""
    vela = pathlib.Path(sys.executable).with_name("vela")
    if not vela.exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [vela, file, f"--output-dir={folder}"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.search(r"NPU operators = (.*)", said)[1]


def report(rows: Mapping[str, harness.Row], networks: Mapping[str, Network]) -> None:
    """Prints a line for each network and format."""
    print(
        "\n| network | format | accuracy, % | lost, points | kB | ms | XNNPACK | Ethos NPU |\n"
        f"{'|---' * 8}|"
    )
    for name in networks:
        for quantize in FORMATS:
            row = rows[f"{name} {quantize}"]
            lost = 100 * (row["keras_accuracy"] - row["tflite_accuracy"])
            count = sum(row["operators"].values())
            left = sum(row["interpreter_operators"].values())
            print(
                f"| {name} | {quantize} | {100 * row['tflite_accuracy']:.2f} | {lost:+.2f} | "
                f"{row['bytes'] / 1000:.0f} | {row['milliseconds']:.3f} | {count - left} of "
                f"{count} | {row['vela'] or ''} |"
            )
    for quantize in FORMATS:
        losses = [
            100 * (rows[key]["keras_accuracy"] - rows[key]["tflite_accuracy"])
            for key in (f"{name} {quantize}" for name in networks)
        ]
        print(f"{quantize}: mean loss {np.mean(losses):+.2f} points, largest {max(losses):+.2f}")


def run(settings: FormatsSettings) -> None:
    """Runs the jobs that have no row yet, and reports."""
    runs = harness.Runs(settings)
    networks = make_networks(settings)
    rows = runs.run_phases([trainings(runs, settings, networks)])
    for name in networks:
        if all(f"{name} {quantize}" in rows for quantize in FORMATS):
            continue
        model = TrainingRun(runs.directory(f"train {name}")).model_file
        folder = runs.work_dir / f"{name.replace(' ', '_')}_files"
        for row in export_formats(settings, name, model, folder, rows):
            rows[row["name"]] = row
            harness.append(settings.output, row)
    report(rows, networks)


COMMAND = harness.make_command(__file__, __doc__, FormatsSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
