"""Models on the Hugging Face hub: the needed files are downloaded, or found in its cache."""

import re
from pathlib import Path

from ttq_jax.checkpoint.errors import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_WANTED = ("*.json", "*.jinja", "*.safetensors", "tokenizer*", "vocab*", "merges.txt", "*.model")
# Second copies of the weights in other formats, which some repositories carry.
_UNWANTED = ("original/*", "onnx/*", "consolidated*", "metal/*", "gguf/*", "*/*")


def is_hub_id(model: str) -> bool:
    """Whether a string has the form "organization/name" or "organization/name@revision"."""
    return _HUB_ID.fullmatch(model) is not None


def snapshot(model: str) -> Path:
    """The local directory of a hub model, downloaded if need be.

    Args:
      model: "organization/name"; after "@" a branch, tag or commit, else the newest is taken.

    Returns:
      The directory, in the Hugging Face cache.

    Raises:
      CheckpointError: it does not exist, is not accessible, or there is no network and no copy.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = model.partition("@")
    try:
        path = huggingface_hub.snapshot_download(
            repository, revision=revision or None,
            allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED),
        )  # fmt: skip
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model}: access is restricted; accept its terms on huggingface.co and log in with "
            "`hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model}: no such model on the Hugging Face hub, and no such path here. Check the "
            "name; if it is private, log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{model}: {repository} is on the Hugging Face hub, but has no revision {revision!r}; "
            "give a branch, a tag or a commit"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"{model}: no such path here, not in the Hugging Face cache, and the hub cannot be "
            "reached (no network, or HF_HUB_OFFLINE is set). Connect, or give a local directory, a "
            ".gguf file or an alias"
        ) from error
    except Exception as error:
        # The hub's client lets through whatever its HTTP library raises, which varies by version.
        raise CheckpointError(
            f"{model}: downloading from the Hugging Face hub failed ({error}). Try again, or give "
            "a local directory, a .gguf file or an alias"
        ) from error
    return Path(path)
