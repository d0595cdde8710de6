"""`python -m fpnas_keras.building`: the command `fpnas build`."""

import sys

from fpnas_keras.building.build import COMMAND
from fpnas_keras.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
