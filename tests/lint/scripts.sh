#!/bin/sh
# scripts.sh SOURCE_FOLDER: every shell script parses, every script that is run is executable, and shellcheck finds
# nothing where it is installed.
cd "$1" || exit 1
status=0 n=0
for script in $(find deploy tests .ci -name '*.sh' -o -path '.ci/run' | sort); do
    sh -n "$script" || status=1
    case $script in
    deploy/common.sh) ;;
    *)
        head -n 1 "$script" | grep -q '^#!' || { echo "$script: no first line #!" && status=1; }
        [ -x "$script" ] || { echo "$script is not executable" && status=1; }
        ;;
    esac
    n=$((n + 1))
done
if command -v shellcheck >/dev/null; then
    shellcheck -x deploy/*.sh .ci/run || status=1
else
    echo "no shellcheck: only parsed"
fi
echo "$n scripts looked at"
[ "$n" -gt 5 ] || status=1
exit $status
