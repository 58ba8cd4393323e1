"""The one exception that means: the user can fix this."""


class InputError(ValueError):
    """A request that cannot be carried out; its message says what to change and fits on one line."""
