"""What a person can mend: printed as one line that says what to do, never as a traceback."""


class UserError(Exception):
    """Bad usage: a wrong flag, column, file or configuration. Commands exit with 2."""

    exit_code = 2


class RunError(UserError):
    """The run or the machine is in a state that stops the command: locked, damaged, disk full.

    Commands exit with 1; nothing that was acknowledged before is lost.
    """

    exit_code = 1
