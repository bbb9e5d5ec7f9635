#!/bin/sh
# run.sh [BUILD_FOLDER]: everything that needs a GPU, in one call under eight minutes: builds for sm_90a, runs the
# tests, compute-sanitizer on small shapes where it is installed, then the benchmark. Run it in the source folder.
build=${1:-/tmp/moed-gpu-build}
status=0
step() {
    printf '\n==== %s (%s s)\n' "$*" "$(($(date +%s) - start))"
    "$@" || { status=$?; [ "$status" -eq 77 ] || echo "==== failed: $status"; }
}
start=$(date +%s)
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv 2>/dev/null
cmake -S . -B "$build" -G Ninja -DMOED_CUDA=ON -DMOED_CUDA_ARCHS=90a-real >"$build.log" 2>&1 || {
    cat "$build.log"
    exit 1
}
ninja -C "$build" check_cuda bench_cuda test_cuda_layout test_cuda_stage test_cuda_open >>"$build.log" 2>&1 || {
    tail -n 40 "$build.log"
    exit 1
}
step "$build/tests/test_cuda_layout"
step "$build/tests/test_cuda_stage"
step "$build/tests/test_cuda_open"
step timeout 120 "$build/tests/check_cuda"
checked=$status
if command -v compute-sanitizer >/dev/null; then
    step timeout 90 compute-sanitizer --tool memcheck --error-exitcode 9 "$build/tests/check_cuda" quick
    step timeout 90 compute-sanitizer --tool racecheck --error-exitcode 9 "$build/tests/check_cuda" quick
else
    echo "compute-sanitizer is not installed: memcheck and racecheck are skipped"
fi
step timeout 150 "$build/tests/bench_cuda" Q4_K
[ $(($(date +%s) - start)) -gt 330 ] || step timeout 100 "$build/tests/bench_cuda" GPTQ4
echo "==== $(($(date +%s) - start)) s in all"
[ "$checked" -eq 0 ] || exit "$checked"
exit "$status"
