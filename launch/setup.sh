#!/usr/bin/env bash
# Makes the virtual environment and installs fovea into it. Sourced by launch/demo.sh, tests/run.sh and .ci/run:
#
#   . launch/setup.sh; fovea_setup [extra]     afterwards $FOVEA_PYTHON is the environment's python
#
# or run by itself:  bash launch/setup.sh [extra]      (for instance: bash launch/setup.sh test)
#
# FOVEA_VENV   the environment's folder, default .venv in the checkout
# FOVEA_FLOORS 1 installs the oldest versions that pyproject.toml admits, for testing them
# PYTHON       the python to make it with, default: the newest of 3.11 to 3.14 that is found

FOVEA_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
FOVEA_VENV="${FOVEA_VENV:-$FOVEA_ROOT/.venv}"
case "$FOVEA_VENV" in /*) ;; *) FOVEA_VENV="$PWD/$FOVEA_VENV" ;; esac
export FOVEA_VENV
FOVEA_PYTHON="$FOVEA_VENV/bin/python"

fovea_say() { printf '\033[2mfovea:\033[0m %s\n' "$*" >&2; }
fovea_fail() { printf 'fovea: %s\n' "$*" >&2; return 1; }

# Prints a python of version 3.11 or newer.
fovea_find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3.14 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1; then
            command -v "$candidate"
            return 0
        fi
    done
    fovea_fail "needs Python 3.11 to 3.14 and found none. Install one, for instance with
    apt install python3 python3-venv      (Debian 12, Ubuntu 24.04 or newer)
    uv python install 3.12                (anywhere, without root)
and run this again, with PYTHON=/path/to/python if it is not on the PATH."
}

# What a failed installation most likely means, in one sentence.
fovea_explain() {
    local log="$1"
    if grep -qiE 'no space left|disk quota' "$log"; then
        fovea_fail "the disk is full: the packages need about 12 GB in $FOVEA_VENV and in TMPDIR. Free some, or set FOVEA_VENV to a larger disk."
    elif grep -qiE 'temporary failure in name resolution|failed to establish a new connection|network is unreachable|connection (timed out|refused|reset)|read timed out|proxyerror|max retries' "$log"; then
        fovea_fail "the package index cannot be reached. Check the network, or set PIP_INDEX_URL (a mirror) or HTTPS_PROXY, and run this again."
    elif grep -qiE 'no matching distribution|could not find a version' "$log"; then
        fovea_fail "a package has no version for this machine. fovea needs Linux on x86-64 or arm64 with glibc 2.28 or newer, and pip's index must carry: $(grep -ioE 'no matching distribution found for [^ ]+' "$log" | tail -1 | sed 's/.*for //')"
    elif grep -qiE 'permission denied|read-only file system' "$log"; then
        fovea_fail "$FOVEA_VENV cannot be written. Set FOVEA_VENV to a folder of yours."
    else
        fovea_fail "the installation failed; pip's words are above and in $log."
    fi
}

fovea_setup() {
    local extra="${1:-}" target="$FOVEA_ROOT" stamp installed want python log
    stamp="$FOVEA_VENV/.fovea-installed${extra:+-$extra}"
    [ -n "$extra" ] && target="${target}[${extra}]"
    if [ -x "$FOVEA_PYTHON" ]; then
        want="$(fovea_key)"
        # An environment with what the tests need has all that the demo needs.
        for installed in "$stamp" ${extra:-"$FOVEA_VENV/.fovea-installed-test"}; do
            [ "$(cat "$installed" 2>/dev/null)" = "$want" ] && return 0
        done
    fi
    if [ ! -x "$FOVEA_PYTHON" ] || ! "$FOVEA_PYTHON" -c 'import pip' >/dev/null 2>&1; then
        python="$(fovea_find_python)" || return 1
        fovea_say "making $FOVEA_VENV with $("$python" --version 2>&1) ($python)"
        if ! "$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            fovea_fail "$python lacks the venv module. Install it, for instance with: apt install python3-venv"
            return 1
        fi
        if ! "$python" -m venv --clear "$FOVEA_VENV" >&2; then
            fovea_fail "$FOVEA_VENV cannot be made. Is the disk full, or the folder not yours? Set FOVEA_VENV to another."
            return 1
        fi
    fi
    local oldest=()
    if [ "${FOVEA_FLOORS:-}" = 1 ]; then
        fovea_floors >"$FOVEA_VENV/floors.txt"
        oldest=(-c "$FOVEA_VENV/floors.txt")
    fi
    log="$FOVEA_VENV/install.log"
    fovea_say "installing fovea${extra:+ with what $extra needs}: some gigabytes the first time (log: $log)"
    if ! "$FOVEA_PYTHON" -m pip install --disable-pip-version-check --no-input --progress-bar off ${oldest[@]+"${oldest[@]}"} -e "$target" >"$log" 2>&1 </dev/null; then
        tail -n 15 "$log" >&2
        fovea_explain "$log"
        return 1
    fi
    fovea_key >"$stamp"
    fovea_say "installed."
}

# The floor of each dependency, and of what benchmarks, exports and Parquet tables need, as pip's constraints.
fovea_floors() {
    "$FOVEA_PYTHON" - "$FOVEA_ROOT/pyproject.toml" <<'PYTHON'
import re, sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extras = project["optional-dependencies"]
for text in [*project["dependencies"], *extras["bench"], *extras["export"], *extras["parquet"]]:
    print(re.sub(r"\[.*\]", "", text).replace(">=", "=="))
PYTHON
}

# Changes when what is to be installed changes: pyproject.toml, the environment's python, the checkout's place.
fovea_key() {
    { cat "$FOVEA_ROOT/pyproject.toml" "$FOVEA_VENV/pyvenv.cfg"; echo "$FOVEA_ROOT" "${FOVEA_FLOORS:-}"; } | sha256sum | cut -d' ' -f1
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    case "${1:-}" in
        -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
        *) fovea_setup "${1:-}" ;;
    esac
fi
