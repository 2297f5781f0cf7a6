"""Mutation testing: changes one operation of a file at a time and runs the tests that execute it (``tests/run.sh --mutate``).

Each mutant runs in a process forked after torch, pytest and the other packages were imported, so a mutant costs its tests and
little more. mutmut 3 was considered: it leaves module-level code, properties and other decorated functions as they are, and has
no samples and no list of equivalent mutants outside the source; cosmic-ray starts pytest anew for each mutant.

``mutations`` lists the changes, ``child`` runs tests with one of them, ``runner`` chooses tests and counts, ``equivalents`` reads
``equivalent.toml``, the mutants that no test can kill. ``results.md`` has the last table.
"""
