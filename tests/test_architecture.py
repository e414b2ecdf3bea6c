"""The house rules that a machine can check: imports run one way, files and functions stay short,
every public name is documented."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("ttq_jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")])
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in SOURCES
}

# Layers of the package, lowest first: a module imports only from its own row or the rows above.
# The row is the first whose prefix matches.
ORDER = [
    ("pallas_kernels",),
    ("ttq_jax._version", "ttq_jax.config", "ttq_jax.types", "ttq_jax.chips"),
    ("ttq_jax.linear", "ttq_jax.cycles", "ttq_jax.prompts", "ttq_jax.timing"),
    ("ttq_jax.bench", "ttq_jax.bench_device"),
    ("ttq_jax.models", "ttq_jax.quant"),
    ("ttq_jax.released",),
    ("ttq_jax.checkpoint", "ttq_jax.sampling", "ttq_jax.hub_text", "ttq_jax.corpora"),
    ("ttq_jax.prefill", "ttq_jax.decode"),
    ("ttq_jax.prior", "ttq_jax.samples"),
    ("ttq_jax.calibrate", "ttq_jax.allocate"),
    ("ttq_jax.generate", "ttq_jax.perplexity"),
    ("ttq_jax.continuations",),
    ("ttq_jax",),
]
FORBIDDEN = [("ttq_jax.models", "ttq_jax.quant"), ("ttq_jax.quant", "ttq_jax.models")]
KERNEL_USERS = {
    "ttq_jax.linear", "ttq_jax.quant.convert", "ttq_jax.quant.grid", "ttq_jax.kernel_list",
    "ttq_jax.bench", "ttq_jax.bench_device",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write imports in full"
            found.add(node.module)
    return found


def rank(module: str) -> int:
    for i, prefixes in enumerate(ORDER):
        if any(module == p or module.startswith(p + ".") for p in prefixes):
            return i
    raise AssertionError(f"{module} has no place in ORDER")


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    used = imports(MODULES[module])
    ours = {m for m in used if m.split(".")[0] in {"ttq_jax", "pallas_kernels"}}
    for other in ours:
        if module != "ttq_jax":
            assert other != "ttq_jax" or rank(module) == len(ORDER) - 1, f"{module} imports the top"
        assert rank(other) <= rank(module), f"{module} imports {other}, which is above it"
    for importer, imported in FORBIDDEN:
        if inside(module, importer):
            assert not any(inside(m, imported) for m in ours), f"{module} imports {imported}"
    if inside(module, "pallas_kernels"):
        assert not any(inside(m, "ttq_jax") for m in ours)
    elif any(inside(m, "pallas_kernels") for m in ours):
        assert module in KERNEL_USERS, f"{module} touches the kernels; only {KERNEL_USERS} may"
    assert not any(m.split(".")[0] in {"experiments", "tests"} for m in used)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400, "a file is one stage, at most 400 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            has_doc = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
            first = body[1].lineno if has_doc and len(body) > 1 else body[0].lineno
            length = node.end_lineno - first + 1
            assert length <= 60, f"{node.name} is {length} lines long, its docstring not counted"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_names_are_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module's docstring says what it is for"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                for member in node.body:
                    if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                        assert ast.get_docstring(member), f"{node.name}.{member.name}"


def test_no_tuned_imports_at_start_up():
    """The heavy libraries are imported where they are used, never on the way in."""
    heavy = {"transformers", "torch", "datasets", "optax", "orbax", "lm_eval", "matplotlib"}
    for module, path in MODULES.items():
        top = ast.parse(path.read_text()).body
        names = {n.module or "" for n in top if isinstance(n, ast.ImportFrom)}
        names |= {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
        assert not {n.split(".")[0] for n in names} & heavy, f"{module} imports one at the top"
