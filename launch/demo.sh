#!/usr/bin/env bash
# Installs fovea into .venv (first call only) and runs the demonstration.
set -uo pipefail

usage() {
    cat <<'TEXT'
bash launch/demo.sh [--minutes N] [--method dinov2] [--data SHARDS] [--val SHARDS] [--directory DIR]

Draws a small data set, trains on it with two ranks (all GPUs if there are any), stops the run in the middle, resumes it,
and shows what was learnt: a table, a page of images, and how to open MLflow. About 8 minutes on two cores.

  --minutes N      about how long to train (default 5)
  --method NAME    the pretraining method (default dinov2)
  --data SHARDS    your own WebDataset shards instead of the drawn scenes: '/data/train-{000..009}.tar'
  --val SHARDS     labelled shards to evaluate on, beside --data
  --directory DIR  where everything is written (default runs/demo)

The first call makes a virtual environment and installs some gigabytes of packages into it. Later calls start at once.
  FOVEA_VENV=DIR   that environment's folder (default .venv)
  PYTHON=FILE      the python 3.11 or newer to make it with
TEXT
}

for word in "$@"; do
    case "$word" in -h | --help) usage; exit 0 ;; esac
done
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
fovea_setup || exit 1
exec "$FOVEA_VENV/bin/fovea" demo "$@"
