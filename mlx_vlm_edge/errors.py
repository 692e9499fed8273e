"""The one exception meant for users: a single line that names the cause and the remedy."""


class UsageError(Exception):
    """A mistake the user can mend. The command line prints it and exits with code 2.

    Python callers may catch it as well: nothing was written when it is raised.
    """
