#!/bin/sh
# run.sh [BUILD_FOLDER]: everything that needs a GPU, in one call under eight minutes: builds for sm_90a, runs the
# tests, compute-sanitizer on small shapes where it is installed, then the benchmark. Run it in the source folder.
# The machine needs a CUDA toolkit, CMake and a C compiler, and none of the project's other libraries.
# Ends with 0 when everything passed, 77 when there is no GPU, else with what the first failed step ended with.
build=${1:-/tmp/moed-gpu-build}
limit=470 # seconds that all steps may take together
status=0
start=$(date +%s)
for folder in /usr/local/cuda/bin /usr/local/cuda/compute-sanitizer; do
    [ ! -d "$folder" ] || PATH=$PATH:$folder
done
spent() { echo $(($(date +%s) - start)); }
# step SECONDS COMMAND...: within its own limit and what is left of the whole.
step() {
    most=$1
    left=$((limit - $(spent)))
    shift
    printf '\n==== %s (%s s)\n' "$*" "$(spent)"
    [ "$left" -ge 10 ] || { echo "==== skipped: no time left" && return; }
    [ "$most" -le "$left" ] || most=$left
    timeout -k 5 "$most" "$@"
    ended=$?
    [ "$ended" -ne 0 ] || return
    [ "$ended" -eq 77 ] || echo "==== failed: $ended"
    [ "$status" -ne 0 ] || status=$ended
}
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv 2>/dev/null
ninja=
! command -v ninja >/dev/null || ninja="-G Ninja"
# $ninja holds words.
# shellcheck disable=SC2086
if ! cmake -S . -B "$build" $ninja -DMOED_GPU_ONLY=ON -DMOED_CUDA=ON -DMOED_CUDA_ARCHS=90a-real >"$build.log" 2>&1 ||
    ! cmake --build "$build" --parallel "$(nproc)" --target check_cuda bench_cuda bench_cuda_copies test_cuda_layout test_cuda_stage \
        test_cuda_open >>"$build.log" 2>&1; then
    tail -n 60 "$build.log"
    echo "==== not built; the whole log is $build.log"
    exit 1
fi
programs=$(find "$build" -type f -name check_cuda)
programs=${programs%/check_cuda}
echo "built in $(spent) s"
step 60 "$programs/test_cuda_layout"
step 60 "$programs/test_cuda_stage"
step 60 "$programs/test_cuda_open"
step 120 "$programs/check_cuda"
if [ "$status" -eq 77 ]; then
    echo "==== no GPU: nothing more can be run"
    exit 77
fi
if command -v compute-sanitizer >/dev/null; then
    step 90 compute-sanitizer --tool memcheck --error-exitcode 9 "$programs/check_cuda" quick
    step 90 compute-sanitizer --tool racecheck --error-exitcode 9 "$programs/check_cuda" quick
else
    echo "==== skipped: compute-sanitizer is not installed, so no memcheck and no racecheck"
fi
step 40 "$programs/bench_cuda_copies" Q4_K
step 150 "$programs/bench_cuda" Q4_K
step 150 "$programs/bench_cuda" GPTQ4
echo "==== $(spent) s in all, $([ "$status" -eq 0 ] && echo 'all passed' || echo "failed: $status")"
exit "$status"
