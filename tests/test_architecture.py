"""The house stands: who imports whom, what is documented, how long a file may be. Read from the source, nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "launch").rglob("*.py")])

# A module stands on the floor of its longest listed prefix and imports only what stands below, or in its own room.
FLOORS = {
    "pipeline": 0,
    "pipeline.errors": 0,
    "pipeline.masking": 0,
    "pipeline.untrusted": 0,
    "pipeline.runtime.locks": 0,
    "pipeline.config.paths": 0,
    "pipeline.runtime.interpreter": 0,
    "pipeline.config.schema": 0,
    "pipeline.config.types": 0,
    "pipeline.sections": 0,
    "pipeline.evaluation.settings": 0,
    "pipeline.methods": 0,
    "pipeline.data": 1,
    "pipeline.models": 1,
    "pipeline.losses": 1,
    "pipeline.tracking": 1,
    "pipeline.recipes": 2,
    "pipeline.evaluation": 2,
    "pipeline.training": 3,
    "pipeline.config.layers": 4,
    "pipeline.config.validate": 4,
    "pipeline.config.load": 4,
    "pipeline.weights.export": 4,
    "pipeline.bench": 4,
    "launch": 5,
}

# Neighbours on one floor that may be used nevertheless: config.py is read layer by layer, and tracking and data know nobody.
NEIGHBOURS = {
    ("pipeline.errors", "pipeline.masking"),
    ("pipeline.untrusted", "pipeline.masking"),
    ("pipeline.untrusted", "pipeline.errors"),
    ("pipeline.runtime.locks", "pipeline.untrusted"),
    ("pipeline.config.types", "pipeline.config.paths"),
    ("pipeline.config.types", "pipeline.untrusted"),
    ("pipeline.config.schema", "pipeline.config.types"),
    ("pipeline.config.schema", "pipeline.errors"),
    ("pipeline.config.schema", "pipeline.sections"),
    ("pipeline.config.schema", "pipeline.evaluation.settings"),
    ("pipeline.evaluation.settings", "pipeline.config.types"),
    ("pipeline.config.schema", "pipeline.methods"),
    ("pipeline.methods", "pipeline.config.types"),
    ("pipeline.methods", "pipeline.sections"),
    ("pipeline.sections", "pipeline.config.types"),
    ("pipeline.config.load", "pipeline.config.layers"),
    ("pipeline.config.load", "pipeline.config.validate"),
    ("pipeline.weights.export", "pipeline.config.load"),
    ("pipeline.bench", "pipeline.config.load"),
}

# Where a part of the outside world may be imported at all.
ONLY_IN = {
    "deepspeed": ("pipeline/training/engine.py",),
    "nvidia.dali": ("pipeline/data/augment/dali.py", "pipeline/bench/"),
    "mlflow": ("pipeline/tracking/",),
    "obstore": ("pipeline/data/storage/",),
    "boto3": ("pipeline/data/storage/",),
}

# What each room of the ground floors may know of the house.
MAY_KNOW = {
    "pipeline.losses": set(),
    "pipeline.models": {
        "pipeline.errors",
        "pipeline.untrusted",
        "pipeline.config.types",
        "pipeline.config.schema",
        "pipeline.methods",
    },
    "pipeline.data": {
        *("pipeline.errors", "pipeline.untrusted", "pipeline.runtime.locks", "pipeline.config.paths"),
        *("pipeline.config.types", "pipeline.config.schema", "pipeline.methods"),
    },
    "pipeline.tracking": {
        *("pipeline.errors", "pipeline.untrusted", "pipeline.runtime.locks", "pipeline.config.paths"),
        *("pipeline.config.types", "pipeline.config.schema", "pipeline.methods"),
    },
    "pipeline.recipes": {
        *("pipeline.errors", "pipeline.untrusted", "pipeline.config.types", "pipeline.config.schema", "pipeline.methods"),
        *("pipeline.models", "pipeline.losses", "pipeline.data.augment.views"),
    },
}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def room(module: str) -> str:
    return max((name for name in FLOORS if inside(module, name)), key=len, default="")


def imports(path: Path, *, hints: bool = True) -> Iterator[tuple[str, int]]:
    """Modules that a file names in imports, with the line; ``hints`` includes those under TYPE_CHECKING."""
    known = {module_of(file) for file in FILES}
    skipped: set[ast.AST] = set()
    for node in ast.walk(parsed(path)):
        if not hints and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            skipped |= {inner for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(parsed(path)):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *base.split(".")]).rstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in known or full in ONLY_IN else base), node.lineno


def ours(module: str) -> bool:
    return inside(module, "pipeline") or inside(module, "launch")


def test_there_is_a_house_to_look_at() -> None:
    assert len(FILES) > 10
    assert {"pipeline.config.load", "launch.cli.main"} <= {module_of(path) for path in FILES}


def test_no_import_runs_upward() -> None:
    wrong = []
    for path in FILES:
        here = room(module_of(path))
        for module, line in imports(path):
            there = room(module)
            if not ours(module) or here == there or (here, there) in NEIGHBOURS:
                continue
            if FLOORS[there] >= FLOORS[here] and there != "pipeline":
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_every_module_has_its_floor() -> None:
    homeless = [module_of(path) for path in FILES if room(module_of(path)) == "pipeline" and module_of(path) != "pipeline"]
    assert not homeless, f"give these a floor in FLOORS: {homeless}"


@pytest.mark.parametrize("package", sorted(MAY_KNOW))
def test_a_room_knows_only_what_it_may(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in FILES
        if inside(module_of(path), package)
        for module, line in imports(path)
        if ours(module) and not any(inside(module, known) for known in {package, *MAY_KNOW[package]})
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("outside", sorted(ONLY_IN))
def test_a_part_that_may_be_replaced_is_imported_in_one_place(outside: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in FILES
        for module, line in imports(path)
        if inside(module, outside) and not str(path.relative_to(ROOT)).startswith(ONLY_IN[outside])
    ]
    assert not wrong, f"{outside} is imported in {wrong}"


def test_losses_import_torch_and_nothing_else() -> None:
    allowed = (
        "torch",
        "pipeline.losses",
        "__future__",
        "math",
        "typing",
        "collections",
        "dataclasses",
        "functools",
        "itertools",
        "os",
        "contextlib",
        "importlib",
        "shutil",
        "triton",
    )
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in FILES
        if inside(module_of(path), "pipeline.losses")
        for module, line in imports(path)
        if not any(inside(module, name) for name in allowed)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_runs_in_a_circle() -> None:
    known = {module_of(path) for path in FILES}
    graph = {module_of(path): {m for m, _ in imports(path, hints=False) if m in known and m != module_of(path)} for path in FILES}
    state: dict[str, int] = {}

    def visit(module: str, way: tuple[str, ...]) -> None:
        if state.get(module) == 1:
            raise AssertionError(" -> ".join((*way[way.index(module) :], module)))
        if state.get(module) == 2:
            return
        state[module] = 1
        for other in sorted(graph[module]):
            visit(other, (*way, module))
        state[module] = 2

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize(
    "module",
    [
        "pipeline.config.types",
        "pipeline.sections",
        "pipeline.evaluation.settings",
        "pipeline.config.schema",
        "pipeline.errors",
        "pipeline.config.layers",
        "pipeline.config.validate",
        "pipeline.config.load",
        "launch.ranks",
        "launch.local",
    ],
)
def test_what_runs_before_torch_never_names_it(module: str) -> None:
    path = next(path for path in FILES if module_of(path) == module)
    heavy = {name.partition(".")[0] for name, _ in imports(path)} & {"torch", "timm", "numpy", "deepspeed", "nvidia", "mlflow"}
    assert not heavy


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_is_documented_and_no_file_is_long(path: Path) -> None:
    tree = parsed(path)
    assert ast.get_docstring(tree), "the file does not say what it is for"
    missing = []

    def look(body: list[ast.stmt], above: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if not ast.get_docstring(node) and not any(
                    ast.unparse(d) in ("overload", "override") for d in node.decorator_list
                ):
                    missing.append(f"{above}{node.name}")
                if isinstance(node, ast.ClassDef):
                    look(node.body, f"{above}{node.name}.")

    look(tree.body, "")
    assert not missing, f"no docstring: {missing}"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, "longer than 500 lines: split it"


def test_no_user_mistake_is_caught_by_a_bare_except() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert not wrong
