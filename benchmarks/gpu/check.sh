#!/usr/bin/env bash
# Install jfbfast on a bare machine with a GPU, then check and time it in under nine minutes: `jfbfast bench gpu --quick`.
#
#   bash benchmarks/gpu/check.sh [PART…]                  # on the machine with the GPU; every part, or those named
#   GPU_CHECK_CPU=1 bash benchmarks/gpu/check.sh PART…    # try a part on the CPU at tiny sizes, without installing
#
# It needs Python with torch, Triton, matplotlib, rich and scikit-image, but no network. benchmarks/gpu/__init__.py lists
# the parts; each has a time limit, and so has the whole (GPU_CHECK_SECONDS, 530). Into $OUT (gpu-check/) go gpu.json,
# gpu.png, log.txt, results.jsonl (one finding per line, written at once), profile.txt and tools.txt. Where building
# fails, put a wheel for that Python into .whl/. The status is 1 if a check failed.
set -u
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
export OUT=${OUT:-$PWD/gpu-check}
SITE=${GPU_CHECK_SITE:-${TMPDIR:-/tmp}/jfbfast-gpu-check-$$}
PYTHON=${PYTHON:-python3}
START=$(date +%s)
mkdir -p "$OUT" "$SITE"
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

install() {
    local options=(-q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE")
    cd "$ROOT" || return 1
    JFBFAST_CUDA=1 timeout -k 5 150 "$PYTHON" -m pip install "${options[@]}" --no-build-isolation . && return 0
    echo "The build failed; installing the wheel in .whl/ instead."
    timeout -k 5 60 "$PYTHON" -m pip install "${options[@]}" "$ROOT"/.whl/jfbfast-*.whl
}

if [ "${GPU_CHECK_CPU:-0}" != 1 ]; then
    install 2>&1 | tee "$OUT/install.txt"
    cd "$ROOT" || exit 1  # where the tests are
fi
export GPU_CHECK_SECONDS=$((${GPU_CHECK_SECONDS:-530} - $(date +%s) + START))
exec timeout -k 5 $((GPU_CHECK_SECONDS + 20)) "$PYTHON" -m jfbfast.benchmarks.gpu "$@"
