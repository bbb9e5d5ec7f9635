#!/bin/sh
# isa_symbols.sh ISA_OBJECTS... -- GENERAL_OBJECTS...: an object of an instruction set may export its
# tables (kern_gemm_*, kern_vec_*) and nothing else, or the linker could take a function from it for
# general code; a general object may not use registers that old machines lack.
status=0 general=0
for object in "$@"; do
    if [ "$object" = "--" ]; then
        general=1
        continue
    fi
    if [ "$general" -eq 0 ]; then
        others=$(nm --defined-only --extern-only "$object" | awk '{print $NF}' |
            grep -Ev '^(kern_(gemm|vec)_[a-z0-9_]+|__odr_asan\..*)$')
        if [ -n "$others" ]; then
            echo "$object exports:" $others
            status=1
        fi
    elif objdump -d --no-show-raw-insn "$object" | grep -Eq '%([yz]mm|tmm)[0-9]'; then
        echo "$object uses wide registers"
        status=1
    fi
    n=$((n + 1))
done
echo "$n objects looked at"
[ "$n" -gt 0 ] || status=1
exit $status
