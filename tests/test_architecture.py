"""The house rules that a machine can check: imports run one way, files and functions stay short,
every public name is documented."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("ttq_jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")])
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in SOURCES
}

# The rooms of the house, lowest first: a package is one room, a stage is one. A room imports only
# from the rows above its own, so there is no circle between rooms.
ORDER = [
    {"pallas_kernels"},
    {"_version", "errors"},
    {"foreign", "host"},
    {"config", "files", "text", "types"},
    {"draft_costs", "partition"},
    {"mesh", "processes"},
    {"linear", "prompts", "sampling"},
    {"experts"},
    {"models", "quant"},
    {"functions", "sites"},
    {"checkpoint", "prefill"},
    {"chat", "decode", "finite"},
    {"offline"},
    {"generation", "speculation"},
    {"auto_drafts"},
    {"stages"},
    {"measured_drafts"},
    {"generate"},
    {"stream"},
    {"chips"},
    {"evaluation"},
    {"sweeps"},
    {"commands"},
]
# The package's face names what everybody may use; `python -m ttq_jax` is the command line.
TOP = {"ttq_jax", "ttq_jax.__main__"}
KERNEL_USERS = {
    "ttq_jax.types", "ttq_jax.partition", "ttq_jax.linear", "ttq_jax.experts",
    "ttq_jax.quant.convert", "ttq_jax.quant.grid", "ttq_jax.commands.kernels",
    "ttq_jax.chips.comparison", "ttq_jax.chips.device_times", "ttq_jax.models.prompt_attention",
    "ttq_jax.models.triton_attention",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write imports in full"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import module` means the module.
            found |= {name if name in MODULES else node.module for name in names}
    return found


def room(module: str) -> str:
    first, *rest = module.split(".")
    return rest[0] if first == "ttq_jax" and rest else first


def rank(module: str) -> int:
    for i, rooms in enumerate(ORDER):
        if room(module) in rooms:
            return i
    raise AssertionError(f"{module} has no place in ORDER")


def ours(module: str) -> set[str]:
    """What a module imports of this repository, each as the module that is meant."""
    return {m for m in imports(MODULES[module]) if m.split(".")[0] in {"ttq_jax", "pallas_kernels"}}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - TOP))
def test_imports_run_one_way(module):
    for other in ours(module):
        assert other not in TOP, f"{module} imports the top"
        if room(other) != room(module):
            assert rank(other) < rank(module), f"{module} imports {other}, which is not below it"
        if other.startswith("pallas_kernels") and not module.startswith("pallas_kernels"):
            assert module in KERNEL_USERS, f"{module} touches the kernels; only {KERNEL_USERS} may"
    used = {m.split(".")[0] for m in imports(MODULES[module])}
    assert not used & {"experiments", "tests"}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A way through the graph that comes back to where it began, [] if there is none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node not in done:
            for other in sorted(graph.get(node, ())):
                if found := walk(other, [*path, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in graph if (found := walk(node, []))), [])


def test_no_file_imports_itself_by_a_detour():
    graph = {module: ours(module) - {module} for module in MODULES}
    assert not circle(graph)
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_the_order_names_every_room():
    rooms = {room(module) for module in MODULES.keys() - TOP}
    assert rooms == set().union(*ORDER)


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


def test_no_two_test_files_share_a_name():
    """pytest imports them by it, and one worker finds the other's file."""
    names = Counter(p.name for p in ROOT.glob("tests/**/*.py") if p.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_no_tuned_imports_at_start_up():
    """The heavy libraries are imported where they are used, never on the way in."""
    heavy = {"transformers", "torch", "datasets", "optax", "orbax", "lm_eval", "matplotlib"}
    for module, path in MODULES.items():
        top = ast.parse(path.read_text()).body
        names = {n.module or "" for n in top if isinstance(n, ast.ImportFrom)}
        names |= {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
        assert not {n.split(".")[0] for n in names} & heavy, f"{module} imports one at the top"
