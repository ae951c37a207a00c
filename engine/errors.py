"""User errors. `dist.run_main` ends the program with one line and exit status 2 for each of them."""

import sys


class UserError(Exception):
    """A setting, a file or a machine that cannot be used; the message says what is wrong and what would be right."""


class DataError(ValueError):
    """Data that cannot be used, such as a corrupt image. The message says why in one line."""


def warn(message: str):
    """Print one line on stderr about something suspicious that does not end the program."""
    print("warning: " + " ".join(message.split()), file=sys.stderr, flush=True)
