#!/usr/bin/env bash
# Installs fovea with what its tests need (first call only) and runs the tests.
set -uo pipefail

usage() {
    cat <<'TEXT'
bash tests/run.sh [--fast | --full | --floors] [pytest arguments]
bash tests/run.sh --mutate FILE... [--sample N]

  bash tests/run.sh                            everything this machine can run, of large matrices every value or pair of values
  bash tests/run.sh --full                     all combinations too, and at the end what no test has reached
  bash tests/run.sh --fast                     without the tests marked slow
  bash tests/run.sh --floors                   fast tests, resume and export with the oldest versions that pyproject.toml admits
  bash tests/run.sh tests/config/test_load.py -k typo
  bash tests/run.sh -m gpu                     only the tests that need a CUDA device
  bash tests/run.sh -n 0 -x                    one at a time, to the first failure (otherwise several files at a time)
  bash tests/run.sh --mutate pipeline/losses/koleo.py --sample 40
                                               which changes of a file its fast tests notice; --mutate --help lists the options

Tests on real pictures look for them in FOVEA_TEST_DATA, else in ../shared/data beside the checkout, and skip without them.
  FOVEA_VENV=DIR   the virtual environment's folder (default .venv)
  PYTHON=FILE      the python 3.11 or newer to make it with
  FOVEA_WARM=0     start every process anew; otherwise, with a C compiler, a server that has imported torch forks them
  FOVEA_TEST_WORKERS=N        files at a time (default: two more than there are cores, with --fast one, at most 8)
  FOVEA_TEST_COSTS=FILE       record what each test costs (see tests/helpers/costs.py)
TEXT
}

arguments=() floors='' full='' mutate=''
for word in "$@"; do
    case "$word" in
        --mutate) mutate=1 ;;
        -h | --help) if [ -n "$mutate" ]; then arguments+=("$word"); else usage; exit 0; fi ;;
        --fast) arguments+=(-m "not slow") ;;
        --full) full=1 ;;
        --floors) floors=1 ;;
        *) arguments+=("$word") ;;
    esac
done
if [ -n "$floors" ]; then
    export FOVEA_FLOORS=1 FOVEA_VENV="${FOVEA_VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv-floors}"
fi
. "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"
fovea_setup test || exit 1
cd "$FOVEA_ROOT" || exit 1
[ -z "$mutate" ] || exec "$FOVEA_PYTHON" -m tests.helpers.mutate ${arguments[@]+"${arguments[@]}"} </dev/null
unset PYTHONDONTWRITEBYTECODE # a process compiles what it imports anew, and pytest what it rewrites, in every worker
# Many tests wait for other processes, and Slurm's tests for Slurm, so there are more at a time than there are cores.
cores=$(nproc) more=2
[[ " ${arguments[*]-} " != *" not slow "* ]] || more=1
several=(-n "${FOVEA_TEST_WORKERS:-$((cores < 7 ? cores + more : 8))}" --dist loadfile --no-loadscope-reorder)
if [ -n "$floors" ]; then
    run() { "$FOVEA_PYTHON" -m pytest -p no:cacheprovider "${several[@]}" "$@" </dev/null; }
    if [ "${#arguments[@]}" -gt 0 ]; then run "${arguments[@]}"; exit; fi
    run -m "not slow" && run -m slow tests/test_resume.py tests/weights/test_export.py
    exit
fi
if [ -n "$full" ]; then
    rm -rf build/coverage && mkdir -p build/coverage
    FOVEA_TESTS=full "$FOVEA_PYTHON" -m coverage run --rcfile=tests/coverage.ini -m pytest "${several[@]}" \
        ${arguments[@]+"${arguments[@]}"} </dev/null
    code=$?
    "$FOVEA_PYTHON" -m tests.helpers.untested
    exit $code
fi
exec "$FOVEA_PYTHON" -m pytest "${several[@]}" ${arguments[@]+"${arguments[@]}"} </dev/null
