"""Rope scaling against transformers: texts of any length, cached keys, batches, GGUF files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tiny_gguf import header_of, tensors_of, tokenizer_header, write_gguf
from tiny_models import VARIANTS, edit_config, make_model, write_checkpoint
from transformers.models.phi3 import modeling_phi3

from ttq_jax import generate
from ttq_jax.checkpoint import CheckpointError, load
from ttq_jax.config import ConfigError, Rope
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits
from ttq_jax.models.layers import rotate
from ttq_jax.models.rope import gguf_rope, hf_rope
from ttq_jax.models.settings import Settings

CONTEXT, ORIGINAL = 64, 32
FACTORS = {
    "short_factor": [1 + 0.1 * i for i in range(8)],
    "long_factor": [2 + i for i in range(8)],
}
SCALINGS = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn-all-keys": {
        "factor": 8.0, "original_max_position_embeddings": ORIGINAL, "beta_fast": 4,
        "beta_slow": 0.5, "mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False,
    },
    "yarn-attention-factor": {"factor": 4.0, "attention_factor": 0.7},
    "dynamic": {"factor": 3.0},
    "longrope": FACTORS | {"original_max_position_embeddings": ORIGINAL},
    "longrope-factor": FACTORS | {"original_max_position_embeddings": ORIGINAL, "factor": 1.5},
}  # fmt: skip


def entry(name):
    return {"rope_type": name.split("-")[0], "rope_theta": 1e4} | SCALINGS[name]


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Saves a tiny checkpoint with other arguments; (transformers' model, the directory)."""

    def get(variant="llama-gqa-untied", **arguments):
        kind, base = VARIANTS[variant]
        arguments = {"max_position_embeddings": CONTEXT} | arguments
        monkeypatch.setitem(VARIANTS, "here", (kind, base | arguments))
        return write_checkpoint(tmp_path / "m", "here"), tmp_path / "m"

    return get


def tokens_of(*lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(2, 256, n) for n in lengths]


def theirs(model, row):
    # A fresh rotation each time: transformers' dynamic scaling remembers the longest text.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    with torch.no_grad():
        return model(torch.from_numpy(row[None])).logits[0].numpy()


def ours(model, rows, prefill=None):
    """Logits of rows padded to the right; after `prefill` tokens the others are read one by one."""
    length = max(map(len, rows))
    tokens = np.zeros((len(rows), length), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], valid[i, : len(row)] = row, True
    tokens, valid = jnp.asarray(tokens), jnp.asarray(valid)
    cache = empty_cache(model.config, len(rows), length, jnp.float32)

    @jax.jit
    def step(tokens, valid, cache):
        hidden, cache, _ = forward(model.config, model.params, tokens, valid, cache)
        return logits(model.config, model.params, hidden), cache

    out, start = [], 0
    for stop in [length] if prefill is None else range(prefill, length + 1):
        part, cache = step(tokens[:, start:stop], valid[:, start:stop], cache)
        out.append(part)
        start = stop
    return np.concatenate(out, axis=1)


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("name", list(SCALINGS))
def test_texts_of_every_length_each_with_its_own_rotation(name, saved):
    """One batch: the longest row does not decide for the others."""
    reference, directory = saved(rope_parameters=entry(name))
    rows = tokens_of(5, ORIGINAL, ORIGINAL + 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT)
    for row, got in zip(rows, ours(load(directory), rows), strict=True):
        assert_close(got[: len(row)], theirs(reference, row))


@pytest.mark.parametrize("name", list(SCALINGS))
def test_old_keys_mean_the_same(name, saved):
    _, directory = saved(rope_parameters=entry(name))
    new = load(directory).config
    rope = {k: v for k, v in entry(name).items() if k not in {"rope_type", "rope_theta"}}
    old = {"type": name.split("-")[0], **rope}
    edit_config(directory, "rope_parameters", rope_scaling=old, rope_theta=1e4)
    assert load(directory).config == new
    edit_config(directory, rope_parameters=entry(name))
    assert load(directory).config == new


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_decoding_across_the_original_context(name, saved):
    """In one layer keys depend on no earlier rotation, so it is as if all were read at once."""
    reference, directory = saved(rope_parameters=entry(name), num_hidden_layers=1)
    model, (row,) = load(directory), tokens_of(CONTEXT + 6)
    got = ours(model, [row], prefill=ORIGINAL - 2)[0]
    for n in (ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, CONTEXT, CONTEXT + 1, CONTEXT + 6):
        assert_close(got[n - 1], theirs(reference, row[:n])[-1])


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_generation_across_the_original_context(name, saved):
    reference, directory = saved(rope_parameters=entry(name), num_hidden_layers=1)
    model = load(directory)
    at = {"dynamic": CONTEXT, "longrope": ORIGINAL}[name]
    prompt = "".join(chr(97 + i % 26) for i in range(at - 5))
    ids = list(model.tokenizer.encode(prompt))
    made = generate(model, [prompt], recipe=None, max_new_tokens=12)
    for token in made.tokens[0]:
        assert token == theirs(reference, np.array(ids))[-1].argmax()
        ids.append(token)
    assert len(ids) > at + 3


