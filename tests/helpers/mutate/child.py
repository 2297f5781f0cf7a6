"""Runs tests in a forked process, with a changed module."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import json
import linecache
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NoReturn

import pytest
from hypothesis import Phase, settings

from tests.helpers import rank_pool

ROOT = Path.cwd()


def is_package(name: str) -> bool:
    """Whether a module belongs to an installed package or the standard library, not to the checkout."""
    top = name.partition(".")[0]
    return not (ROOT / top).exists() and not (ROOT / f"{top}.py").exists()


def module_of(path: Path) -> str:
    """Name of the module in a file below the root."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class _Loader(SourceFileLoader):
    source = ""

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)

    def get_source(self, fullname: str) -> str:
        return self.source


class _Finder:
    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source, self.name = path, source, module_of(path)
        linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        loader = _Loader(name, str(self.path))
        loader.source = self.source
        folder = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(name, self.path, loader=loader, submodule_search_locations=folder)


@dataclass
class Baseline:
    """What the unchanged tests do: per test its seconds, those of its shared fixtures, and lines of the file; and more."""

    seconds: dict[str, float] = field(default_factory=dict)
    setup: dict[str, float] = field(default_factory=dict)
    lines: dict[str, list[int]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)


class Recorder:
    """Records the baseline. Lines that a shared fixture executes count for every test that uses it."""

    def __init__(self, path: Path, report: Path) -> None:
        self.path, self.report, self.baseline = str(path), report, Baseline()
        self.lines: set[int] = set()
        self.shared: dict[str, tuple[set[int], float]] = {}

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename != self.path:
            return None
        self.lines.add(frame.f_lineno)
        return self._trace

    @pytest.hookimpl
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.baseline.modules = list(sys.modules)
        _start_ranks(session.items)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
        before, self.lines, began = self.lines, set(), time.perf_counter()
        yield
        if fixturedef.scope != "function":
            lines, seconds = self.shared.get(fixturedef.argname, (set(), 0.0))
            self.shared[fixturedef.argname] = lines | self.lines, max(seconds, time.perf_counter() - began)
        self.lines |= before

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.lines = set()
        began = time.perf_counter()
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        yield
        sys.settrace(None)
        self.baseline.seconds[item.nodeid] = time.perf_counter() - began
        shared = [self.shared[name] for name in getattr(item, "fixturenames", ()) if name in self.shared]
        self.baseline.lines[item.nodeid] = sorted(self.lines.union(*(lines for lines, _ in shared)))
        self.baseline.setup[item.nodeid] = sum(seconds for _, seconds in shared)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.baseline.failed.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.report.write_text(json.dumps(vars(self.baseline)))


def _start_ranks(items: list[pytest.Item]) -> None:
    """Forks the pool of two ranks before a test makes a process group of this process, which ranks could not leave."""
    if any(getattr(getattr(item, "module", None), "pool", None) is rank_pool.pool for item in items):
        rank_pool.pool(2)


class Chosen:
    """Runs tests in a given order; ``rest`` runs those instead that are not in it. Ends the process when a test hangs."""

    def __init__(self, order: list[str], skipped: list[str], rest: bool, limits: dict[str, float], limit: float) -> None:
        self.order = {test: number for number, test in enumerate(order)}
        self.skipped, self.rest, self.limits, self.limit, self.report = set(skipped), rest, limits, limit, Path()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [one for one in items if (one.nodeid in self.order) != self.rest and one.nodeid not in self.skipped]
        items.sort(key=lambda one: self.order.get(one.nodeid, 0))
        _start_ranks(items)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.report.write_text("time limit")
        faulthandler.dump_traceback_later(self.limits.get(item.nodeid, self.limit), exit=True, file=sys.__stderr__)
        self.failed = ""
        yield
        faulthandler.cancel_dump_traceback_later()
        self.report.write_text(self.failed)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = report.nodeid


@dataclass
class Child:
    """A forked process that runs tests; ``code`` is pytest's, negative for a signal, None after the time limit."""

    path: Path
    source: str
    files: list[str]
    marks: str
    plugin: Any
    limit: float

    def start(self) -> None:
        """Forks it."""
        self.folder = Path(tempfile.mkdtemp(prefix="mutant-"))
        self.plugin.report = self.folder / "report"
        self.end = time.monotonic() + self.limit
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._run()

    def ended(self) -> bool:
        """Whether it has ended; it is killed at its time limit, and all its processes with it when it ends."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() < self.end:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if not pid:
            os.waitpid(self.pid, 0)
        return True

    def report(self) -> str:
        """What its plugin wrote; removes its files."""
        path = self.folder / "report"
        text = path.read_text() if path.exists() else ""
        shutil.rmtree(self.folder, ignore_errors=True)
        return text

    def _run(self) -> NoReturn:
        code = 3
        try:
            os.setsid()
            log = os.open(self.folder / "log", os.O_CREAT | os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.environ["TMPDIR"] = tempfile.tempdir = str(self.folder)
            sys.meta_path.insert(0, _Finder(self.path, self.source))  # type: ignore[arg-type]
            rank_pool.START = "fork"  # other ranks would import the file as it is

            settings.register_profile(
                "mutate", derandomize=True, database=None, deadline=None, phases=(Phase.explicit, Phase.generate)
            )
            settings.load_profile("mutate")
            words = ["-q", "--tb=short", "--no-header", "-p", "no:cacheprovider", "-m", self.marks]
            words += ["-x"] if isinstance(self.plugin, Chosen) else []
            code = int(pytest.main([*words, *self.files], plugins=[self.plugin]))
        finally:
            sys.stdout.flush()
            os._exit(code)
