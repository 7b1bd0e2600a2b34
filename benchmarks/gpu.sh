#!/usr/bin/env bash
# Engine and whole job on a CUDA machine: benchmarks/gpu.sh MODEL_DIR IMAGES_DIR [PEERS_DIR]
# MODEL_DIR holds a GIT model; git-base shape gives figures to compare. Stops where there is no GPU.
set -euo pipefail

model=${1:?usage: benchmarks/gpu.sh MODEL_DIR IMAGES_DIR [PEERS_DIR]}
images=${2:?usage: benchmarks/gpu.sh MODEL_DIR IMAGES_DIR [PEERS_DIR]}
peers=${3:-}
python=${PYTHON:-python}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no CUDA GPU here")'
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
dtype=$("$python" -c 'import torch; print("bfloat16" if torch.cuda.is_bf16_supported(False) else "float16")')

for batch_size in 64 256; do
    echo "== engine, $dtype, batch $batch_size"
    "$python" -m benchmarks.engine --model "$model" --batch-size "$batch_size" --dtype "$dtype" --rounds 5
done
for beams in 1 3; do
    echo "== whole job, $beams beams; the peers compute in float32, ours in bfloat16"
    "$python" -m benchmarks.caption --model "$model" --images "$images" --num-beams "$beams" --batch-size 128 \
        --sizes 4096,20480 --peer-sizes 1024,4096 --rounds 2 ${peers:+--peers "$peers" --against ray_naive,hf_batch}
done
echo "== --batch-size auto, as a person would run it"
"$python" -m ray_jobs.caption "$images" "$out/captions" --model "$model" --no-dedupe
cat "${XDG_CACHE_HOME:-$HOME/.cache}/captioner/batch_sizes.json"
