#!/usr/bin/env bash
# Checks what is in this folder; as root on Debian also builds the image, without a daemon.
#
#   bash docker/check.sh            hadolint and shellcheck
#   bash docker/check.sh --build    and a real build by buildah in chroot isolation, on a debootstrap base (needs root, apt, ~15 GB)
#
# The build is too long for every check. Last one: 2026-11-22, buildah 1.28.2 on Debian 12, base Debian 12 by debootstrap, 21 minutes
# on two busy cores; the image answered "fovea 0.1.0" as user 1000.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

hadolint docker/Dockerfile docker/Dockerfile.mlflow
shellcheck --severity=warning docker/*.sh launch/*.sh tests/*.sh .ci/run
echo "hadolint and shellcheck: nothing found"
[ "${1:-}" = "--build" ] || exit 0

apt-get install -y --no-install-recommends buildah debootstrap >/dev/null
work=${FOVEA_BUILD_DIR:-$(mktemp -d)}
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
root=(--root="$work/storage" --runroot="$work/run")
policy="$work/policy.json"
echo '{"default":[{"type":"insecureAcceptAnything"}]}' >"$policy"
if ! buildah "${root[@]}" images 2>/dev/null | grep -q localhost/fovea-base; then
    [ -d "$work/rootfs/bin" ] || debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/rootfs" >/dev/null
    # Behind a proxy that signs for others, pip inside needs what this machine trusts.
    cp /etc/ssl/certs/ca-certificates.crt "$work/rootfs/etc/ssl/certs/ca-certificates.crt"
    container=$(buildah "${root[@]}" from --signature-policy "$policy" scratch)
    buildah "${root[@]}" add "$container" "$work/rootfs" / >/dev/null
    buildah "${root[@]}" commit --signature-policy "$policy" "$container" localhost/fovea-base:dev >/dev/null
fi
buildah "${root[@]}" bud --signature-policy "$policy" --pull-never --format docker --network host \
    --build-arg BASE_IMAGE=localhost/fovea-base:dev --build-arg NETWORK_PACKAGES= -f docker/Dockerfile -t localhost/fovea:dev .
container=$(buildah "${root[@]}" from --signature-policy "$policy" --pull-never localhost/fovea:dev)
buildah "${root[@]}" run "$container" -- fovea --version
buildah "${root[@]}" run "$container" -- id -u
