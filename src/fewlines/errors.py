"""The one exception that a user is meant to read."""


class FewlinesError(Exception):
    """What was wrong, where, and what to write instead: one sentence, shown without a traceback."""
