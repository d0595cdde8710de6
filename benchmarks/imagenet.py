"""The ImageNet jobs of configs/ for three steps on stand-in images, and an estimate of the whole.

python benchmarks/imagenet.py

30,000 images of 256x256 pixels of noise in 1,000 classes become the tensorflow_datasets data set
`imagenet2012` in --data_dir (1.2 GB). At 224 pixels they do not fit into the memory, so they are
read from their TFRecords, like the real ones. Each job runs for three epochs of one step, with
batches of 16 images, 2 samples in a step and no warm-up. The rows are written to --output at the
end.

The estimate is the MACs of the whole search: 4 * target * batch_size * samples for each step
(forward and backward on one batch, forward on the other). The samples of a step are those of the
uniform distribution, times the mean share that remained in the searches of fashion_mnist.jsonl. The
MACs per second of a GPU, --tera_macs, are an assumption and no measurement.
"""

import dataclasses
import io
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import harness
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

import fpnas_keras as fpnas
from fpnas_keras import data
from fpnas_keras.commands import run_command
from fpnas_keras.method import FactorizedLogits
from fpnas_keras.runs import RunDirectory
from fpnas_keras.search import SearchSettings
from fpnas_keras.settings import setting

JOBS = ("imagenet_l0", "imagenet_l2")
CLASSES, TRAIN_IMAGES = 1_000, 1_281_167


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagenetSettings(harness.BenchmarkSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        "images": 2_000,
        "space": str(harness.SMALL_SPACE),
        "input_size": 8,
        "target": 1e5,
        "batch_size": 2,
    }

    output: str = harness.output_setting("imagenet.json")
    data_dir: str = setting("Folder of the stand-in images.", "runs/imagenet_stand_in", basic=True)
    work_dir: str = setting("Folder of the run directories.", "runs/benchmark_imagenet", basic=True)
    tera_macs: float = setting(
        "10^12 multiply-adds per second of a GPU in training.", 1.0, least=0.001
    )
    images: int = setting("Number of stand-in images.", 30_000, least=2 * CLASSES)
    batch_size: int = setting("Images in a batch.", 16, least=2)
    space: str | None = setting("Another space than that of the jobs.", None, path=True)
    input_size: int | None = setting("Another input size than that of the jobs.", None, least=1)
    target: float | None = setting("Another target than those of the jobs.", None, least=0)

    def shrink(self, folder: pathlib.Path) -> "ImagenetSettings":
        """The settings of the smoke run that these settings ask for."""
        smallest = super().shrink(folder)
        folders = {"data_dir": str(folder / "data"), "work_dir": str(folder / "runs")}
        return dataclasses.replace(smallest, **folders)


class Imagenet2012(tfds.core.GeneratorBasedBuilder):
    """Noise, with the name, version and features of the real data set."""

    train_images: int
    VERSION = tfds.core.Version("5.1.0")
    pkg_dir_path = harness.ROOT / "benchmarks"

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(num_classes=CLASSES),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, _):
        return {
            "train": self._generate_examples(self.train_images),
            "validation": self._generate_examples(50),
        }

    def _generate_examples(self, count):
        rng = np.random.default_rng(0)
        small = rng.integers(0, 256, (min(count, 100), 64, 64, 3))
        large = tf.cast(tf.image.resize(small, (256, 256)), tf.uint8)
        encoded = [tf.io.encode_jpeg(image).numpy() for image in large]
        for index in range(count):
            image = io.BytesIO(encoded[index % len(encoded)])
            yield index, {"image": image, "label": index % CLASSES, "file_name": f"{index}.JPEG"}


def remaining_samples() -> float:
    """Mean samples of a step relative to the first step, in the Fashion-MNIST searches."""
    rows = harness.finished(harness.ROOT / "benchmarks" / "fashion_mnist.jsonl", "name")
    return statistics.mean(
        row["total_samples"]
        / row["steps"]
        / first_samples(row["space"], tuple(row["input_shape"]), row["num_classes"])
        for name, row in rows.items()
        if name.startswith("search factorized")
    )


def first_samples(space: str, input_shape: tuple[int, int, int], num_classes: int) -> int:
    """Samples of a step under the uniform distribution."""
    distribution = FactorizedLogits(fpnas.spaces.get(space, input_shape, num_classes))
    return int(fpnas.AdaptiveSamples(scale=0.25)(distribution.entropy()))


def run_job(settings: ImagenetSettings, name: str) -> harness.Row:
    """Runs three steps of a job, and estimates the MACs of all of its steps."""
    job = SearchSettings.from_flags([f"--flagfile=configs/{name}.flags"])
    directory = pathlib.Path(settings.work_dir).absolute() / name
    changes = {
        "output_dir": str(directory),
        "data_dir": str(pathlib.Path(settings.data_dir).absolute()),
        "batch_size": settings.batch_size,
        "samples": 2,
        "warmup_steps": 0,
        "epochs": 3,
        "steps_per_epoch": 1,
        "ranked_samples": 0,
    }
    others = {key: getattr(settings, key) for key in ("space", "input_size", "target")}
    changes |= {key: value for key, value in others.items() if value is not None}
    short = harness.search_job(dataclasses.replace(job, **changes))
    if settings.smoke:
        short.run()
    else:
        subprocess.run([sys.executable, *short.arguments], check=True, cwd=harness.ROOT)
    summary = RunDirectory(directory).summary
    share = job.weights_share or data.choose_weights_share(TRAIN_IMAGES)
    steps = job.epochs * (int(TRAIN_IMAGES * share) // job.batch_size)
    samples = first_samples(job.space, (224, 224, 3), CLASSES) * remaining_samples()
    macs = 4 * job.target * job.batch_size * samples * steps
    return {
        "job": name,
        "seconds": summary["wall_seconds"],
        "peak_memory_mb": summary["peak_memory_mb"],
        "steps_run": summary["steps"],
        "macs_found": summary["macs"],
        "steps": steps,
        "samples_a_step": round(samples, 1),
        "peta_macs": round(macs / 1e15, 1),
        "gpu_hours": round(macs / settings.tera_macs / 3.6e15, 1),
    }


def run(settings: ImagenetSettings) -> None:
    """Writes the images if they are missing, and runs the jobs."""
    Imagenet2012.train_images = settings.images
    config = tfds.download.DownloadConfig(num_shards=8)
    Imagenet2012(data_dir=settings.data_dir).download_and_prepare(download_config=config)
    rows = [run_job(settings, name) for name in JOBS]
    pathlib.Path(settings.output).write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


COMMAND = harness.make_command(__file__, __doc__, ImagenetSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
