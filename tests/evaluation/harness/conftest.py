import socket

import jax
import pytest
from tiny_files import write_model

import ttq_jax as ttq


@pytest.fixture(autouse=True, scope="module")
def no_network():
    """Whatever would look something up fails at once."""

    def refuse(*args, **kwargs):
        raise AssertionError("a test reached for the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """These programs run for a millisecond: time goes into compiling them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("harness") / "model", bos=False)


@pytest.fixture(scope="session")
def model(directory):
    return ttq.load(directory)


@pytest.fixture(scope="session")
def reference(directory):
    """lm_eval's own adapter for transformers, on the same files."""
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    made = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return HFLM(made, tokenizer=tokenizer, device="cpu", max_length=64)
