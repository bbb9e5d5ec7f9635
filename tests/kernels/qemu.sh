#!/bin/sh
# qemu.sh CPU LEVEL CHECK_KERNELS: runs the quick checks of one level on an emulated older processor, so
# that an instruction which the level does not have ends in SIGILL here and not at somebody's desk.
cpu=$1 level=$2 program=$3
if ! command -v qemu-x86_64 >/dev/null; then
    echo "skipped: no qemu-x86_64"
    exit 77
fi
qemu-x86_64 -cpu "$cpu" "$program" --isa "$level" --quick
status=$?
if [ "$status" -eq 77 ]; then
    echo "FAILED: the emulated $cpu should have $level"
    exit 1
fi
exit "$status"
