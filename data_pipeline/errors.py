"""The exception for errors caused by the user's input or machine."""


class DataError(Exception):
    """A problem with the data or its settings; the message is one sentence: what is wrong, where, and how to fix it."""
