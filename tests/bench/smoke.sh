#!/bin/sh
# smoke.sh MOED-BENCH: runs every weight type of the demo shape for a moment; the program itself compares
# the level in use with scalar. Then the CSV must hold a line per case and compare with itself as 1.
set -e
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"$1" kernels --shape demo --rows 1,17 --threads 2 --seconds 0.02 --memory 32 --csv "$dir/a.csv"
lines=$(wc -l <"$dir/a.csv")
[ "$lines" -eq 21 ] || { echo "FAILED: $lines lines, expected 21"; exit 1; }
"$1" compare "$dir/a.csv" "$dir/a.csv" >"$dir/ratios"
grep -q 'geometric mean of 2: 1.000' "$dir/ratios"
"$1" --compare "$dir/a.csv" "$dir/a.csv" | cmp - "$dir/ratios"
if "$1" kernels --kernels nonsense 2>/dev/null; then echo "FAILED: an unknown level"; exit 1; fi
if "$1" kernels --type Q9 2>/dev/null; then echo "FAILED: an unknown type"; exit 1; fi
if "$1" compare "$dir/ratios" "$dir/a.csv" 2>/dev/null; then echo "FAILED: not a CSV"; exit 1; fi
