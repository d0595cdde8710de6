"""The settings of a build, and those of its steps."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from absl import logging

from export.latency import DeviceSettings, LatencySettings
from export.tflite import TfliteSettings, settings_without_effect
from fpnas_keras import spaces
from fpnas_keras.building.targets import Target, parse_target, parse_time
from fpnas_keras.data.settings import DATA_FLAGS
from fpnas_keras.errors import UserError
from fpnas_keras.runs.build_run import BuildRun
from fpnas_keras.runs.search_run import KEPT_FINALISTS
from fpnas_keras.runs.settings import RunSettings
from fpnas_keras.search import SearchSettings
from fpnas_keras.settings import format_flag, setting
from fpnas_keras.train import TrainSettings

if TYPE_CHECKING:
    from fpnas_keras.data import Images

_STEPS, _NETWORK = "Flags of the steps", "Network"
_COMMON = {field.name for field in dataclasses.fields(RunSettings)}
# Settings of the steps that the build sets.
_OF_SEARCH = _COMMON | {"space", "input_size", "cost", "target", "latency_table", "strategy"}
_OF_TRAINING = _COMMON | {"architecture", "input_size", "init", "search_dir"}
_OF_EXPORT = {*DATA_FLAGS, "model", "quantize", "architecture", "output", "overwrite", "seed"}
_OF_EXPORT |= {"prune"}
# Settings of a training that those of the finalists do not use.
_NOT_OF_FINALISTS = {
    *("train.teacher", "train.teacher_weights", "train.temperature"),
    *("train.distillation_weight", "train.ema_momentum"),
}
_OF_LATENCY = {
    *("space", "input_size", "channels", "num_classes", "output", "architecture", "latency_table"),
    *("device", "benchmark_model", "quantize", "seed"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildSettings(RunSettings):
    """Settings of a build. Each is a flag of `fpnas build`."""

    target: str = setting(
        "What the file for the app may cost: milliseconds on --device (2ms), multiply-adds of one "
        "image (8M), or its size (300kB). Milliseconds and size are those of the int8 file.",
        basic=True,
    )
    time: str | None = setting(
        "Time for all of it: 2h, 90m or 1h30m. It decides the steps of the search and the epochs "
        "of the trainings. Default: those of fpnas search and fpnas train.",
        None,
        basic=True,
        may_change=True,
    )
    device: str = setting(
        "Where milliseconds are measured: on this machine, or on an Android phone, which needs "
        "--benchmark_model.",
        "host",
        choices=("host", "adb"),
        basic=True,
    )
    benchmark_model: str | None = setting(
        "The benchmark_model binary for the phone.", None, group=_NETWORK
    )
    latency_table: str | None = setting(
        "Latency table of the space for the device, which `fpnas latency` measured. Default: one "
        "that an earlier build measured, or else it is measured.",
        None,
        group=_NETWORK,
        path=True,
    )
    space: str | None = setting(
        f"Search space: {', '.join(spaces.names())}; or the path of a file. Default: mobile_40 up "
        "to 40 pixels, mobile_128 up to 160, mobile_224 above.",
        None,
        group=_NETWORK,
        path=True,
    )
    input_size: int | None = setting(
        "Height and width in pixels that images are resized to. Default: the largest one, up to "
        "the size of the images, at which the target is twice the cost of the smallest network.",
        None,
        least=8,
        group=_NETWORK,
    )
    baseline: bool = setting(
        "Whether MobileNetV3-Small, at the largest width within the target, is trained for as long "
        "to compare with, if there is time.",
        True,
        basic=True,
    )
    trained_finalists: int | None = setting(
        "Number of the search's finalists that are trained on a part of the images, for the usual "
        "epochs or --train.epochs. The best one on the other images is the network for the app. "
        "Default: as many as fit if --time leaves more than its training needs; none without "
        "--time or for fewer than 5,000 images. 0 takes the result of the search.",
        None,
        least=0,
        most=KEPT_FINALISTS,
        group=_NETWORK,
    )
    random_flip: bool | None = setting(
        "Mirror half of the training images left to right. Not for digits or text, or where left "
        "and right differ. Default: if the images have color.",
        None,
        basic=True,
    )
    search: Mapping[str, Any] | None = setting(
        "A flag of fpnas search, such as --search.epochs=50. A switch is turned off by "
        "--nosearch.stratified.",
        None,
        group=_STEPS,
        of=SearchSettings,
        without=_OF_SEARCH,
    )
    train: Mapping[str, Any] | None = setting(
        "A flag of fpnas train, such as --train.epochs=100 or --train.teacher=EfficientNetV2B0. "
        "Both networks are trained with it.",
        None,
        group=_STEPS,
        of=TrainSettings,
        without=_OF_TRAINING,
    )
    export: Mapping[str, Any] | None = setting(
        "A flag of fpnas export, such as --export.author=NAME.",
        None,
        group=_STEPS,
        of=TfliteSettings,
        without=_OF_EXPORT,
    )
    latency: Mapping[str, Any] | None = setting(
        "A flag of fpnas latency, such as --latency.core_mask=f0.",
        None,
        group=_STEPS,
        of=LatencySettings,
        without=_OF_LATENCY,
    )

    def check(self) -> None:
        """Raises `UserError` when settings do not fit together, those of the steps too."""
        super().check()
        target = self.parsed_target()
        if self.time is not None:
            parse_time(self.time)
        if target.kind != "latency" and self.latency_table is not None:
            raise UserError(
                f"--latency_table needs a target in milliseconds. Received: target={self.target}"
            )
        if self.trained_finalists == 1:
            raise UserError(
                "`trained_finalists` must be 0 or at least 2, of which the best one is chosen. "
                "Received: trained_finalists=1"
            )
        # What is wrong with a step should not wait for it.
        with self._naming_step("latency"):
            device = self.device_settings()
        if len(device.threads) > 1:
            raise UserError(
                "`latency.threads` must be one number. "
                f"Received: latency.threads={','.join(map(str, device.threads))}"
            )
        with self._naming_step("search"):
            self.search_settings(pathlib.Path("search"), "mobile_mini", 32, cost="macs", target=1.0)
        with self._naming_step("train"):
            self.train_settings(pathlib.Path("training"), "architecture.json")
        with self._naming_step("export"):
            for quantize in ("none", "int8", "qat"):
                self.export_settings(model="model.keras", quantize=quantize)

    @contextlib.contextmanager
    def _naming_step(self, step):
        """Says of an error of a step that its flags have another name in a build."""
        try:
            yield
        except UserError as error:
            if not getattr(self, step):
                raise
            raise UserError(f"with the flags --{step}.FLAG: {error}") from None

    def may_still_change(self, run: BuildRun, name: str) -> bool:
        """Whether a build that has begun can go on with another value of a flag.

        It can as long as no step has used the value: everything before the search, the flags of the
        trainings before them, and those of the export and the device before the end.

        Args:
            run: The build.
            name: Name of the flag.
        """
        if not run.is_build:
            return False
        if not run.search.flag_file.is_file() or name == "baseline":
            return True
        step, _, _ = name.partition(".")
        if step in ("train", "trained_finalists"):
            begun = (
                [run.training]
                if name in _NOT_OF_FINALISTS
                else [*run.trained_finalists, run.training]
            )
            return not any(each.flag_file.is_file() for each in begun)
        if step == "latency" or name in ("device", "benchmark_model"):
            return self.parsed_target().kind != "latency" or name == "benchmark_model"
        return step == "export" and run.export_report("none") is None

    def parsed_target(self) -> Target:
        """The target as a number with its kind."""
        return parse_target(self.target)

    def seconds(self) -> float | None:
        """The time for all of it; `None` if there is no limit."""
        return None if self.time is None else parse_time(self.time)

    def fit_to(self, images: "Images") -> Self:
        """These settings, with a value for each one that depends on the images.

        Args:
            images: The training images, of the size that the network is to take.
        """
        size, channels = images.image_shape[0], images.image_shape[-1]
        values = {
            "input_size": size,
            "space": default_space(size),
            "random_flip": channels == 3,
        }
        chosen = {name: value for name, value in values.items() if getattr(self, name) is None}
        if chosen:
            flags = " ".join(format_flag(name, value) for name, value in chosen.items())
            logging.info("chosen for these images and the target: %s", flags)
        return dataclasses.replace(self, **chosen)

    def _common(self, output_dir):
        values = {name: getattr(self, name) for name in _COMMON}
        flip = bool(self.random_flip)
        return values | {"output_dir": str(output_dir), "random_flip": flip}

    def search_settings(
        self, output_dir: pathlib.Path, space: str, input_size: int, **values: Any
    ) -> SearchSettings:
        """The settings of the search.

        Args:
            output_dir: Its directory.
            space: The space.
            input_size: Height and width of the images.
            **values: Further settings, which those of the user override.
        """
        given = {**values, **(self.search or {})}
        return SearchSettings(
            **self._common(output_dir), space=space, input_size=input_size, **given
        )

    def train_settings(
        self, output_dir: pathlib.Path, architecture: str, **values: Any
    ) -> TrainSettings:
        """The settings of a training.

        Args:
            output_dir: Its directory.
            architecture: The architecture file.
            **values: Further settings, which those of the user override.
        """
        given = {**values, **(self.train or {})}
        return TrainSettings(**self._common(output_dir), architecture=architecture, **given)

    def export_settings(self, **values: Any) -> TfliteSettings:
        """The settings of an export.

        Args:
            **values: Further settings, which those of the user override.
        """
        without_effect = settings_without_effect(values["quantize"])
        given = {
            name: value for name, value in (self.export or {}).items() if name not in without_effect
        }
        return TfliteSettings(**{"seed": self.seed, **values, **given})

    def device_settings(self) -> DeviceSettings:
        """The settings of the device that files are timed on."""
        names = {field.name for field in dataclasses.fields(DeviceSettings)}
        given = {name: value for name, value in (self.latency or {}).items() if name in names}
        return DeviceSettings(device=self.device, benchmark_model=self.benchmark_model, **given)

    def latency_settings(self, space: str, **values: Any) -> LatencySettings:
        """The settings of a latency table.

        Args:
            space: The space.
            **values: Further settings, which those of the user override.
        """
        given = {**values, **(self.latency or {})}
        return LatencySettings(
            space=space,
            device=self.device,
            benchmark_model=self.benchmark_model,
            quantize="int8",
            seed=self.seed,
            **given,
        )


def default_space(size: int) -> str:
    """The space for images of a height and width in pixels."""
    if size <= 40:
        return "mobile_40"
    return "mobile_128" if size <= 160 else "mobile_224"
