#!/usr/bin/env bash
# Runs one test suite and writes down how it went, or sums up what was written down.
#
# usage: run.sh NAME RESULT_FILE COMMAND...   always succeeds: the summary tells
#        run.sh --summary RESULT_FILE...      fails unless every file is there and says "passed"
#
# A command that ends with status 77 says that this machine cannot run it; a line of its output
# that begins with "skipped: " names a single test that it could not run.
#
# What stops a suite counts its work, not the time that a busy machine takes: a process may use
# TEST_CPU_SECONDS of all its threads.  The clock is for what waits for ever without working.
set -u

CPU_SECONDS=${TEST_CPU_SECONDS:-1800}
CLOCK_SECONDS=14400

# Suites interrupt themselves; a job in the background of a shell without a terminal ignores SIGINT.
HEED_SIGINT=(env --default-signal=INT)
"${HEED_SIGINT[@]}" true 2> /dev/null || HEED_SIGINT=()

run_suite() {
    local name=$1 result=$2 log status verdict cpu
    shift 2
    mkdir -p "$(dirname "$result")"
    log=$result.log
    printf '==== %s: %s\n' "$name" "$*"
    ulimit -S -t "$CPU_SECONDS"
    TIMEFORMAT='%U %S'
    cpu=$( { time timeout "$CLOCK_SECONDS" "${HEED_SIGINT[@]}" "$@" > "$log" 2>&1; } 2>&1; echo $? )
    status=${cpu##*$'\n'}
    cpu=$(awk 'NR == 1 { printf "%.0f", $1 + $2 }' <<< "$cpu")
    cat "$log"
    if [ "$status" = 77 ]; then
        verdict=skipped
    elif [ "$status" != 0 ]; then
        verdict=failed
    # A suite without a single test has not passed.
    elif grep -qE '^Ran 0 tests|\[==========\] 0 test\(s\) run' "$log"; then
        verdict=failed
    else
        verdict=passed
    fi
    printf '==== %s: %s (status %d, %s CPU seconds)\n\n' "$name" "$verdict" "$status" "$cpu"
    printf '%s %s %s\n' "$verdict" "$name" "$cpu" > "$result"
}

# The single tests that a suite passed over: from cmocka's list, from unittest, which puts a test's
# description on the line after its name, and from "skipped: ".
skipped_tests() {
    awk '/^\[  SKIPPED \] [A-Za-z_]/ { sub(/^\[  SKIPPED \] /, ""); print }
         / \.\.\. skipped / { print ($0 ~ /^test_/ ? "" : name ": ") $0 }
         /^test_[^ ]* \(/ { name = $1 }
         sub(/^skipped: /, "") { print }' "$1" | sort -u
}

summary() {
    local passed=0 failed=0 skipped=0 result verdict name cpu test
    printf '%-26s %12s\n' suite "CPU seconds"
    for result in "$@"; do
        if [ -e "$result" ]; then
            read -r verdict name cpu < "$result"
            printf '%-26s %12s\n' "$name" "$cpu"
        fi
    done
    cat -- "${@/%/.log}" 2> /dev/null | grep '^instruction sets:' | sort -u
    for result in "$@"; do
        verdict="" name=$result
        if [ -e "$result" ]; then read -r verdict name cpu < "$result"; fi
        case $verdict in
            passed)
                passed=$((passed + 1))
                while read -r test; do
                    skipped=$((skipped + 1))
                    echo "$name: skipped: $test"
                done < <(skipped_tests "$result.log") ;;
            skipped)
                skipped=$((skipped + 1))
                echo "$name: skipped: $(tail -n 1 "$result.log")" ;;
            failed)
                failed=$((failed + 1))
                echo "$name: FAILED, see $result.log" ;;
            *)
                failed=$((failed + 1))
                echo "$name: FAILED to build" ;;
        esac
    done
    if [ "$skipped" = 0 ]; then
        echo "$passed passed, $failed failed"
    else
        echo "$passed passed, $failed failed, $skipped skipped"
    fi
    [ "$failed" = 0 ] && [ "$passed" != 0 ]
}

if [ "${1:-}" = --summary ]; then
    shift
    summary "$@"
else
    run_suite "$@"
fi
