# stats.awk: a short view of `moectl stats`: per rank the sums over layers, and for shards how many rows each
# expert computed.
function flush_rank() {
    if (name == "") return
    if (role == "router")
        printf "%s: %d rows in %d slices to shards, %.0f KiB out, %.0f KiB in, waited %.1f ms for shards\n",
            name, rows, slices, kib_out, kib_in, wait
    else
        printf "%s: %d slices, %d (token, expert) rows computed in %.1f ms, %.0f KiB in, %.0f KiB out\n",
            name, slices, pairs, compute, kib_in, kib_out
    if (role == "shard" && n_experts > 0) {
        printf "    rows per expert over all layers:"
        for (i = 0; i < n_experts; i++) printf " %s:%d", order[i], expert[order[i]]
        printf "\n"
    }
}
/^(router|shard) / {
    flush_rank()
    role = $1
    name = $1 " " $2
    rows = slices = pairs = kib_in = kib_out = wait = compute = n_experts = in_experts = 0
    split("", expert)
    split("", order)
    next
}
/^ *layer / { next }
/rows per expert/ {
    in_experts = 1
    next
}
in_experts && $1 ~ /^[0-9]+$/ && $2 ~ /:/ {
    for (i = 2; i <= NF; i++) {
        split($i, pair, ":")
        if (!(pair[1] in expert)) order[n_experts++] = pair[1]
        expert[pair[1]] += pair[2]
    }
    next
}
role == "router" && NF == 12 && $1 ~ /^[0-9]+$/ {
    rows += $2; slices += $3; kib_out += $5; kib_in += $6; wait += $11
    next
}
role == "shard" && NF == 7 && $1 ~ /^[0-9]+$/ {
    pairs += $3; slices += $4; kib_in += $5; kib_out += $6; compute += $7
    next
}
END { flush_rank() }
