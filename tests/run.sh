#!/usr/bin/env bash
# Runs one test suite and writes down how it went, or sums up what was written down.
#
# usage: run.sh NAME RESULT_FILE COMMAND...   always succeeds: the summary tells
#        run.sh --summary RESULT_FILE...      fails unless every file is there and says "passed"
#
# A command that ends with status 77 says that this machine cannot run it.
set -u

LIMIT_SECONDS=${TEST_LIMIT:-900}

run_suite() {
    local name=$1 result=$2 log status verdict started seconds
    shift 2
    mkdir -p "$(dirname "$result")"
    log=$result.log
    started=$SECONDS
    printf '==== %s: %s\n' "$name" "$*"
    timeout "$LIMIT_SECONDS" "$@" > "$log" 2>&1
    status=$?
    seconds=$((SECONDS - started))
    cat "$log"
    if [ $status = 77 ]; then
        verdict=skipped
    elif [ $status != 0 ]; then
        verdict=failed
    # A suite without a single test has not passed.
    elif grep -qE '^Ran 0 tests|\[==========\] 0 test\(s\) run' "$log"; then
        verdict=failed
    else
        verdict=passed
    fi
    printf '==== %s: %s (status %d, %d s)\n\n' "$name" "$verdict" "$status" "$seconds"
    printf '%s %s\n' "$verdict" "$name" > "$result"
}

# How many single tests a suite passed over, from what cmocka or unittest says.
skipped_tests() {
    sed -nE 's/^\[  SKIPPED \] ([0-9]+) test\(s\).*/\1/p
             s/^OK \(.*skipped=([0-9]+).*/\1/p' "$1" | head -n 1
}

summary() {
    local passed=0 failed=0 result verdict name skipped
    for result in "$@"; do
        verdict="" name=$result
        if [ -e "$result" ]; then read -r verdict name < "$result"; fi
        case $verdict in
            passed)
                passed=$((passed + 1))
                skipped=$(skipped_tests "$result.log")
                if [ -n "$skipped" ]; then echo "$name: $skipped tests skipped"; fi ;;
            skipped)
                echo "$name: skipped: $(tail -n 1 "$result.log")" ;;
            failed)
                failed=$((failed + 1))
                echo "$name: FAILED, see $result.log" ;;
            *)
                failed=$((failed + 1))
                echo "$name: FAILED to build" ;;
        esac
    done
    echo "$passed passed, $failed failed"
    [ "$failed" = 0 ] && [ "$passed" != 0 ]
}

if [ "${1:-}" = --summary ]; then
    shift
    summary "$@"
else
    run_suite "$@"
fi
