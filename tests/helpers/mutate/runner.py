"""Chooses the tests of a file, runs its mutants, and counts."""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.helpers.mutate.child import ROOT, Baseline, Child, Chosen, Recorder, is_package, module_of
from tests.helpers.mutate.equivalents import FILE, equivalents
from tests.helpers.mutate.mutations import Mutant, mutants


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: killed (``by`` a test, or a time limit), survived, or equivalent (``by`` the reason)."""

    line: int
    scope: str
    text: str
    change: str
    status: str
    by: str = ""


@dataclass(frozen=True)
class Result:
    """The outcomes of a file; ``possible`` counts all its mutants, of which some may be left out."""

    file: str
    possible: int
    outcomes: list[Outcome]
    unmatched: list[tuple[str, str, str]]
    tests: list[str]
    seconds: float

    def count(self, status: str) -> int:
        """Number of mutants with a status."""
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def score(self) -> float:
        """Fraction killed of those that are not equivalent."""
        killed, survived = self.count("killed"), self.count("survived")
        return killed / (killed + survived) if killed + survived else 1.0


def tests_of(path: Path) -> list[str]:
    """Test files of a module: ``tests/<path>/test_<name>*.py``, and those beside it or above, below ``tests``, that import it, or
    from its package what it defines. Where there are none, all that do; where there are none either, all of ``tests/<path>``.
    """
    parts = path.relative_to(ROOT).parts
    mirror = ROOT.joinpath("tests", *(parts[1:-1] if parts[0] == "pipeline" else parts[:-1]))
    module, package = module_of(path), path.with_name("__init__.py")
    names = {module}
    if package.exists() and package != path:
        names |= {
            f"{module_of(package)}.{name.rpartition('.')[2]}" for name in _imported(package) if name.startswith(f"{module}.")
        }
    importers = {file for file in (ROOT / "tests").rglob("test_*.py") if not names.isdisjoint(_imported(file))}
    folders = {mirror, *mirror.parents} - {ROOT / "tests", *(ROOT / "tests").parents} or {mirror}
    beside = {*mirror.glob(f"test_{path.stem}*.py"), *(file for file in importers if file.parent in folders)}
    return sorted(str(file.relative_to(ROOT)) for file in beside or importers or mirror.glob("test_*.py"))


def _imported(file: Path) -> Iterator[str]:
    """What a file may import: modules, names, and with an asterisk what is imported by itself, which may be a package."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name for alias in node.names for name in (alias.name, f"{alias.name}.*"))
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}{end}" for alias in node.names for end in ("", ".*"))


def baseline_of(path: Path, files: list[str], marks: str) -> Baseline:
    """Runs the tests of a file unchanged, and imports what they need and does not need the file, for the processes to come.

    Raises:
        ValueError: the tests cannot be collected, or none passes.
    """
    names = {name for file in (path, *map(ROOT.joinpath, files)) for name in _imported(file)}
    ranks = {"deepspeed"} if "tests.helpers.rank_pool" in names else set()
    _load(ranks | {name for name in names if is_package(name) and not name.endswith(".*")})
    recorder = Recorder(path, path)
    child = Child(path, path.read_text(encoding="utf-8"), files, marks, recorder, 3600.0)
    child.start()
    while not child.ended():
        time.sleep(0.01)
    log = (child.folder / "log").read_text(errors="replace")
    report = child.report()
    if child.code not in (0, 1) or not report:
        raise ValueError(f"the tests of {path} cannot run (pytest ended with {child.code}):\n{log}")
    baseline = Baseline(**json.loads(report))
    if not baseline.seconds.keys() - set(baseline.failed):
        raise ValueError(f"no test of {path} passes:\n{log}")
    ours = [
        name
        for name in baseline.modules
        if not is_package(name) and not name.rpartition(".")[2].startswith(("test_", "conftest"))
    ]
    _load([name for name in baseline.modules if is_package(name)] + sorted(set(ours) - _dependents(module_of(path), ours)))
    gc.collect()
    gc.freeze()
    return baseline


