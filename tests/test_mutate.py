"""The mutation runner: what it changes, and what becomes of mutants that die, survive, hang or are known."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.mutate.equivalents import equivalents
from tests.helpers.mutate.mutations import mutants

ROOT = Path(__file__).resolve().parents[1]

SMALL = '''"""A module."""
LOW = 0

def clamped(x):
    if x < LOW:
        return LOW
    return x

def counted(n):
    total = 0
    while n > 0:
        n -= 1
        total += 1
    return total
'''
TESTS = """import small

def test_clamped():
    assert [small.clamped(x) for x in (-2, 0, 3)] == [0, 0, 3]

def test_counted():
    assert small.counted(2) == 2
"""


def changes(source: str) -> list[str]:
    return [mutant.change for mutant in mutants(source)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b", ["a < b → a <= b", "a < b → a >= b"]),
        ("x = a == b in c", ["a == b in c → a != b in c", "a == b in c → a == b not in c"]),
        ("x = a and not b", ["a and not b → a or not b", "not b → b"]),
        ("x = a // b", ["a // b → a * b"]),
        ("x = 7", ["7 → 8", "7 → 6"]),
        ("x = True", ["True → False"]),
        ("x = a[b:c]", ["b:c → :c", "b:c → b:"]),
        ("x = min(a)", ["min(a) → max(a)"]),
        ("x = a if b else c", ["a if b else c → a if not b else c"]),
        ("f(a, key=b)", ["f(a, key=b) → pass", "f(a, key=b) → without key=b"]),
        ("x += a", ["x += a → pass", "x += a → x -= a"]),
        ("x.y = a", ["x.y = a → pass"]),
        ("raise E(1)", ["raise E(1) → pass"]),
        ("def f(a=1): return a", ["1 → 2", "1 → 0", "return a → return None"]),
        ("for a in b:\n    break", ["break → continue"]),
        ("while a: pass", ["a → not (a)"]),
        ("x = [a for a in b if c]", ["c → (not (c))"]),
    ],
)
def test_each_operation_has_its_changes(source: str, expected: list[str]) -> None:
    assert changes(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""Text 1."""',
        'x = "a" + "b"',
        'x = f"{a + 1}"',
        "x: int | None",
        "@f(1)\nclass A: pass",
        "from a import b",
        "def f(a: b[1]): pass",
    ],
)
def test_texts_types_decorators_and_imports_stay(source: str) -> None:
    assert not changes(source)


@pytest.mark.parametrize("file", ["pipeline/losses/koleo.py", "launch/slurm/decide.py"])
def test_mutants_of_a_file_differ_from_it_and_from_each_other(file: str) -> None:
    source = (ROOT / file).read_text(encoding="utf-8")
    made = mutants(source)
    trees = {ast.dump(ast.parse(mutant.source)) for mutant in made}
    assert len(trees) == len(made) > 50
    assert ast.dump(ast.parse(source)) not in trees
    assert len({mutant.key for mutant in made}) == len(made)


def run(folder: Path, *words: str, entries: str = "") -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    (folder / "small.py").write_text(SMALL)
    (folder / "test_small.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    gpu\n    slurm\n")
    (folder / "known.toml").write_text(entries)
    report = folder / "report"
    words = words if "test_none.py" in words or "test_bad.py" in words else ("--tests", "test_small.py", *words)
    words = ("small.py", "--equivalents", "known.toml", "--json", str(report), *words)
    command = [sys.executable, "-P", "-m", "tests.helpers.mutate", *words]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done, json.loads(report.read_text()) if report.exists() else {}


def test_a_noticed_change_dies_and_an_unnoticed_one_survives(tmp_path: Path) -> None:
    done, result = run(tmp_path, "--only", "x < LOW")
    outcomes = {outcome["change"]: (outcome["status"], outcome["by"]) for outcome in result["outcomes"]}
    assert outcomes == {
        "x < LOW → x <= LOW": ("survived", ""),
        "x < LOW → x >= LOW": ("killed", "test_small.py::test_clamped"),
    }
    assert (result["score"], done.returncode) == (0.5, 1)
    assert "survived  small.py:5  if x < LOW:" in done.stdout


@pytest.mark.slow
def test_a_known_mutant_does_not_run_and_an_entry_that_fits_none_is_reported(tmp_path: Path) -> None:
    entry = '[[equivalent]]\nfile = "small.py"\nin = "clamped"\nline = "if x < LOW:"\nreason = "same"\nchanges = ["{}"]\n'
    entries = entry.format("x < LOW → x <= LOW") + entry.format("x < LOW → y")
    done, result = run(tmp_path, "--only", "x < LOW", entries=entries)
    assert [outcome["status"] for outcome in result["outcomes"]] == ["equivalent", "killed"]
    assert result["unmatched"] == [["clamped", "if x < LOW:", "x < LOW → y"]]
    assert "fits no mutant" in done.stdout
    assert (result["score"], done.returncode) == (1.0, 0)


@pytest.mark.slow
def test_a_mutant_that_hangs_is_killed(tmp_path: Path) -> None:
    _, result = run(tmp_path, "--only", "n -= 1", "--limit", "2")
    assert {outcome["change"]: outcome["by"] for outcome in result["outcomes"]} == {
        "n -= 1 → pass": "time limit",
        "n -= 1 → n += 1": "time limit",
        "1 → 2": "test_small.py::test_counted",
        "1 → 0": "time limit",
    }


def test_a_sample_is_drawn_by_its_seed(tmp_path: Path) -> None:
    _, result = run(tmp_path, "--sample", "2", "--seed", "1", "--jobs", "2")
    assert len(result["outcomes"]) == 2 < result["possible"]


@pytest.mark.slow
def test_tests_that_fail_by_themselves_kill_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import small\n\ndef test_broken():\n    assert small.clamped(5) == 4\n")
    _, result = run(tmp_path, "--only", "x < LOW", "--tests", "test_broken.py")
    assert [outcome["status"] for outcome in result["outcomes"]] == ["survived", "killed"]


@pytest.mark.slow
def test_tests_that_cannot_run_are_a_mistake(tmp_path: Path) -> None:
    for file, text in (("test_none.py", ""), ("test_bad.py", "import small, absent")):
        (tmp_path / file).write_text(text)
        done, result = run(tmp_path, "--tests", file)
        assert (done.returncode, result) == (2, {})
        assert "cannot run" in done.stderr


def test_the_list_of_equivalent_mutants_fits_the_sources() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "tests/helpers/mutate/equivalent.toml").read_text(encoding="utf-8")).get("equivalent", [])
    for file in {entry["file"] for entry in listed}:
        assert equivalents(file).unmatched(mutants((ROOT / file).read_text(encoding="utf-8"))) == []


@pytest.mark.slow
def test_only_survivors_run_again(tmp_path: Path) -> None:
    run(tmp_path, "--only", "x < LOW")
    (tmp_path / "report").rename(tmp_path / "earlier")
    (tmp_path / "test_more.py").write_text(
        "import small\n\ndef test_more():\n    small.LOW = 0.0\n    assert str(small.clamped(0)) == '0'\n"
    )
    _, result = run(tmp_path, "--only", "x < LOW", "--tests", "test_more.py", "--again", "earlier")
    assert [outcome["by"] for outcome in result["outcomes"]] == ["test_more.py::test_more", "test_small.py::test_clamped"]
