#!/usr/bin/env bash
# Check and time jfbfast on a GPU in under nine minutes, the most valuable parts first.
#
#   bash benchmarks/gpu/check.sh [PART…]                  # on the machine with the GPU; every part, or those named
#   GPU_CHECK_CPU=1 bash benchmarks/gpu/check.sh PART…    # try a part on the CPU at tiny sizes
#
# It needs Python with torch, Triton and pytest, but no network. Each part has a time limit, and so has the whole
# (GPU_CHECK_SECONDS, 530); a part that fails or runs out of time does not stop the others. Into $OUT (gpu-check/) go
# log.txt, results.jsonl (one finding per line), junit.xml, sanitizer.txt, profile.txt, ncu.txt, and
# kernels.csv with its picture. Where building fails, put a wheel for that Python into .whl/. The status is 1 if a
# check failed.
set -u
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
OUT=${OUT:-$PWD/gpu-check}
SITE=${GPU_CHECK_SITE:-$OUT/site}
PYTHON=${PYTHON:-python3}
CPU=${GPU_CHECK_CPU:-0}
DEADLINE=$(($(date +%s) + ${GPU_CHECK_SECONDS:-530}))
mkdir -p "$OUT" "$SITE"
exec > >(tee -a "$OUT/log.txt") 2>&1
export OUT ROOT SITE PYTHON CPU GPU_CHECK_CPU=$CPU PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

WANTED=" $* "

# part NAME SECONDS COMMAND…: run it within its own limit and what is left of the whole
part() {
    local name=$1 seconds=$2 start left code
    shift 2
    [ "$WANTED" = "  " ] || [[ "$WANTED" == *" $name "* ]] || return 0
    start=$(date +%s)
    left=$((DEADLINE - start))
    if [ "$left" -lt 8 ]; then echo "=== $name: skipped, no time left"; return 0; fi
    [ "$seconds" -gt "$left" ] && seconds=$left
    echo "=== $name (at most $seconds s of $left s)"
    timeout -k 5 "$seconds" "$@"
    code=$?
    echo "=== $name: status $code after $(($(date +%s) - start)) s"
    printf '{"part": "%s", "ok": %s, "status": %d}\n' "$name" "$([ $code = 0 ] && echo true || echo false)" $code \
        >> "$OUT/results.jsonl"
}

machine() {
    date -u && uname -a && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.limit --format=csv
    nvcc --version | tail -2
    "$PYTHON" -m pip list 2> /dev/null | grep -iE '^(torch|triton|numpy|pytest|ninja|nvidia-cudnn)'
    "$PYTHON" -c 'import jfbfast; jfbfast.show_config()'
}

install() {
    local options=(-q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE")
    cd "$ROOT" || return 1
    JFBFAST_CUDA=1 timeout -k 5 150 "$PYTHON" -m pip install "${options[@]}" --no-build-isolation . && return 0
    echo "The build failed; installing the wheel in .whl/ instead."
    "$PYTHON" -m pip install "${options[@]}" "$ROOT"/.whl/jfbfast-*.whl
}

tests() {  # compute-sanitizer runs beside them, and so takes no time from the benchmarks
    local pids=() tool code workers=()
    for tool in memcheck racecheck initcheck; do
        # Without torch's cache each tensor is its own allocation, so that an access past its end is seen.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 150 compute-sanitizer --tool "$tool" --print-limit 20 \
            "$PYTHON" -m jfbfast.benchmarks.gpu.check sanitize > "$OUT/sanitizer.$tool" 2>&1 &
        pids+=($!)
    done
    "$PYTHON" -c 'import xdist' 2> /dev/null && workers=(-n 8)
    cd "$ROOT" && OMP_NUM_THREADS=2 "$PYTHON" -m pytest tests/backends -m "gpu and not slow" -p no:cacheprovider \
        -q -rfE --tb short "${workers[@]}" --junitxml "$OUT/junit.xml"
    code=$?
    wait "${pids[@]}"
    for tool in memcheck racecheck initcheck; do
        { echo "##### $tool"; cat "$OUT/sanitizer.$tool"; } >> "$OUT/sanitizer.txt"
        grep -HE 'ERROR SUMMARY|RACECHECK SUMMARY|Error:' "$OUT/sanitizer.$tool" | tail -2
    done
    return $code
}

counters() {  # the hardware's counters of each kernel
    ncu --clock-control none --target-processes all --section SpeedOfLight --section Occupancy --section LaunchStats \
        --section WarpStateStats -k 'regex:gradient_kernel|blur_kernel|append_full|update_samples|mix_full' -c 12 \
        "$PYTHON" -m jfbfast.benchmarks.gpu.check sanitize > "$OUT/ncu.txt" 2>&1 || return 1
    grep -E '_kernel|_full|update_samples|Duration|Memory Throughput|Achieved Occupancy' "$OUT/ncu.txt" | head -60
}

check() { "$PYTHON" -m jfbfast.benchmarks.gpu.check "$1"; }
kernels() { "$PYTHON" -m jfbfast.benchmarks kernels --quick --out "$OUT"; }
export -f machine install tests counters check kernels

[ "$CPU" = 1 ] || part install 180 bash -c install
[ "$CPU" = 1 ] || part machine 40 bash -c machine
part agreement 90 bash -c 'check agreement'
[ "$CPU" = 1 ] || part tests 170 bash -c tests
part step 110 bash -c 'check step'
part profile 40 bash -c 'check profile'
part graph 40 bash -c 'check graph'
part convolutions 40 bash -c 'check convolutions'
part kernels 90 bash -c kernels
part tiles 45 bash -c 'check tiles'
part compiled 90 bash -c 'check compiled'
part sanitize 40 bash -c 'check sanitize'
[ "$CPU" = 1 ] || part counters 60 bash -c counters

failed=$(grep -c '"ok": false' "$OUT/results.jsonl")
echo "=== $(grep -c . "$OUT/results.jsonl") findings, $failed failed"
grep -h '"ok": false' "$OUT/results.jsonl" | cut -c1-300
exec >&- 2>&-
wait  # for tee
[ "$failed" = 0 ]