def _load(names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _dependents(module: str, names: list[str]) -> set[str]:
    """Those of some modules that import a module, directly or not; it is one of them."""
    needs = {}
    for name in names:
        path = ROOT.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        parents = {".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)}
        needs[name] = parents | (set(_imported(file)) if file.exists() else set())
    found, size = {module}, 0
    while size != len(found):
        size = len(found)
        found |= {name for name, needed in needs.items() if needed & found}
    return found


class _Attempt:
    """A mutant on its way: first the tests that execute its lines, then all others of these files."""

    def __init__(self, mutant: Mutant, path: Path, files: list[str], baseline: Baseline, marks: str, limit: float) -> None:
        self.mutant, self.path, self.files, self.baseline, self.marks, self.limit = mutant, path, files, baseline, marks, limit
        first, last = mutant.lines
        tests = [test for test in baseline.seconds if test not in baseline.failed]
        if not mutant.at_import:
            tests = [test for test in tests if any(first <= line <= last for line in baseline.lines[test])]
        slowest = {file: max(baseline.seconds[t] for t in tests if t.startswith(f"{file}::")) for file in _files_of(tests)}
        self.order = sorted(tests, key=lambda test: (slowest[test.split("::")[0]], test.split("::")[0], baseline.seconds[test]))
        self.stages = [False, True] if self.order else [True]

    def next(self) -> None:
        """Starts the tests that come next."""
        rest = self.stages.pop(0)
        seconds = sum(self.baseline.seconds.values() if rest else (self.baseline.seconds[test] for test in self.order))
        files = self.files if rest else _files_of(self.order)
        limits = {test: self.limit + 10 * (own + self.baseline.setup[test]) for test, own in self.baseline.seconds.items()}
        plugin = Chosen(self.order, self.baseline.failed, rest, limits, self.limit)
        self.child = Child(self.path, self.mutant.source, files, self.marks, plugin, 60 + self.limit + 10 * seconds)
        self.child.start()

    def outcome(self) -> Outcome | None:
        """What the process that ended shows; None: the other tests are still to run."""
        code, failed = self.child.code, self.child.report()
        fixed = (self.mutant.line, *self.mutant.key)
        if code in (0, 5):  # 5: none of these tests exists
            return None if self.stages else Outcome(*fixed, "survived")
        by = "time limit" if code is None else failed or ("import" if code > 0 else f"signal {-code}")
        return Outcome(*fixed, "killed", by)


def _files_of(tests: list[str]) -> list[str]:
    return list(dict.fromkeys(test.split("::")[0] for test in tests))


def mutate(
    file: str,
    *,
    tests: list[str] | None = None,
    marks: str = "not slow and not gpu and not slurm",
    sample: int = 0,
    seed: int = 0,
    jobs: int = 1,
    only: str = "",
    limit: float = 10.0,
    listed: Path = FILE,
    earlier: Result | None = None,
    progress: Callable[[Outcome], None] = lambda outcome: None,
) -> Result:
    """Runs the mutants of a file.

    Args:
        file: the file, relative to the root of the checkout.
        tests: test files; None: see :func:`tests_of`.
        marks: pytest's expression of marks.
        sample: how many mutants to draw; 0 for all.
        seed: seed of the drawing.
        jobs: mutants at a time.
        only: only mutants whose scope or line contains this text.
        limit: seconds that a test has beside ten times those it takes.
        listed: file of the equivalent mutants.
        earlier: an earlier result; mutants killed there count as killed, so only its survivors run again.
        progress: called with each outcome.

    Raises:
        ValueError: there are no tests, or they do not run.
    """
    began = time.monotonic()
    path = ROOT / file
    possible, known = mutants(path.read_text(encoding="utf-8")), equivalents(file, listed)
    chosen = [mutant for mutant in possible if only in mutant.scope or only in mutant.text]
    if 0 < sample < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, sample), key=lambda mutant: mutant.line)
    files = tests or tests_of(path)
    if not files:
        raise ValueError(f"no test file is named after {file} or imports it; name some with --tests")
    outcomes: list[Outcome] = []

    def ended(outcome: Outcome) -> None:
        outcomes.append(outcome)
        progress(outcome)

    before = {(one.scope, one.text, one.change): one for one in earlier.outcomes if one.status == "killed"} if earlier else {}
    waiting = []
    for mutant in chosen:
        if reason := known.reason(mutant):
            ended(Outcome(mutant.line, *mutant.key, "equivalent", reason))
        elif mutant.key in before:
            ended(Outcome(mutant.line, *mutant.key, "killed", before[mutant.key].by))
        else:
            waiting.append(mutant)
    baseline = baseline_of(path, files, marks) if waiting else Baseline()
    waiting.reverse()
    running: list[_Attempt] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            attempt = _Attempt(waiting.pop(), path, files, baseline, marks, limit)
            attempt.next()
            running.append(attempt)
        for attempt in [one for one in running if one.child.ended()]:
            outcome = attempt.outcome()
            if outcome is None:
                attempt.next()
            else:
                running.remove(attempt)
                ended(outcome)
        time.sleep(0.005)
    outcomes.sort(key=lambda outcome: (outcome.line, outcome.text, outcome.change))
    seconds = time.monotonic() - began + (earlier.seconds if earlier else 0.0)
    return Result(file, len(possible), outcomes, known.unmatched(possible), files, seconds)


def from_json(path: Path, file: str) -> Result | None:
    """The last result of a file among the lines of :func:`to_json`."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for made in reversed([line for line in lines if line["file"] == file]):
        del made["score"]
        return Result(**{**made, "outcomes": [Outcome(**outcome) for outcome in made["outcomes"]]})
    return None


def to_json(result: Result) -> str:
    """One line of JSON, with the score."""
    return json.dumps({**asdict(result), "score": result.score}, ensure_ascii=False)
