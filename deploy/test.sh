#!/bin/sh
# test.sh [options of ctest]: installs what is missing, builds, runs every test. Ends with ctest's summary
# and its exit status. Examples: test.sh -L unit; test.sh -R dist_bits -V.
set -eu
# shellcheck source=deploy/common.sh
. "$(dirname "$0")/common.sh"

"$root/deploy/deps.sh" test
"$root/deploy/build.sh"

jobs=$(nproc 2>/dev/null || echo 2)
[ "$jobs" -le 4 ] || jobs=4
cd "$build"
# ctest's last lines are the summary; nothing is printed after them.
exec ctest --output-on-failure -j "$jobs" "$@"
