#!/bin/bash
# Says early what a container was not given, then becomes the command: exec, so that signals reach it.
set -eu
shm=$(df --output=size -k /dev/shm 2>/dev/null | tail -n 1 | tr -d ' ' || echo 0)
if [ "${shm:-0}" -lt 1000000 ]; then
    echo "fovea: /dev/shm holds $((${shm:-0} / 1024)) MB; data workers want more: start with --ipc=host or --shm-size=16g" >&2
fi
exec "$@"
