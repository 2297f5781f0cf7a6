"""The house stands: who imports whom, what is documented, how long a file may be. Read from the source, nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.sources import kept, parsed

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "launch").rglob("*.py")])

# The rooms from the ground up. A module belongs to the longest name that fits, and imports only its own room and those before it.
ROOMS = (
    "pipeline.masking",
    "pipeline.errors",
    "pipeline.untrusted",
    "pipeline.config",
    "pipeline.runtime",
    "pipeline.tracking",
    "pipeline.losses",
    "pipeline.models",
    "pipeline.data.storage",
    "pipeline.data.formats",
    "pipeline.data.index",
    "pipeline.data.order",
    "pipeline.data.augment",
    "pipeline.data.loader",
    "pipeline.data.inspect",
    "pipeline.data.pack",
    "pipeline.data",
    "pipeline.methods",
    "pipeline.checkpoint",
    "pipeline.weights",
    "pipeline.estimate",
    "pipeline.evaluation",
    "pipeline.training",
    "pipeline.bench",
    "pipeline.reports",
    "launch",
    "launch.slurm",
    "launch.cli",
)
GROUND = {"pipeline.masking", "pipeline.errors", "pipeline.untrusted", "pipeline.config"}

# Where a part of the outside world may be imported at all.
ONLY_IN = {
    "deepspeed": ("pipeline/training/engine.py",),
    "nvidia.dali": ("pipeline/data/augment/dali.py", "pipeline/data/augment/dali_hue.py", "pipeline/bench/"),
    "mlflow": ("pipeline/tracking/",),
    "matplotlib": ("pipeline/reports/figures.py",),
    "obstore": ("pipeline/data/storage/",),
    "webdataset": ("pipeline/data/pack/shard_writer.py", "pipeline/bench/"),
    "boto3": ("pipeline/data/storage/",),
}
SLURM = {"sbatch", "squeue", "scontrol", "sacct", "scancel", "sinfo"}

# Rooms that know less than the order would let them.
KNOWS = {
    "pipeline.losses": set(),
    "pipeline.tracking": {*GROUND, "pipeline.runtime"},
    "pipeline.models": GROUND,
    "pipeline.data": {*GROUND, "pipeline.runtime"},
    "pipeline.methods": {
        *GROUND,
        "pipeline.models",
        "pipeline.losses",
        "pipeline.data.augment.operators",
        "pipeline.data.augment.views",
    },
}
METHOD_SURFACE = {"pipeline.methods.base", "pipeline.methods.registry", "pipeline.methods.health_metrics", "pipeline.methods"}
HEAVY = {"torch", "timm", "numpy", "deepspeed", "nvidia", "mlflow", "matplotlib"}


@cache
def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def room(module: str) -> str:
    """The room of a module. Settings stand beside their users and are the configuration's."""
    if module.startswith("pipeline.") and module.endswith("settings"):
        return "pipeline.config"
    return max((name for name in ROOMS if inside(module, name)), key=len, default="")


@cache
def modules() -> dict[str, Path]:
    return {module_of(path): path for path in FILES}


@kept
def imports(path: Path, *, hints: bool = True) -> Iterator[tuple[str, int]]:
    """Modules that a file names in imports, with the line; ``hints`` includes those under TYPE_CHECKING."""
    known = modules()
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
            if there and (not here or ROOMS.index(there) > ROOMS.index(here)):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_every_module_has_its_room() -> None:
    homeless = [module_of(path) for path in FILES if not room(module_of(path)) and module_of(path) != "pipeline"]
    assert not homeless, f"in no room: {homeless}"
    assert set(ROOMS) == {room(module_of(path)) for path in FILES} - {""}, "a room is empty"


def test_settings_know_nothing_but_settings() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in FILES
        if module_of(path).startswith("pipeline.") and module_of(path).endswith("settings")
        for module, line in imports(path)
        if ours(module) and module not in ("pipeline.config.types", "pipeline.errors") and not module.endswith("settings")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", sorted(KNOWS))
def test_a_room_knows_only_what_it_may(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in FILES
        if inside(room(module_of(path)), package)
        for module, line in imports(path)
        if ours(module) and not any(inside(module, known) or inside(room(module), known) for known in {package, *KNOWS[package]})
    ]
    assert not wrong, "\n".join(wrong)


def test_the_trainer_knows_no_method() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in FILES
        if room(module_of(path)) == "pipeline.training"
        for module, line in imports(path)
        if inside(module, "pipeline.methods") and module not in METHOD_SURFACE
    ]
    assert not wrong, "\n".join(wrong)


def test_slurms_commands_are_called_in_one_place() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.value}"
        for path in FILES
        if not inside(module_of(path), "launch.slurm")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.List | ast.Tuple)
        for node in node.elts[:1]
        if isinstance(node, ast.Constant) and node.value in SLURM
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


def loaded_by(module: str) -> dict[str, tuple[str, ...]]:
    """Everything that importing a module imports, with the way to it: what stands in functions and for type hints does not."""
    known = modules()
    ways: dict[str, tuple[str, ...]] = {module: ()}
    waiting = [module]
    while waiting:
        here = waiting.pop()
        above = [".".join(here.split(".")[:n]) for n in range(1, here.count(".") + 1)]
        for other in [*above, *at_import(known[here])]:
            if other not in ways:
                ways[other] = (*ways[here], here)
                if other in known:
                    waiting.append(other)
    return ways


@kept
def at_import(path: Path) -> Iterator[str]:
    """Modules that a file imports when it is itself imported."""
    known = modules()

    def look(body: list[ast.stmt]) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield full if full in known else node.module or ""
            elif isinstance(node, ast.If) and not ast.unparse(node.test).endswith("TYPE_CHECKING"):
                yield from look([*node.body, *node.orelse])
            elif isinstance(node, ast.Try | ast.With):
                yield from look(node.body)

    return look(parsed(path).body)


BEFORE_TORCH = sorted(
    {"launch.cli.main", "launch.local", "launch.rank_environment", "launch.slurm.supervisor"}
    | {module_of(path) for path in FILES if room(module_of(path)) == "pipeline.config"}
)


@pytest.mark.parametrize("module", BEFORE_TORCH)
def test_what_runs_before_torch_never_loads_it(module: str) -> None:
    ways = loaded_by(module)
    heavy = {other: " -> ".join(way) for other, way in ways.items() if other.partition(".")[0] in HEAVY}
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


def test_no_test_is_left_out_for_a_library_that_the_tests_need() -> None:
    name = "importor" + "skip"
    wrong = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py") if name in path.read_text(encoding="utf-8")]
    assert not wrong, f"import it: extra `test` of pyproject.toml installs it: {wrong}"
