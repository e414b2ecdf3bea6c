"""The exception of everything that reads models."""


class CheckpointError(ValueError):
    """A model that cannot be loaded; the message says what was expected and what to do."""
