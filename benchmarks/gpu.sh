#!/usr/bin/env bash
# The one command for a GPU machine: benchmarks/gpu.sh [--form long|short|rehearsal] [--peers DIR] [--out DIR] ...
# Ends in a table (OUT/gpu.md; OUT/gpu.json beside it). See benchmarks/gpu.py and benchmarks/README.md.
# PY is the Python to run it with; where the package is not installed, this checkout is used.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$root PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
exec "${PY:-python3}" -m benchmarks.gpu "$@"