def test_gemma3_scales_its_full_layers_alone(saved):
    full = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e5,
            "original_max_position_embeddings": ORIGINAL}  # fmt: skip
    local = {"rope_type": "default", "rope_theta": 100.0}
    ropes = {"full_attention": full, "sliding_attention": local}
    reference, directory = saved("gemma3", rope_parameters=ropes)
    (row,) = tokens_of(CONTEXT)
    with torch.no_grad():
        expected = reference(torch.from_numpy(row[None])).logits[0].numpy()
    assert_close(ours(load(directory), [row])[0], expected)


def test_gemma3_full_layers_may_grow(saved):
    ropes = {
        "full_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    reference, directory = saved("gemma3", rope_parameters=ropes)
    (row,) = tokens_of(2 * CONTEXT)
    with torch.no_grad():
        expected = reference(torch.from_numpy(row[None])).logits[0].numpy()
    assert_close(ours(load(directory), [row])[0], expected)


def test_the_context_is_what_the_scaling_is_made_for(saved):
    _, directory = saved(rope_parameters=entry("dynamic"))
    assert load(directory).config.max_positions == 3 * CONTEXT
    edit_config(directory, rope_parameters=entry("yarn"))
    assert load(directory).config.max_positions == 4 * ORIGINAL
    edit_config(directory, rope_parameters=entry("longrope"))
    assert load(directory).config.max_positions == CONTEXT


@pytest.mark.parametrize("kind", ["default", "longrope"])
@pytest.mark.parametrize("share", [0.75, 0.5])
def test_some_channels_rotate(share, kind):
    """As Phi-3's do, whose family reads `partial_rotary_factor`."""
    count = int(16 * share) // 2
    rope = {"rope_type": kind} | (
        {k: v[:count] for k, v in FACTORS.items()} if kind == "longrope" else {}
    )
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": CONTEXT,
             "original_max_position_embeddings": ORIGINAL}  # fmt: skip
    config = transformers.Phi3Config(
        **sizes, pad_token_id=0, rope_parameters=rope | {"partial_rotary_factor": share}
    )
    embedding = modeling_phi3.Phi3RotaryEmbedding(config)
    q = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 4, 20, 16)).astype(np.float32))
    cos, sin = embedding(q, torch.arange(20)[None].expand(2, -1))
    expected, _ = modeling_phi3.apply_rotary_pos_emb(q, q, cos, sin)
    settings = Settings(sizes | {"rope_scaling": rope, "partial_rotary_factor": share})
    ours = hf_rope(settings, partial=True)
    got = rotate(
        jnp.asarray(q.numpy().swapaxes(1, 2)), jnp.tile(jnp.arange(20), (2, 1)),
        jnp.asarray(ours.inverse_frequencies(16))[None], jnp.float32(ours.attention_factor),
    )  # fmt: skip
    np.testing.assert_allclose(np.swapaxes(got, 1, 2), expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"theta": 1.0}, "theta > 1"),
        ({"theta": 1e4, "partial": 1.5}, "above 0 and up to 1, got 1.5"),
    ],
)
def test_rotations_that_cannot_be(rope, message):
    with pytest.raises(ConfigError, match=message):
        Rope(**rope)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "yarn", "factor": 0.5}, "factor >= 1, got .*factor=0.5"),
        ({"rope_type": "dynamic"}, r"expected the key 'rope_parameters\.factor'"),
        ({"rope_type": "longrope", **FACTORS, "long_factor": [1.0]}, "expected 8 long_factor"),
        ({"rope_type": "longrope"}, r"expected the key 'rope_parameters\.short_factor'"),
        ({"rope_type": "longrope", **FACTORS, "short_factor": [0, 1]}, r"short_factor: expected a"),
        (
            {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 1},
            "original_max_position_embeddings: expected at least 2",
        ),
        ({"rope_type": "axial"}, r"rope_parameters\.rope_type: rope scaling 'axial' is not"),
        ({"rope_type": "yarn", "type": "linear", "factor": 2.0}, "rope_type and .*type are two"),
    ],
)
def test_entries_that_cannot_be_served(rope, message, saved):
    _, directory = saved()
    edit_config(directory, rope_parameters=rope)
    with pytest.raises(CheckpointError, match=message):
        load(directory)


def test_the_context_must_be_known_where_the_rotation_needs_it(saved):
    _, directory = saved()
    edit_config(directory, "max_position_embeddings", rope_parameters=entry("dynamic"))
    with pytest.raises(CheckpointError, match="max_position_embeddings"):
        load(directory)
    assert json.loads((directory / "config.json").read_text())["model_type"] == "llama"


