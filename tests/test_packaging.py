"""The package as PyPI would hand it out: what it holds, what it says, and that it runs.

Built and installed without a network.
"""

import ast
import itertools
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny_files import write_model

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PACKAGES = ("ttq_jax", "pallas_kernels")
# PYTHONPATH may lead to the repository.
OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
OUTSIDE["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source distribution and the wheel that was built from it."""
    # A copy, so that what an earlier build left behind cannot get in.
    source, out = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("dist")
    copytree(ROOT, source, ignore=ignore_patterns(".*", "*.egg-info", "build", "dist", "results"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_the_wheel_holds_the_two_packages_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    ours = {str(p.relative_to(ROOT)) for name in PACKAGES for p in ROOT.glob(f"{name}/**/*.py")}
    assert held == ours | {f"{name}/py.typed" for name in PACKAGES}


def test_the_source_distribution_holds_no_tests_and_no_experiments(built):
    with tarfile.open(built[0]) as sdist:
        top = {name.split("/")[1] for name in sdist.getnames() if "/" in name}
    assert top - {"PKG-INFO", "setup.cfg", "ttq_jax.egg-info"} == {
        *PACKAGES, "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py",
    }  # fmt: skip


def test_its_page_is_valid_and_its_links_lead_somewhere(built):
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        page = Metadata.from_email(wheel.read(name), validate=True)
    assert page.description_content_type == "text/markdown"
    links = re.findall(r"\]\(([^)#]+)", page.description)
    assert all(link.startswith("https://") for link in links)
    repository = page.project_urls["Repository"]
    files = re.findall(rf"\]\({repository}/(?:blob|raw)/main/([^)#]+)", page.description)
    assert files
    for file in files:
        assert (ROOT / file).exists(), file
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(page.classifiers))
    assert pythons
    assert all(page.requires_python.contains(python) for python in pythons)


def test_every_requirement_names_the_oldest_version_that_serves():
    lists = (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for requirement in map(Requirement, itertools.chain(*lists)):
        if requirement.name != PROJECT["name"]:
            assert {s.operator for s in requirement.specifier} & {">=", "=="}, str(requirement)


def test_it_requires_what_it_imports():
    extras = PROJECT["optional-dependencies"]
    lists = (PROJECT["dependencies"], extras["plots"], extras["lm-eval"])
    required = {canonicalize_name(Requirement(each).name) for each in itertools.chain(*lists)}
    imported = set()
    for path in (p for name in PACKAGES for p in ROOT.glob(f"{name}/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    found = packages_distributions()
    for name in imported - sys.stdlib_module_names - {*PACKAGES}:
        by = required & set(map(canonicalize_name, found[name]))
        assert by, f"{name} is imported, and no requirement brings it"
        required -= by
    assert not required, "required and not imported"


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """An environment with the wheel, which finds the dependencies where these tests find them.

    Of a directory that a .pth file names, Python reads no .pth files: that the repository is
    installed there, to be edited, means nothing in this environment.
    """
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True)
    install = ("install", "--quiet", "--no-deps", "--no-index", built[1])
    run(sys.executable, "-m", "pip", "--python", place / "bin" / "python", *install, env=OUTSIDE)
    packages = sysconfig.get_path("purelib", "venv", {"base": str(place)})
    theirs = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (Path(packages) / "dependencies.pth").write_text("\n".join(theirs))
    return place


def in_it(environment, cwd, *command):
    """Runs a command of the environment, in a directory that holds nothing of ours."""
    return run(environment / "bin" / command[0], *command[1:], cwd=cwd, env=OUTSIDE)


def test_what_is_installed_is_what_is_imported(environment, tmp_path):
    program = "import ttq_jax, pallas_kernels as p; print(ttq_jax.__file__, p.__file__, sep='\\n')"
    for path in in_it(environment, tmp_path, "python", "-c", program).splitlines():
        assert Path(path).is_relative_to(environment)


def test_the_command_is_installed(environment, tmp_path):
    assert in_it(environment, tmp_path, "ttq", "demo", "--help").startswith("usage: ttq demo")


def test_it_answers(environment, tmp_path):
    model = write_model(tmp_path / "model")
    options = ("--max-new-tokens", "4", "--json", "--no-compilation-cache")
    command = ("ttq", "generate", "--model", model, "--prompt", "Hello", *options)
    answer = json.loads(in_it(environment, tmp_path, *command))
    assert answer["new_tokens"] == 4
