#!/bin/sh
# fence.sh SOURCE_FOLDER: who may include what, read off the includes. Folders depend on each other in one
# direction; a foreign header has one door; memory comes from base; no file outgrows a person. Prints
# every breach, and how much was looked at.
cd "$1" || exit 1
status=0
n_files=0

breach() {
    printf '%s\n' "$*"
    status=1
}

sources() { find "$@" -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' | sort; }

# ---- folders: what each may include of the project ----
allowed() {
    case $1 in
    base) echo "base" ;;
    kernels) echo "base kernels" ;;
    proto) echo "base kernels proto" ;;
    model) echo "base kernels model" ;;
    transport) echo "base proto transport" ;;
    router_node) echo "base kernels proto model transport router_node" ;;
    expert_shard) echo "base kernels proto model transport expert_shard" ;;
    daemon) echo "base kernels proto model transport router_node expert_shard daemon" ;;
    esac
}

for folder in base kernels proto model transport router_node expert_shard daemon; do
    [ -d "$folder" ] || continue
    may=" $(allowed "$folder") "
    for file in $(sources "$folder"); do
        n_files=$((n_files + 1))
        for header in $(sed -n 's/^#[ \t]*include[ \t]*"\(.*\)".*/\1/p' "$file"); do
            case $header in
            */*) of=${header%%/*} ;;
            moed.pb-c.h)
                [ "$file" = proto/frame.h ] || breach "$file: the generated messages come through proto/frame.h"
                continue
                ;;
            *)
                breach "$file: \"$header\" has no folder: paths start at the root"
                continue
                ;;
            esac
            case $may in
            *" $of "*) ;;
            *) breach "$file: $folder may not include $header" ;;
            esac
        done
    done
done

# Of a neighbour only its public headers; what lies behind them is private to the folder.
public="base/base.h kernels/formats.h kernels/kernels.h kernels/compute.h proto/frame.h proto/wire.h model/model.h
    transport/net.h router_node/router.h expert_shard/shard.h expert_shard/cache.h"
for folder in kernels proto model transport router_node expert_shard daemon; do
    for file in $(sources "$folder"); do
        for header in $(sed -n 's/^#[ \t]*include[ \t]*"\(.*\/.*\)".*/\1/p' "$file"); do
            [ "${header%%/*}" != "$folder" ] || continue
            case " $(echo $public) " in
            *" $header "*) ;;
            *) breach "$file: $header is private to ${header%%/*}" ;;
            esac
        done
    done
done
for file in $(sources model proto); do
    grep -Eq '^#[ \t]*include[ \t]*"kernels/' "$file" || continue
    grep -E '^#[ \t]*include[ \t]*"kernels/' "$file" | grep -qv '"kernels/formats.h"' &&
        breach "$file: of kernels/ only formats.h may be read here"
done

# ---- foreign headers: one door each ----
door() { # pattern, files that may
    pattern=$1
    shift
    for file in $(grep -lE "^#[ \t]*include[ \t]*<($pattern)" -r base kernels proto model transport router_node \
        expert_shard daemon --include='*.[ch]' --include='*.cu' --include='*.cuh'); do
        open=0
        for may in "$@"; do
            # The doors are patterns of the shell.
            # shellcheck disable=SC2254
            case $file in $may) open=1 ;; esac
        done
        [ "$open" -eq 1 ] || breach "$file: includes <$pattern>, which has another door: $*"
    done
}
door 'mpi\.h' transport/mpi.c
door 'nccl\.h' transport/nccl.c
door 'yaml\.h' daemon/config.c
door 'protobuf-c/.*' proto/frame.h
door 'event.*/.*|event\.h|evhttp\.h' 'daemon/*.c'
door 'jansson\.h' 'daemon/*.c' model/json.c
door 'pcre2\.h' model/pretokenize.c
door '(x86|imm|amx|avx)[a-z0-9]*intrin\.h' 'kernels/cpu/*'
door 'cuda.*\.h' 'kernels/cuda/*'
door 'argp\.h' daemon/main.c daemon/moectl.c
for file in $(sources base kernels proto model transport router_node expert_shard daemon | grep '\.h$'); do
    case $file in kernels/cpu/* | kernels/cuda/*) continue ;; esac
    foreign=$(grep -E '^#[ \t]*include[ \t]*<' "$file" |
        grep -vE '<(std(arg|bool|def|int|io|atomic)|stdlib|string|sys/types|pthread|math)\.h>')
    [ -z "$foreign" ] || breach "$file: a header includes a foreign one: $foreign"
done

# ---- memory, ends, variable lengths ----
# The file without its comments, lines kept.
code() {
    awk '{
        line = $0
        out = ""
        while (line != "") {
            if (inside) {
                end = index(line, "*/")
                if (end == 0) break
                line = substr(line, end + 2)
                inside = 0
            } else {
                start = index(line, "/*")
                if (start == 0) { out = out line; break }
                out = out substr(line, 1, start - 1)
                line = substr(line, start + 2)
                inside = 1
            }
        }
        sub("//.*", "", out)
        print out
    }' "$1"
}
calls() { # pattern, what, files that may
    pattern=$1 what=$2
    shift 2
    for file in $(sources base kernels proto model transport router_node expert_shard daemon | grep '\.[ch]$'); do
        case " $* " in *" $file "*) continue ;; esac
        found=$(code "$file" | grep -nE "(^|[^_a-zA-Z0-9.>])($pattern)[ ]*\(" | head -n 3)
        [ -z "$found" ] || breach "$file: $what: $found"
    done
}
calls 'malloc|calloc|realloc|free|aligned_alloc|posix_memalign|memalign|strdup|strndup|asprintf|vasprintf|getline' \
    'memory comes from ep_alloc and its kin' base/memory.c
calls 'alloca|gets|strcpy|strcat|sprintf|vsprintf|strtok|atol|atof|setjmp|longjmp' 'not used here'
calls 'exit|abort' 'only main.c and moectl.c end a process in this way' daemon/main.c daemon/moectl.c
calls 'MPI_[A-Z][A-Za-z_]*' 'MPI has one door' transport/mpi.c

# ---- size, form ----
for file in $(sources base kernels proto model transport router_node expert_shard daemon tests); do
    lines=$(wc -l <"$file")
    [ "$lines" -le 1000 ] || breach "$file: $lines lines, at most 1000"
    case $file in *.c)
        case $file in tests/*) continue ;; esac
        head -n 1 "$file" | grep -q '^/\*' || breach "$file: opens without a comment on its job"
        ;;
    *.h)
        guard=$(sed -n 's/^#ifndef \(EP_[A-Z0-9_]*_H\)$/\1/p' "$file" | head -n 1)
        [ -n "$guard" ] && grep -q "^#define $guard\$" "$file" || breach "$file: no include guard EP_..._H"
        ;;
    esac
done
for file in $(sources base kernels proto model transport router_node expert_shard daemon tests); do
    ! grep -qP '\t| $' "$file" || breach "$file: tabs, or blanks at the end of a line"
done
grep -nwE 'TO[D]O|FIX[M]E|XX[X]' -r base kernels proto model transport router_node expert_shard daemon --include='*.[ch]' &&
    breach "an unfinished thing is an issue, not a comment"

echo "$n_files files looked at"
[ "$n_files" -gt 40 ] || breach "where are the sources?"
exit $status
