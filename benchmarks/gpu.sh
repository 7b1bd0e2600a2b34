#!/usr/bin/env bash
# Engine and whole job on a CUDA machine: benchmarks/gpu.sh MODEL_DIR IMAGES_DIR [PEERS_DIR]
# MODEL_DIR holds a GIT model; git-base shape gives figures to compare. Stops where there is no GPU.
set -euo pipefail

model=${1:?usage: benchmarks/gpu.sh MODEL_DIR IMAGES_DIR [PEERS_DIR]}
images=${2:?usage: benchmarks/gpu.sh MODEL_DIR IMAGES_DIR [PEERS_DIR]}
peers=${3:-}
python=${PYTHON:-python}

"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no CUDA GPU here")'
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv

for batch_size in 64 256; do
    echo "== engine, bfloat16, batch $batch_size"
    "$python" -m benchmarks.engine --model "$model" --batch-size "$batch_size" --dtype bfloat16 --rounds 5
done
for beams in 1 3; do
    echo "== whole job, $beams beams"
    "$python" -m benchmarks.caption --model "$model" --images "$images" --num-beams "$beams" --batch-size 128 \
        --sizes 4096,20480 --rounds 2 ${peers:+--peers "$peers" --against ray_naive,hf_batch}
done
