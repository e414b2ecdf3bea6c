"""The exception of everything that reads models."""

from ttq_jax.errors import Error


class CheckpointError(Error):
    """A model that cannot be loaded; the message says what was expected and what to do."""
