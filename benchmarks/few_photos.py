"""Few photos: with and without a pretrained teacher, against MobileNetV3-Small.

python benchmarks/few_photos.py --folder=FOLDER --lite0=NPZ

For each number of photos a class: a search, its result trained with 3 seeds from scratch and with
the teacher, and MobileNetV3-Small at the largest width within the target, trained in the same ways.
The teacher is EfficientNet-Lite0 with ImageNet's weights, which gets a new head fitted to the
photos. All settings but those are the defaults of the commands. The test images are a fifth of the
photos of the classes, the same for every number of photos.

One job runs on each core. Finished rows are appended to --output. A run that was interrupted
continues from there.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import harness
import keras
import numpy as np

from fpnas_keras.commands import run_command
from fpnas_keras.errors import UserError
from fpnas_keras.published import scale_published
from fpnas_keras.settings import setting

# Of EfficientNet-B0: kernel size, strides, expansion, filters and number of blocks of each stage.
_STAGES = (
    *((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3)),
    *((5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)),
)
_TEST_SHARE = 0.2
# Of the random images that stand in for photos in a smoke run.
_NOISE_CLASSES = ("a", "b", "c")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewPhotosSettings(harness.ProjectSettings):
    """Settings of this benchmark."""

    SMOKE: ClassVar[Mapping[str, Any]] = {
        **harness.ProjectSettings.SMOKE,
        "photos": ("60",),  # Rows that were measured have this name. It is 8 images of noise.
        "input_size": 8,
        "target": 30e3,
        "teacher_size": 32,
        "train_epochs": 1,
        "published_blocks": 2,
    }

    output: str = harness.output_setting("few_photos.jsonl")
    folder: str | None = setting(
        "Image folder, with `train/CLASS/`. Rows have its name: those that were measured have "
        "flowers_128 and cifar10_24k.",
        None,
        basic=True,
    )
    lite0: str | None = setting("Weights of EfficientNet-Lite0 (npz).", None, basic=True)
    photos: tuple[str, ...] = setting("Training photos of each class.", ("60", "400"))
    classes: int = setting("Number of classes, the first in their order.", 3, least=2)
    input_size: int = setting("Height and width of the students' images.", 64, least=8)
    target: float = setting("What the networks may cost, in MACs.", 8e6, least=0)
    teacher_size: int = setting("Height and width of the teacher's images.", 128, least=32)
    published_blocks: int = setting("Most blocks of MobileNetV3-Small.", 20, least=1)

    def check(self) -> None:
        """Raises `UserError` when the photos or the weights are not given."""
        if not self.smoke and None in (self.folder, self.lite0):
            raise UserError("--folder and --lite0 must be given")

    @property
    def images(self) -> str:
        """Name of the image folder, for the rows.

        Smoke runs have the name of a folder that was measured: a test compares rows.
        """
        return pathlib.Path(self.folder or "flowers_128").resolve().name


def build_lite0(size: int, weights: Mapping[str, np.ndarray] | None) -> keras.Model:
    """EfficientNet-Lite0 for ImageNet, from pixels 0..255 to logits.

    Args:
        size: Height and width of the images.
        weights: The weights by their names in PyTorch; `None` for random ones.
    """
    layers, images = keras.layers, keras.Input((size, size, 3))
    found = []

    def norm(x, name):
        layer = layers.BatchNormalization(epsilon=1e-3)
        names = ("weight", "bias", "running_mean", "running_var")
        found.append((layer, [(f"{name}.{each}", None) for each in names]))
        return layer(x)

    def conv(x, filters, kernel, strides, name):
        layer = layers.Conv2D(filters, kernel, strides, "same", use_bias=False)
        found.append((layer, [(f"{name}.weight", (2, 3, 1, 0))]))
        return layer(x)

    x = layers.Rescaling(1 / 128, -127 / 128)(images)
    x = layers.ReLU(6)(norm(conv(x, 32, 3, 2, "_conv_stem"), "_bn0"))
    index = 0
    for kernel, strides, expansion, filters, repeats in _STAGES:
        for repeat in range(repeats):
            name, inputs = f"_blocks.{index}", x
            if expansion > 1:
                x = conv(x, expansion * x.shape[-1], 1, 1, f"{name}._expand_conv")
                x = layers.ReLU(6)(norm(x, f"{name}._bn0"))
            step = strides if repeat == 0 else 1
            layer = layers.DepthwiseConv2D(kernel, step, "same", use_bias=False)
            found.append((layer, [(f"{name}._depthwise_conv.weight", (2, 3, 0, 1))]))
            x = layers.ReLU(6)(norm(layer(x), f"{name}._bn1"))
            x = norm(conv(x, filters, 1, 1, f"{name}._project_conv"), f"{name}._bn2")
            if repeat:
                x = layers.Add()([x, inputs])
            index += 1
    x = layers.ReLU(6)(norm(conv(x, 1280, 1, 1, "_conv_head"), "_bn1"))
    dense = layers.Dense(1000)
    found.append((dense, [("_fc.weight", (1, 0)), ("_fc.bias", None)]))
    model = keras.Model(images, dense(layers.GlobalAveragePooling2D()(x)))
    if weights is not None:
        for layer, names in found:
            layer.set_weights(
                [weights[n] if axes is None else weights[n].transpose(axes) for n, axes in names]
            )
    return model


def make_folders(settings: FewPhotosSettings, runs: harness.Runs) -> dict[str, pathlib.Path]:
    """Image folders of links to the photos, by the number of photos a class."""
    folders = {count: runs.work_dir / f"{settings.images}_{count}" for count in settings.photos}
    if settings.smoke:
        return {count: _make_noise(folder) for count, folder in folders.items()}
    files = _files_of_classes(settings)
    for count, folder in folders.items():
        for name, paths in files.items():
            order = np.random.default_rng(0).permutation(len(paths))
            held_out = int(_TEST_SHARE * len(paths))
            if len(paths) - held_out < int(count):
                raise UserError(
                    f"`photos` must be at most {len(paths) - held_out}, the training photos of "
                    f"{name}. Received: photos={count}"
                )
            parts = {"test": order[:held_out], "train": order[held_out : held_out + int(count)]}
            for part, indices in parts.items():
                target = folder / part / name
                target.mkdir(parents=True, exist_ok=True)
                for index in indices:
                    link = target / paths[index].name
                    if not link.exists():
                        link.symlink_to(paths[index])
                    elif link.resolve() != paths[index].resolve():
                        raise UserError(
                            f"`folder` has the name of another one, whose images are in {folder}: "
                            f"give another --work_dir. Received: folder={settings.folder}"
                        )
    return folders


def count_classes(settings: FewPhotosSettings) -> int:
    """The number of classes in each folder of `make_folders`."""
    return len(_NOISE_CLASSES) if settings.smoke else settings.classes


def _files_of_classes(settings):
    root = pathlib.Path(settings.folder).absolute() / "train"
    names = sorted(each.name for each in root.iterdir())[: settings.classes]
    return {name: sorted((root / name).iterdir()) for name in names}


def _make_noise(folder):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in _NOISE_CLASSES:
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for index in range(8):
                pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
                keras.utils.save_img(folder / part / name / f"{index}.png", pixels, scale=False)
    return folder


def phases(settings: FewPhotosSettings, runs: harness.Runs) -> Iterator[dict[str, harness.Job]]:
    """The searches, and then the trainings, by name."""
    folders = make_folders(settings, runs)
    teacher = runs.work_dir / "lite0.keras"
    if not teacher.exists():
        weights = None if settings.smoke else np.load(settings.lite0)
        build_lite0(settings.teacher_size, weights).save(teacher)
    common = {
        count: {
            "data": f"folder:{folder}",
            "train_images": None,
            "random_flip": True,
            **({} if settings.smoke else {"batch_size": None, "epochs": None}),
            "learning_rate": None,
        }
        for count, folder in folders.items()
    }
    searches, trainings = {}, {}
    for count, folder in folders.items():
        steps = {} if settings.smoke else {"steps_per_epoch": None}
        searches |= runs.search(
            f"search {folder.name}",
            **common[count] | steps,
            input_size=settings.input_size,
            target=settings.target,
            architecture_learning_rate=0.03,
        )
        published = runs.work_dir / f"MobileNetV3-Small_{folder.name}.json"
        shape = (settings.input_size, settings.input_size, 3)
        scale_published(
            "MobileNetV3-Small",
            *(shape, count_classes(settings), settings.target, 2),
            settings.published_blocks,
        ).save(published)
        files = {
            "found": runs.architecture_file(f"search {folder.name}"),
            "MobileNetV3-Small": published,
        }
        for seed in range(settings.seeds):
            for name, file in files.items():
                for way, changes in (("scratch", {}), ("teacher", {"teacher": str(teacher)})):
                    label = f"{folder.name} {name} {way} {seed}"
                    trainings |= runs.train(label, file, **common[count] | changes, seed=seed)
    yield searches
    yield trainings


def report(settings: FewPhotosSettings, rows: Mapping[str, harness.Row]) -> None:
    """Prints the table."""
    print(f"\n| photos a class | network | start | test accuracy, % | mean |\n{'|---' * 5}|")
    for count in settings.photos:
        for name in ("found", "MobileNetV3-Small"):
            for way in ("scratch", "teacher"):
                values = [
                    100 * rows[f"{settings.images}_{count} {name} {way} {seed}"]["test_accuracy"]
                    for seed in range(settings.seeds)
                ]
                listed = " ".join(f"{value:.2f}" for value in values)
                print(f"| {count} | {name} | {way} | {listed} | {np.mean(values):.2f} |")


def run(settings: FewPhotosSettings) -> None:
    """Runs the jobs that have no row yet, and reports."""
    runs = harness.Runs(settings)
    report(settings, runs.run_phases(phases(settings, runs)))


COMMAND = harness.make_command(__file__, __doc__, FewPhotosSettings, run)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
