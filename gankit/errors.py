"""The one error type that means "the user can fix this"; the command line turns it into exit code 2."""


class UsageError(ValueError):
    """Input that cannot be used, said in one sentence that tells what to do.

    The command line prints the sentence without a traceback and exits with code 2.
    """
