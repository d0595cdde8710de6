"""The exceptions that the project raises for what is not a bug."""

import signal


class UserError(ValueError):
    """The input is wrong: an argument, a flag, a file, the data or the machine.

    The message is one line. It names the argument, flag or file, and says what was expected and
    what was received. Commands print it without a traceback. They exit with `exit_code`. Any other
    exception is a bug of this project and keeps its traceback.
    """

    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """A signal asks the process to end.

    Args:
        message: What to tell the user.
        number: Number of the signal.
    """

    def __init__(self, message: str = "interrupted", number: int = signal.SIGINT):
        super().__init__(message)
        self.signal = int(number)
