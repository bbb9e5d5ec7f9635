#!/bin/sh
# run.sh MOED SOURCE_FOLDER [--update]: what `moed check` says about each file of this folder equals its .ok, for
# good files the resolved configuration with ranks, memory and ownership, for bad ones (bad-*.yaml) every
# mistake with file:line:column. What it prints for a good file is checked again and must say the same. The
# shipped examples are among the good ones. --update writes the .ok files: read the difference before committing.
set -u
moed=$1
source=$(cd "$2" && pwd -P) || exit 1
update=${3:-}
here=$source/tests/config
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
passed=0 failed=0

# Nothing of this machine stays in the text: folders, the default socket, the instruction set.
if [ "$(id -u)" -eq 0 ]; then
    default=/run/moed/moed.sock
else
    XDG_RUNTIME_DIR=/run/user/test
    export XDG_RUNTIME_DIR
    default=$XDG_RUNTIME_DIR/moed.sock
fi
neutral() {
    sed -e "s|$work|WORK|g" -e "s|$source|SOURCE|g" -e "s|$default|DEFAULT-SOCKET|g" \
        -e 's|^# kernels: .* on this machine$|# kernels: LEVEL on this machine|'
}

fail() {
    echo "FAILED   $1: $2"
    failed=$((failed + 1))
}

check() { # file, name of its .ok
    file=$1 name=$2 ok=$here/$2.ok
    "$moed" check -c "$file" >"$work/out" 2>"$work/err"
    status=$?
    { cat "$work/out" "$work/err" && echo "exit status $status"; } | neutral >"$work/got"
    case $name in
    bad-*) want=2 ;;
    *) want=0 ;;
    esac
    if [ "$status" -ne "$want" ]; then
        fail "$name" "exit status $status, expected $want"
        cat "$work/got"
        return
    fi
    if [ "$update" = "--update" ]; then cp "$work/got" "$ok"; fi
    if ! diff -u "$ok" "$work/got"; then
        fail "$name" "the output is not $ok"
        return
    fi
    if [ "$want" -eq 0 ]; then
        # The print is a configuration of its own: the same again, but for the name of the file.
        cp "$work/out" "$work/again.yaml"
        if ! "$moed" check -c "$work/again.yaml" >"$work/out2" 2>&1; then
            fail "$name" "its print does not parse again"
            cat "$work/out2"
            return
        fi
        tail -n +2 "$work/out" >"$work/a"
        tail -n +2 "$work/out2" >"$work/b"
        if ! diff -u "$work/a" "$work/b"; then
            fail "$name" "its print says something else"
            return
        fi
    elif ! grep -qE '^[^ :]+:[0-9]+:[0-9]+: |^[A-Z]+/|expert' "$work/got"; then
        fail "$name" "no place is named"
        return
    fi
    passed=$((passed + 1))
}

for file in "$here"/*.yaml; do
    name=$(basename "$file" .yaml)
    check "$file" "$name"
done
for file in "$source"/deploy/*.yaml "$source"/deploy/examples/*.yaml; do
    check "$file" "shipped-$(basename "$file" .yaml)"
done
if [ "$update" != "--update" ]; then
    for ok in "$here"/*.ok; do
        name=$(basename "$ok" .ok)
        case $name in
        keys) continue ;;
        shipped-*) [ -e "$source/deploy/${name#shipped-}.yaml" ] || [ -e "$source/deploy/examples/${name#shipped-}.yaml" ] ;;
        *) [ -e "$here/$name.yaml" ] ;;
        esac || fail "$name" "no such configuration any more"
    done
fi

# Every key that the program knows is in the documentation, with its default and meaning.
"$moed" check --keys >"$work/keys" || fail keys "moed check --keys"
if [ "$update" = "--update" ]; then cp "$work/keys" "$here/keys.ok"; fi
if diff -u "$here/keys.ok" "$work/keys"; then passed=$((passed + 1)); else fail keys "not keys.ok"; fi
missing=$(sed -n 's/^ *-* *\([a-z_]*\):.*#.*/\1/p' "$work/keys" | sort -u | while read -r key; do
    grep -q "\`$key\`" "$source/docs/configuration.md" || echo "$key"
done)
# A list is no key of its own in the table.
if [ -n "$missing" ]; then fail docs "docs/configuration.md lacks:" && echo "$missing"; else passed=$((passed + 1)); fi

echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 10 ]
