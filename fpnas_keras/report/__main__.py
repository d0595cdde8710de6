"""Writes the report of a search, a training or a build.

python -m fpnas_keras.report --run_dir=runs/x
"""

import dataclasses
import sys

from fpnas_keras import report
from fpnas_keras.commands import Command, run_command
from fpnas_keras.settings import Settings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """Settings of a report. Each is a flag of `fpnas report`."""

    run_dir: str = setting(
        "Directory of a search, a training or a build, finished or not. report.html and report/ "
        "are written into it.",
        basic=True,
    )


COMMAND = Command(
    name="fpnas report",
    summary="Writes the report of a search, a training or a build, which may still be running.",
    examples=(("A search", "fpnas report --run_dir=runs/mine"),),
    settings=ReportSettings,
    run=lambda settings: print(report.write_report(settings.run_dir)),
    needs_tensorflow=False,
)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
