"""Command line of the mutation runner; see ``--help``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: processes that have threads must not be forked
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from tests.helpers.mutate.child import ROOT
from tests.helpers.mutate.equivalents import FILE
from tests.helpers.mutate.runner import Outcome, Result, from_json, mutate, to_json


def main() -> int:
    """Returns 0 if each file reaches the score, 1 if not, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="bash tests/run.sh --mutate", description="Counts the changes of files that tests notice."
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file of pipeline/ or launch/")
    parser.add_argument(
        "--tests", action="append", metavar="FILE", help="test file, instead of those that the name and imports give"
    )
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="draw so many mutants of each file (default all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at a time")
    parser.add_argument("--only", default="", metavar="TEXT", help="only mutants whose function or line contains this")
    parser.add_argument("--limit", type=float, default=10.0, metavar="S", help="seconds of a test beside ten times its own (10)")
    parser.add_argument("--equivalents", type=Path, default=FILE, metavar="FILE", help="list of equivalent mutants")
    parser.add_argument("--slow", action="store_true", help="with the tests marked slow")
    parser.add_argument("--score", type=float, default=0.9, help="least fraction to be killed of those not equivalent")
    parser.add_argument("--json", type=Path, metavar="FILE", help="appends one line with all outcomes for each file")
    parser.add_argument("--again", type=Path, metavar="FILE", help="only survivors of an earlier --json run; add up")
    parser.add_argument("--verbose", action="store_true", help="print each mutant, not only survivors")
    options = parser.parse_args()
    results = []
    for name in options.files:
        path = Path(name).resolve()
        if not path.is_file() or not path.is_relative_to(ROOT) or path.suffix != ".py":
            print(f"{name} must be a Python file of this checkout", file=sys.stderr)
            return 2
        file = path.relative_to(ROOT).as_posix()

        def progress(outcome: Outcome, file: str = file) -> None:
            if options.verbose or outcome.status == "survived":
                place = f"{file}:{outcome.line}"
                print(f"{outcome.status:9} {place}  {outcome.text}\n{'':10}{outcome.change}  {outcome.by}", flush=True)

        try:
            result = mutate(
                file,
                tests=options.tests,
                marks="not gpu" if options.slow else "not slow and not gpu and not slurm",
                sample=options.sample,
                seed=options.seed,
                jobs=options.jobs,
                only=options.only,
                limit=options.limit,
                listed=options.equivalents,
                earlier=from_json(options.again, file) if options.again else None,
                progress=progress,
            )
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        for entry in result.unmatched:
            print(f"{options.equivalents.name}, {file}: fits no mutant: {entry}")
        if options.json:
            with options.json.open("a", encoding="utf-8") as stream:
                stream.write(to_json(result) + "\n")
        results.append(result)
        print(row(result), flush=True)
    print("\n" + "\n".join([HEAD, *map(row, results)]))
    return int(any(result.score < options.score for result in results))


HEAD = """| file | possible | run | killed | equivalent | survived | score | seconds |
|---|---|---|---|---|---|---|---|"""


def row(result: Result) -> str:
    """A file's row of the table."""
    counts = " | ".join(str(result.count(status)) for status in ("killed", "equivalent", "survived"))
    return (
        f"| {result.file} | {result.possible} | {len(result.outcomes)} | {counts} | {result.score:.0%} | {result.seconds:.0f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
