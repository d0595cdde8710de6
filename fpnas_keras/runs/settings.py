"""Settings that searches and trainings have in common."""

import dataclasses
import re

from fpnas_keras.data.settings import DataSettings
from fpnas_keras.errors import UserError
from fpnas_keras.settings import MAX_SEED, setting

_CHECKPOINT_EVERY = re.compile(r"([1-9][0-9]{0,8})(s?)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(DataSettings):
    """Settings of a job that has a run directory."""

    output_dir: str = setting(
        "Directory of the run: new, empty, or that of the same run, which is then continued where "
        "it stopped.",
        basic=True,
        may_change=True,
    )
    checkpoint_every: str = setting(
        "How often a checkpoint is saved: seconds (60s) or steps (500). A kill loses what was done "
        "since the last one. Ctrl-C and SIGTERM save first and lose nothing.",
        "60s",
        group="Run",
        may_change=True,
    )
    tensorboard: bool = setting(
        "Whether TensorBoard files are written to the folder `tensorboard`: scalars, the flags, "
        "and for a search histograms of the probabilities.",
        True,
        group="Run",
    )
    seed: int = setting(
        "Seed of everything that is random.", 0, least=0, most=MAX_SEED, group="Run"
    )

    def check(self) -> None:
        """Raises `UserError` when settings do not fit together."""
        if not _CHECKPOINT_EVERY.fullmatch(self.checkpoint_every):
            raise UserError(
                "`checkpoint_every` must be a number of seconds above 0 with an s (60s) or of "
                f"steps (500). Received: checkpoint_every={self.checkpoint_every}"
            )

    def checkpoint_interval(self) -> tuple[float, float]:
        """Seconds and steps between two checkpoints; one of them is infinite."""
        number, is_seconds = _CHECKPOINT_EVERY.fullmatch(self.checkpoint_every).groups()
        return (int(number), float("inf")) if is_seconds else (float("inf"), int(number))
