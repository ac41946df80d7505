"""The one exception for what a user's input or machine caused."""


class DataError(Exception):
    """A mistake in the data or its settings, told in one sentence: what is wrong, where, and how to fix it."""
