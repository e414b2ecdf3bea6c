"""The one exception of everything that reads models."""


class CheckpointError(ValueError):
    """A model that cannot be loaded: says what was expected, what came, and what to do."""
