"""The exceptions of everything that reads models."""

from ttq_jax.errors import Error


class CheckpointError(Error):
    """A model that cannot be loaded; the message says what was expected and what to do."""


class StoreError(CheckpointError):
    """A store that cannot be read or written; the message says why and what to do."""
