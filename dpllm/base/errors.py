"""The one error a user can cause and mend."""


class InputError(ValueError):
    """Bad input: the message says what is wrong, where, and what to do. The CLI prints it and exits 2."""
