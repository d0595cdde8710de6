"""The ImageNet jobs of configs/ for three steps on stand-in images, and an estimate of the whole.

python benchmarks/imagenet.py

30,000 images of 256x256 pixels of noise in 1,000 classes become the tensorflow_datasets set
`imagenet2012` in --data_dir (1.2 GB): at 224 pixels too many for the memory, so they are read from
their TFRecords, as the real ones are. Each config runs for three steps, one an epoch, with 16
images a batch, 2 samples a step and no warm-up.

The estimate: MACs of the whole search, 4 * target * batch_size * samples (forward and backward on
one batch, forward on the other) for each step. The samples of a step are those of the uniform
distribution times what remained of them on average in the searches of fashion_mnist.jsonl. What a
GPU does in an hour is for the reader to put in; --tera_macs is an assumption, not a measurement.
"""

import io
import json
import pathlib
import re
import statistics
import subprocess
import sys

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import app, flags

import fpnas_keras as fpnas

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", "runs/imagenet_stand_in", "Folder of the stand-in images.")
flags.DEFINE_string("work_dir", "runs/benchmark_imagenet", "Folder of the run directories.")
flags.DEFINE_string("output", "benchmarks/imagenet.json", "File of the rows.")
flags.DEFINE_float("tera_macs", 1.0, "10^12 multiply-adds a second that a GPU does in training.")

ROOT = pathlib.Path(__file__).parents[1]
JOBS = ("imagenet_l0", "imagenet_l2")
IMAGES, CLASSES, TRAIN_IMAGES = 30_000, 1_000, 1_281_167


class Imagenet2012(tfds.core.GeneratorBasedBuilder):
    """Noise, under the name, version and features of the real set."""

    VERSION = tfds.core.Version("5.1.0")
    pkg_dir_path = ROOT / "benchmarks"

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
        return {"train": self._generate_examples(IMAGES), "validation": self._generate_examples(50)}

    def _generate_examples(self, count):
        rng = np.random.default_rng(0)
        small = rng.integers(0, 256, (100, 64, 64, 3))
        large = tf.cast(tf.image.resize(small, (256, 256)), tf.uint8)
        encoded = [tf.io.encode_jpeg(image).numpy() for image in large]
        for index in range(count):
            image = io.BytesIO(encoded[index % len(encoded)])
            yield index, {"image": image, "label": index % CLASSES, "file_name": f"{index}.JPEG"}


def remaining_samples() -> float:
    """Mean samples of a step over those of the first, of the Fashion-MNIST searches."""
    lines = (ROOT / "benchmarks" / "fashion_mnist.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["name"].startswith("search factorized")]
    return statistics.mean(
        row["total_samples"]
        / row["steps"]
        / first_samples(row["space"], tuple(row["input_shape"]), row["num_classes"])
        for row in rows
    )


def first_samples(*space: object) -> int:
    """Samples of a step under the uniform distribution."""
    search = fpnas.distributions.FactorizedLogits(fpnas.spaces.get(*space).blocks)
    return int(fpnas.AdaptiveSamples(scale=0.25)(search.entropy()))


def run(job: str) -> dict[str, float]:
    """Three steps of a job, and the MACs of all."""
    directory = pathlib.Path(FLAGS.work_dir).absolute() / job
    overridden = {
        "output_dir": directory,
        "data_dir": pathlib.Path(FLAGS.data_dir).absolute(),
        "batch_size": 16,
        "samples": 2,
        "warmup_steps": 0,
        "epochs": 3,
        "steps_per_epoch": 1,
    }
    command = [sys.executable, "-m", "fpnas_keras.search", f"--flagfile=configs/{job}.flags"]
    command += [f"--{name}={value}" for name, value in overridden.items()]
    subprocess.run(command, check=True, cwd=ROOT)
    summary = json.loads((directory / "summary.json").read_text())
    text = (ROOT / "configs" / f"{job}.flags").read_text()
    given = dict(re.findall(r"^--(\w+)=(.*)$", text, re.MULTILINE))
    batch_size, target = int(given["batch_size"]), float(given["target"])
    steps = int(given["epochs"]) * (TRAIN_IMAGES // 2 // batch_size)
    samples = first_samples(given["space"], (224, 224, 3), CLASSES) * remaining_samples()
    return {
        "job": job,
        "seconds": summary["wall_seconds"],
        "peak_memory_mb": summary["peak_memory_mb"],
        "steps_run": summary["steps"],
        "macs_found": summary["macs"],
        "steps": steps,
        "samples_a_step": round(samples, 1),
        "peta_macs": round(4 * target * batch_size * samples * steps / 1e15, 1),
        "gpu_hours": round(4 * target * batch_size * samples * steps / FLAGS.tera_macs / 3.6e15, 1),
    }


def main(_: list[str]) -> None:
    """Writes the images where they are not yet, and runs the jobs."""
    config = tfds.download.DownloadConfig(num_shards=8)
    Imagenet2012(data_dir=FLAGS.data_dir).download_and_prepare(download_config=config)
    rows = [run(job) for job in JOBS]
    pathlib.Path(FLAGS.output).write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    app.run(main)
