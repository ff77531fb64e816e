"""The errors that the command line shows as one sentence."""


class UsageError(ValueError):
    """Input that cannot be used, said in one sentence that tells what to do.

    The command line prints the sentence without a traceback and exits with code 2.
    """


class Diverged(ArithmeticError):
    """Training produced a value that is not finite; the message names step and term. Exit code 1."""


class Lost(RuntimeError):
    """Another process of this run ended, or cannot be reached. Exit code 1."""
