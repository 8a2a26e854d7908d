"""The three ways in which a script ends early, each told in one line (see `distlab.script`)."""


class UsageError(Exception):
    """A user's mistake; the text names the flag, the value and the remedy: status 2."""


class RunError(Exception):
    """What went wrong on the machine, such as a corrupt file or a full disk: status 1."""


class Skipped(Exception):
    """Why this machine cannot run the script: status 77."""
