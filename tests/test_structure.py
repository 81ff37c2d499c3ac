"""The plan of the code: which package imports which, how large things are, what users import."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fadiag_fast"

# From the ground up: a package imports from floors below its own, never from its own or above.
FLOORS = (
    ("_version", "_common"),
    ("ops", "protocol", "checkpoints"),
    ("report", "capture"),
    ("credit", "programs"),
    ("diagnosis", "scanning"),
    ("training",),
    ("reports", "zoo", "integrations"),
    ("", "study"),
    ("cli",),
    ("__main__",),
)
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}
# What the protocol's arithmetic must not need.
WITHOUT_TORCH = ("_version", "protocol")
LONGEST_FILE, LONGEST_CLASS, MOST_ATTRIBUTES = 700, 400, 30


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}
TREES = {module: ast.parse(path.read_text("utf-8")) for module, path in MODULES.items()}


def package_of(module: str) -> str:
    return module.partition(".")[0]


def target(module: str, node: ast.ImportFrom) -> str | None:
    """The module of the package that an import names, None for another package's."""
    named = (node.module or "").split(".") if node.module else []
    if not node.level:
        return ".".join(named[1:]) if named[:1] == ["fadiag_fast"] else None
    base = module.split(".") if module else []
    if MODULES[module].name != "__init__.py":
        base = base[:-1]
    return ".".join([*base[: len(base) - node.level + 1], *named])


def imports(module: str) -> Iterator[tuple[str, ast.ImportFrom]]:
    """What a module imports of the package, wherever in it."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and (found := target(module, node)) is not None:
            for alias in node.names:
                inner = f"{found}.{alias.name}".lstrip(".")
                yield (inner if inner in MODULES else found), node


def within_functions(module: str) -> set[int]:
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    outer = (node for node in ast.walk(TREES[module]) if isinstance(node, functions))
    return {id(inner) for node in outer for inner in ast.walk(node)}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """What is left when everything without an import left is taken away, again and again."""
    graph = {module: found & graph.keys() - {module} for module, found in graph.items()}
    while ground := [module for module, found in graph.items() if not found]:
        for module in ground:
            del graph[module]
        graph = {module: found - set(ground) for module, found in graph.items()}
    return sorted(graph)


def test_modules_import_without_a_circle():
    assert circles({module: {found for found, _ in imports(module)} for module in MODULES}) == []


def test_the_search_for_circles_finds_one():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_no_import_runs_back_up():
    upward = {
        f"{module} imports {found}, line {node.lineno}"
        for module in MODULES
        for found, node in imports(module)
        if package_of(module) != package_of(found)
        and FLOOR[package_of(found)] >= FLOOR[package_of(module)]
    }
    assert upward == set()


def test_every_package_has_a_floor():
    assert {package_of(module) for module in MODULES} == set(FLOOR)


def test_no_import_hides_in_a_function():
    # __main__ imports within: what is interrupted there has to end like any other command.
    hidden = {
        f"{module}: {found}, line {node.lineno}"
        for module in MODULES.keys() - {"__main__"}
        for found, node in imports(module)
        if id(node) in within_functions(module)
    }
    assert hidden == set()


def test_the_protocol_needs_no_torch():
    found = {
        (module, name)
        for module in MODULES
        if package_of(module) in WITHOUT_TORCH
        for node in ast.walk(TREES[module])
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if name.partition(".")[0] == "torch"
    }
    assert found == set()


def attributes(node: ast.ClassDef) -> set[str]:
    """The names that a class's methods assign to ``self``, and its fields."""
    assigned = {
        name.attr
        for name in ast.walk(node)
        if isinstance(name, ast.Attribute)
        and isinstance(name.ctx, ast.Store)
        and isinstance(name.value, ast.Name)
        and name.value.id == "self"
    }
    fields = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
    return assigned | {field.id for field in fields if isinstance(field, ast.Name)}


def test_files_and_classes_can_be_read_in_one_sitting():
    large = [
        f"{module}: {lines} lines"
        for module, path in MODULES.items()
        if (lines := len(path.read_text("utf-8").splitlines())) > LONGEST_FILE
    ]
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > LONGEST_CLASS or len(attributes(node)) > MOST_ATTRIBUTES:
                    large.append(f"{module}.{node.name}: {lines}, {len(attributes(node))}")
    assert large == []


# What users may import: a package with a face, or the module of an integration.
FACES = {
    "fadiag_fast" + (f".{module}" if module else "")
    for module, path in MODULES.items()
    if path.name == "__init__.py" and not module.startswith("_") and module != "cli"
} | {f"fadiag_fast.integrations.{name}" for name in ("accelerate", "huggingface", "lightning")}
SHOWN = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*.py"))]


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.name)
def test_what_users_are_shown_imports_from_faces(path):
    text = path.read_text("utf-8")
    found = re.findall(r"^\s*(?:>>> )?(?:from|import) (fadiag_fast[\w.]*)", text, re.M)
    assert [name for name in found if name not in FACES] == []


@pytest.mark.parametrize("module", [m for m, p in MODULES.items() if p.name == "__init__.py" and m])
def test_a_face_names_what_it_offers(module):
    """Whatever a package's __init__ imports from within is in __all__, and nothing is private."""
    if package_of(module).startswith("_"):
        return
    imported = {
        alias.asname or alias.name
        for node in TREES[module].body
        if isinstance(node, ast.ImportFrom)
        and (found := target(module, node)) is not None
        and (found == module or found.startswith(f"{module}."))
        for alias in node.names
    }
    (names,) = [
        ast.literal_eval(node.value)
        for node in TREES[module].body
        if isinstance(node, ast.Assign)
        and [getattr(goal, "id", "") for goal in node.targets] == ["__all__"]
    ] or [[]]
    assert imported <= set(names)
    assert [name for name in names if name.startswith("_")] == []
