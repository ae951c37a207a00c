"""Errors that a person can mend. `processes.program` ends with one line and exit status 2 for each."""

import sys


class UserError(Exception):
    """A setting, a file or a machine that does not do, said in one line with what would."""


class DataError(ValueError):
    """Data that cannot be used, said in one line."""


def warn(message: str):
    """Something doubtful that does not end the program: one line on stderr."""
    print("warning: " + " ".join(message.split()), file=sys.stderr, flush=True)
