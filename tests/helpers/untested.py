"""What no test reaches: functions that never run, errors that are never raised, settings that no test gives a value.

``python -m tests.helpers.untested`` reads what a full run recorded (``tests/run.sh --full``, ``tests/coverage.ini``). Processes
that are killed leave no record, so what only they do is listed too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "build" / "coverage"


def modules() -> list[Path]:
    """Source files of the two packages."""
    return sorted(path for package in ("pipeline", "launch") for path in (ROOT / package).rglob("*.py"))


def executed_lines() -> dict[Path, set[int]]:
    """For each file the numbers of the lines that ran in any process."""
    from coverage import CoverageData

    lines: dict[Path, set[int]] = {}
    for file in DATA.glob("data*"):
        data = CoverageData(str(file))
        data.read()
        for name in data.measured_files():
            lines.setdefault(Path(name), set()).update(data.lines(name) or ())
    return lines


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Public functions and methods with their qualified names."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node, f"{prefix}{node.name}.")


def has_body(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether there is anything to run: a protocol's or an abstract method is a docstring, ``...`` or ``raise``."""
    body = [one for one in node.body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
    return bool(body) and not (len(body) == 1 and isinstance(body[0], ast.Raise) and "NotImplemented" in ast.unparse(body[0]))


def lines_of(node: ast.AST) -> set[int]:
    """Numbers of the lines of the statements inside a node."""
    return {
        number
        for one in ast.walk(node)
        if isinstance(one, ast.stmt) and one is not node
        for number in range(one.lineno, (one.end_lineno or one.lineno) + 1)
    }


def unreached(executed: dict[Path, set[int]]) -> tuple[list[str], list[str], int, int]:
    """Functions that never ran and errors that were never raised, as ``file:line what``; and how many there are of each."""
    silent: list[str] = []
    unraised: list[str] = []
    public = raises = 0
    for path in modules():
        tree, lines, shown = ast.parse(path.read_text()), executed.get(path, set()), path.relative_to(ROOT)
        for name, function in functions(tree):
            if has_body(function):
                public += 1
                if not lines_of(function) & lines:
                    silent.append(f"{shown}:{function.lineno} {name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and "NotImplemented" not in ast.unparse(node.exc):
                raises += 1
                if not set(range(node.lineno, (node.end_lineno or node.lineno) + 1)) & lines:
                    unraised.append(f"{shown}:{node.lineno} {ast.unparse(node.exc)[:110]}")
    return silent, unraised, public, raises


def settings_keys() -> dict[str, str]:
    """All keys of all methods' configs, as written in a file, with the name of the last part."""
    from pipeline.config.load import schema
    from pipeline.config.schema import METHODS

    return {key: key.rpartition(".")[2] for method in METHODS for key in schema(method)}


def given_keys() -> set[str]:
    """Keys and ends of keys that tests give a value: in overrides, in YAML, in dictionaries, as keyword arguments."""
    found: set[str] = set()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"([a-z_]+(?:\.[a-z0-9_]+)+)\s*=", node.value))
                found |= set(re.findall(r"([a-z_]+(?:\.[a-z0-9_]+)+)$", node.value))
                found |= _yaml_keys(node.value)
            elif isinstance(node, ast.Dict):
                found |= {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
            elif isinstance(node, ast.Call):
                found |= {keyword.arg for keyword in node.keywords if keyword.arg}
    for path in sorted((ROOT / "tests").rglob("*.yaml")):
        found |= _yaml_keys(path.read_text())
    return found


def _yaml_keys(text: str) -> set[str]:
    if ":" not in text or len(text) > 100_000:
        return set()
    try:
        return set(_flattened(yaml.safe_load(text)))
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError):
        return set()


def _flattened(value: Any, prefix: str = "") -> Iterator[str]:
    for key, one in value.items() if isinstance(value, dict) else ():
        yield f"{prefix}{key}"
        yield from _flattened(one, f"{prefix}{key}.")


def main() -> None:
    """Print the lists and their lengths."""
    executed = executed_lines()
    if not executed:
        raise SystemExit("nothing is recorded; run bash tests/run.sh --full first")
    silent, unraised, public, raises = unreached(executed)
    keys, given = settings_keys(), given_keys()
    unset = sorted(key for key, last in keys.items() if not {key, last} & given)
    for title, found, total in (
        ("public functions that no test runs", silent, public),
        ("errors that no test raises", unraised, raises),
        ("settings that no test gives a value", unset, len(keys)),
    ):
        print(f"\n{title}: {len(found)} of {total}")
        print("".join(f"  {one}\n" for one in found), end="")


if __name__ == "__main__":
    main()
