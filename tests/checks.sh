# For the tests that are shell scripts: what went well is counted in $checks, the first fault ends.
checks=0

ok() {    # WHAT
    checks=$((checks + 1))
    printf 'ok  %s\n' "$*"
}

fail() {    # WHAT
    printf 'FAILED  %s\n' "$*"
    exit 1
}
