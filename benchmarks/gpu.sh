#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, tests, compute-sanitizer, benchmarks.
#
#     benchmarks/gpu.sh [--output DIR]     DIR defaults to benchmarks/results
#     benchmarks/gpu.sh --training         whole training loops instead of tests and operations
#
# Needs nvcc and an environment with torch, timm and accelerate; no network. DIR receives
# ops-<device>.jsonl and .md, and gpu-<device>.txt with the device, versions, date and the outcome
# of every stage; or the same of training-<device> and gpu-training-<device>, and
# training-profile-<device>.md. A stage that fails does not stop the others; the exit status is
# then 1. Either takes at most ten minutes.
set -uo pipefail
cd "$(dirname "$0")/.."

output=benchmarks/results
training=
while [ $# -gt 0 ]; do
    case "$1" in
        --output)
            [ $# -ge 2 ] || { echo "gpu.sh: error: --output needs a folder" >&2; exit 2; }
            output=$2
            shift 2
            ;;
        --training)
            training=1
            shift
            ;;
        -h | --help)
            sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//; p}' "$0"
            exit 0
            ;;
        *)
            echo "gpu.sh: error: unknown argument $1; there are --output DIR and --training" >&2
            exit 2
            ;;
    esac
done

device=$(python -c 'import torch; print(torch.cuda.get_device_name())' 2> /dev/null)
if [ -z "$device" ]; then
    echo "gpu.sh: error: no GPU that torch can use" >&2
    exit 2
fi
slug=$(tr -cs '[:alnum:]\n' '-' <<< "${device,,}" | sed 's/-*$//')
mkdir -p "$output" || exit 2
report=$output/gpu${training:+-training}-$slug.txt
export HF_HUB_OFFLINE=1

{
    date -u '+%Y-%m-%d %H:%M UTC'
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
    python - << 'PYTHON'
import platform
from importlib import metadata

import torch

print(f"compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}")
print(f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
for name in ("timm", "accelerate"):
    print(name, metadata.version(name))
PYTHON
    nvcc --version | tail -2
    git rev-parse HEAD
} 2>&1 | tee "$report"

failed=0
# stage LIMIT NAME COMMAND...: run it, at most LIMIT seconds, and note how it ended.
stage() {
    local limit=$1 name=$2 start=$SECONDS status
    shift 2
    printf '\n== %s\n' "$name"
    timeout --kill-after=10 "$limit" "$@"
    status=$?
    case $status in
        0) status=ok ;;
        124 | 137) status="FAILED: more than $limit s" failed=1 ;;
        *) status="FAILED: exit status $status" failed=1 ;;
    esac
    printf '%s: %s, %d s\n' "$name" "$status" $((SECONDS - start)) | tee -a "$report"
}

stage 120 build pip install --no-build-isolation --no-deps --quiet -e .
stage 20 "what was built" python -m kdfast
if [ -n "$training" ]; then
    loops=("at+kd" crd "wrn kd" "dih loop")
    stage 330 "training loops" python benchmarks/training.py --device cuda \
        --rows "${loops[@]}" heads dih --output "$output/training-$slug.jsonl"
    stage 60 profile python benchmarks/training.py --device cuda --profile --rows "at+kd" crd \
        --output "$output/training-profile-$slug.md"
    echo
    cat "$report"
    exit $failed
fi
stage 120 tests python -m pytest -q tests/test_ops_*.py tests/test_emulator.py -k cuda

# The sanitizer sees the emulator's cases, which are small and reach every kernel.
sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer)
if [ -z "$sanitizer" ]; then
    echo "compute-sanitizer: not run, the tool was not found" | tee -a "$report"
elif ! timeout 60 "$sanitizer" --tool memcheck --error-exitcode 9 \
    python -c 'import torch; torch.ones(1, device="cuda").sum().item()' > /dev/null 2>&1; then
    echo "compute-sanitizer: not run, the device does not allow it" | tee -a "$report"
else
    for tool in memcheck racecheck synccheck initcheck; do
        stage 40 "$tool" "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 5 \
            python tests/emulator/on_gpu.py
    done
fi

stage 170 benchmarks python benchmarks/ops.py --device cuda --output "$output/ops-$slug.jsonl"

echo
cat "$report"
exit $failed