GGUF_KEYS = {
    "yarn": {
        "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": ORIGINAL,
    },
    "longrope": {
        "llama.rope.scaling.original_context_length": ORIGINAL,
        "llama.rope.scaling.attn_factor": float(np.sqrt(1 + np.log(2) / np.log(ORIGINAL))),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", list(GGUF_KEYS))
def test_gguf_files_say_it_in_their_own_keys(name, saved, tmp_path):
    reference, directory = saved(rope_parameters=entry(name))
    header = header_of(reference, "llama") | tokenizer_header(reference.config.vocab_size)
    tensors = tensors_of(reference, "llama")
    if name == "longrope":
        for kind in ("short", "long"):
            factors = np.array(FACTORS[f"{kind}_factor"], np.float32)
            tensors[f"rope_factors_{kind}.weight"] = factors
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", header | GGUF_KEYS[name], tensors)
    model = load(path)
    assert model.config.max_positions == load(directory).config.max_positions
    rows = tokens_of(ORIGINAL - 3, CONTEXT)
    for row, got in zip(rows, ours(model, rows), strict=True):
        assert_close(got[: len(row)], theirs(reference, row))


def test_keys_of_yarn_that_llama_cpp_does_not_read_are_noted():
    """Its converter writes them for every architecture."""
    keys = {"yarn_ext_factor": 0.5, "yarn_attn_factor": 0.88, "yarn_beta_fast": 4.0,
            "yarn_beta_slow": 0.0}  # fmt: skip
    usual = {"yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_beta_fast": 32.0,
             "yarn_beta_slow": 1.0}  # fmt: skip
    read = []
    for more, notes in (({}, 0), (usual, 0), (keys, 4)):
        header = GGUF_KEYS["yarn"] | {f"llama.rope.scaling.{k}": v for k, v in more.items()}
        settings = Settings(header)
        read.append(gguf_rope(settings, "llama"))
        settings.finish()
        assert len(settings.notes) == notes
        assert all("is not read, as in llama.cpp" in note for note in settings.notes)
    assert read[0] == read[1] == read[2]


@pytest.mark.parametrize("key", ["scaling.factor", "scale_linear"])
def test_a_gguf_factor_alone_scales(key):
    rope = gguf_rope(Settings({f"llama.rope.{key}": 4.0}), "llama")
    assert (rope.scaling, rope.factor) == ("linear", 4.0)
    header = {f"llama.rope.{key}": 4.0, "llama.rope.scaling.type": "none"}
    assert gguf_rope(Settings(header), "llama").scaling == "none"


@pytest.mark.parametrize("rotated", [16, 12])
def test_gguf_heads_may_rotate_in_part(rotated):
    settings = Settings({"phi3.rope.dimension_count": rotated, "phi3.rope.freq_base": 1e4})
    rope = gguf_rope(settings, "phi3", head_dim=16)
    settings.finish()
    assert rope.channels(16) == rotated
    expected = hf_rope(Settings({"partial_rotary_factor": rotated / 16}), partial=True)
    assert rope == expected


def test_gguf_headers_name_their_provenance(tmp_path):
    reference = make_model("llama-gqa-untied")
    header = header_of(reference, "llama") | tokenizer_header(reference.config.vocab_size)
    extra = {"mradermacher.quantized_by": "somebody", "quantize.imatrix.file": "x", "odd.key": 1}
    write_gguf(tmp_path / "m.gguf", "llama", header | extra, tensors_of(reference, "llama"))
    assert load(tmp_path / "m.gguf").notes == ()
    write_gguf(
        tmp_path / "n.gguf", "llama", header | {"llama.odd_key": 1}, tensors_of(reference, "llama")
    )
    model = load(tmp_path / "n.gguf", ignore_keys=["llama.odd_key"])
    assert model.notes == ("llama.odd_key = 1 is ignored, as asked",)


@pytest.mark.parametrize(
    "keys",
    [
        {"scaling.type": ["yarn"]}, {"scaling.type": 3}, {"scaling.type": "longrope"},
        {"scaling.type": "longrope", "long_factors": [2.0], "short_factors": [1.0],
         "scaling.factor": 2.0},
        {"scaling.type": "yarn", "long_factors": [2.0], "short_factors": [1.0]},
        {"scaling.type": "none", "long_factors": [2.0]},
    ],
)  # fmt: skip
def test_gguf_scalings_that_cannot_be_served(keys):
    header = {f"llama.rope.{key}": value for key, value in keys.items()}
    with pytest.raises(ConfigError, match=r"llama\.rope\.scaling\.type = .* is not implemented"):
        gguf_rope(Settings(header | {"llama.context_length": CONTEXT}), "llama")
