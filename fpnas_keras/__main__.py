"""The console command `fpnas`, which is also `python -m fpnas_keras`."""

import importlib
import sys
from collections.abc import Sequence

import fpnas_keras
from fpnas_keras.commands import Command, run_command

# The module of each command. None of them loads TensorFlow before its job begins.
MODULES = {
    "build": "fpnas_keras.building.build",
    "search": "fpnas_keras.search",
    "train": "fpnas_keras.train",
    "rank": "fpnas_keras.rank",
    "report": "fpnas_keras.report.__main__",
    "export": "export.tflite",
    "predict": "export.predict",
    "latency": "export.latency",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `fpnas COMMAND --flag=value ...` and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"fpnas_keras {fpnas_keras.__version__}")
        return 0
    if arguments[0] not in MODULES:
        print(
            f"error: the command must be one of {', '.join(MODULES)}. Received: {arguments[0]}",
            file=sys.stderr,
        )
        return 2
    return run_command(_load(arguments[0]), arguments[1:])


def _load(name: str) -> Command:
    return importlib.import_module(MODULES[name]).COMMAND


def _help():
    commands = "\n".join(f"  {name:8} {_load(name).summary}" for name in MODULES)
    return (
        "usage: fpnas COMMAND --flag=value ...\n\n"
        "Neural architecture search for mobile vision: from photos to a .tflite file.\n\n"
        f"Commands:\n{commands}\n\n"
        "From a folder with one folder of photos for each class to the file for the phone:\n"
        "  fpnas build --data=folder:photos --target=8M --time=1h --output_dir=runs/photos\n\n"
        "The same step by step:\n"
        "  fpnas search --data=folder:photos --input_size=64 --cost=macs --target=8e6 "
        "--output_dir=runs/mine\n"
        "  fpnas train --architecture=runs/mine/architecture.json --data=folder:photos "
        "--random_flip --output_dir=runs/mine_trained\n"
        "  fpnas export --model=runs/mine_trained/model.keras --quantize=int8\n"
        "  fpnas predict --model=runs/mine_trained/model_int8.tflite photo.jpg\n\n"
        "`fpnas COMMAND --help` lists the flags of a command. `fpnas --version` tells the version."
    )


if __name__ == "__main__":
    sys.exit(main())
