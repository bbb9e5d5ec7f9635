#!/bin/sh
# needed.sh PROGRAM: a program with CUDA in it needs neither the C++ run-time library nor any library of the
# toolkit, so it starts on a machine that has none of them.
needed=$(readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
[ -n "$needed" ] || { echo "$1: nothing read"; exit 1; }
echo "$needed"
! echo "$needed" | grep -E 'stdc\+\+|libcuda|libcudart|libgcc_s'
