#!/usr/bin/env bash
# The kernel tests under every supported Triton: tests/triton_versions.sh [VERSION...]
# Each is installed into a temporary folder that goes before the environment's own, with a NumPy that
# Triton 3.6's interpreter knows (2.4 no longer turns arrays into scalars).
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
[ $# -gt 0 ] || set -- 3.6.0 3.7.1 3.8.0 3.9.0

for version in "$@"; do
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    "$bin/python" -m pip install --quiet --no-deps --target "$folder" "triton==$version" 'numpy<2.4'
    echo "Triton $version"
    PYTHONPATH=$folder "$bin/pytest" -q tests/kernels
    rm -rf "$folder"
done
