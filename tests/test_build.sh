#!/usr/bin/env bash
# Compiles the header every way it says it can be compiled, without a warning, and runs the result.
#
# usage: test_build.sh gcc|clang|cross DIRECTORY
#
#   gcc, clang   every build macro, optimisation levels, C standards, inclusion twice, from C++
#   cross        for Windows (MinGW) and AArch64, where these compilers are installed
#
# Ends with status 77 if there is no such compiler.
set -euo pipefail
cd "$(dirname "$0")/.."

STRICT=(-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wundef -Werror -ffp-contract=off)
STRICT_C=("${STRICT[@]}" -Wstrict-prototypes -Wmissing-prototypes)
MODEL=build/models/qwen3_next.q3n
checks=0

ok() {
    checks=$((checks + 1))
    printf 'ok  %s\n' "$*"
}

# A program that evaluates a golden prompt greedily from memory, with two threads if there are any,
# and prints the ids.  It uses no part that a build macro removes.
write_program() {
    cat > "$1" << 'PROGRAM'
#include "qwen3next.h"
#include "qwen3next.h"
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
    static _Alignas(64) unsigned char data[1 << 22];
    FILE *f = argc > 1 ? fopen(argv[1], "rb") : NULL;
    const size_t n = f ? fread(data, 1, sizeof data, f) : 0;
    if (f) fclose(f);
    q3n_model *m = NULL;
    q3n_session *s = NULL;
    q3n_sampler *sampler = NULL;
    q3n_error err = { 0 };
    q3n_session_options o = { .capacity = 64, .n_threads = 2 };
    q3n_sampler_options greedy = { 0 };
    if (q3n_model_open_memory(&m, data, n, NULL, &err)
        || q3n_session_create(&s, m, &o, &err)
        || q3n_sampler_create(&sampler, m, &greedy, &err)) {
        fprintf(stderr, "%s\n", err.message);
        return 1;
    }
    int32_t id = 0;
    const int32_t prompt[] = { PROMPT };
    const int n_prompt = (int)(sizeof prompt / sizeof *prompt);
    float *logits = (float *)malloc((size_t)q3n_model_config(m)->vocab_size * sizeof *logits);
    if (!logits || q3n_session_eval(s, prompt, n_prompt, logits)) return 1;
    for (int i = 0; i < 8; i++) {
        id = q3n_sampler_sample(sampler, logits);
        printf("%d ", id);
        if (q3n_session_eval(s, &id, 1, logits)) return 1;
    }
    printf("\n");
    free(logits);
    q3n_sampler_destroy(sampler);
    q3n_session_destroy(s);
    q3n_model_close(m);
    return 0;
}
PROGRAM
}

# Prompt and first greedy ids of the golden.
read_golden() {
    local golden=tests/golden/qwen3_next/golden.json
    prompt=$(tr -d ' \n' < $golden | sed -E 's/.*"greedy":\{"prompt_ids":\[([0-9,]*)\].*/\1/')
    want=$(tr -d ' \n' < $golden \
        | sed -E 's/.*"greedy":\{.*"output_ids":\[(([0-9]+,){7}[0-9]+).*/\1 /; s/,/ /g')
}

compile_and_run() {    # NAME COMPILER FLAGS...
    local name=$1 cc=$2 got
    shift 2
    "$cc" -std=c11 "${STRICT_C[@]}" "-DPROMPT=$prompt" "$@" -I. "$out/program.c" \
        -o "$out/program" -lm -lpthread
    got=$("$out/program" $MODEL)
    if [ "$got" != "$want" ]; then
        printf 'FAILED  %s: ids %s, expected %s\n' "$name" "$got" "$want"
        exit 1
    fi
    ok "$name"
}

compile_only() {    # NAME COMPILER FLAGS...
    local name=$1
    shift
    "$@" -o "$out/object.o"
    ok "$name"
}

# Every build macro that the header tests for: a new one is tried without being listed here.
build_macros() {
    grep -oE '\bQ3N_NO_[A-Z0-9_]+' qwen3next.h | sort -u
}

test_compiler() {    # C_COMPILER CXX_COMPILER LEVEL
    local cc=$1 cxx=$2 level=$3 macro
    "$cc" --version | head -n 1
    local implementation=("$cc" "${STRICT_C[@]}" -DQ3N_IMPLEMENTATION -I. -c -x c)

    for macro in $(build_macros); do
        compile_and_run "$cc $level -D$macro" "$cc" "$level" -DQ3N_IMPLEMENTATION "-D$macro"
    done
    # shellcheck disable=SC2046
    compile_and_run "$cc $level, all Q3N_NO_*" "$cc" "$level" -DQ3N_IMPLEMENTATION \
        $(build_macros | sed 's/^/-D/')
    compile_and_run "$cc $level -DQ3N_STATIC" "$cc" "$level" -DQ3N_IMPLEMENTATION -DQ3N_STATIC \
        -Wno-unused-function
    compile_and_run "$cc $level own Q3N_ASSERT" "$cc" "$level" -DQ3N_IMPLEMENTATION \
        '-DQ3N_ASSERT(x)=((void)sizeof(x))'
    compile_and_run "$cc -O0" "$cc" -O0 -DQ3N_IMPLEMENTATION
    compile_and_run "$cc -O3" "$cc" -O3 -DQ3N_IMPLEMENTATION
    compile_only "$cc -O2 -march=native" "${implementation[@]}" -std=c11 -O2 -march=native \
        qwen3next.h
    compile_only "$cc -std=gnu17" "${implementation[@]}" -std=gnu17 -O0 qwen3next.h

    printf '%s\n' '#include "qwen3next.h"' '#include "qwen3next.h"' \
        'int main() { return q3n_version() != 0; }' > "$out/api.cpp"
    compile_only "$cxx -std=c++11, API twice" "$cxx" -std=c++11 "${STRICT[@]}" -I. -c "$out/api.cpp"
    compile_only "$cxx -std=c++20, API twice" "$cxx" -std=c++20 "${STRICT[@]}" -I. -c "$out/api.cpp"
    if "$cxx" -std=c++11 -DQ3N_IMPLEMENTATION -I. -c "$out/api.cpp" -o "$out/object.o" 2> "$out/log"
    then
        echo "FAILED  the implementation compiles as C++: it must say that it is C"
        exit 1
    fi
    grep -q 'error.*Q3N_IMPLEMENTATION' "$out/log"
    ok "$cxx refuses the implementation with a message"

    compile_only "$cc object" "${implementation[@]}" -std=c11 -O0 qwen3next.h
    cp "$out/object.o" "$out/implementation.o"
    "$cc" -std=c11 "-DPROMPT=$prompt" -I. "$out/program.c" "$out/implementation.o" \
        -o "$out/program" -lm -lpthread
    [ "$("$out/program" $MODEL)" = "$want" ]
    ok "$cc program and object apart"
}

test_cross() {
    local found=0
    if command -v x86_64-w64-mingw32-gcc > /dev/null; then
        found=1
        compile_only "x86_64-w64-mingw32-gcc" x86_64-w64-mingw32-gcc -std=c11 "${STRICT_C[@]}" -O1 \
            -DQ3N_IMPLEMENTATION -x c -c qwen3next.h
        # MinGW's isfinite narrows doubles, and its printf attribute knows the old runtime only.
        x86_64-w64-mingw32-gcc -std=c11 "${STRICT_C[@]}" -O1 -D__USE_MINGW_ANSI_STDIO=1 \
            -Wno-float-conversion -Wno-format examples/q3n/*.c -o "$out/q3n.exe"
        ok "x86_64-w64-mingw32-gcc, command line"
    else
        echo "--  no x86_64-w64-mingw32-gcc here: Windows not tried"
    fi
    if command -v aarch64-linux-gnu-gcc > /dev/null; then
        found=1
        compile_only "aarch64-linux-gnu-gcc" aarch64-linux-gnu-gcc -std=c11 "${STRICT_C[@]}" -O1 \
            -DQ3N_IMPLEMENTATION -x c -c qwen3next.h
    else
        echo "--  no aarch64-linux-gnu-gcc here: AArch64 not tried"
    fi
    if [ $found = 0 ]; then
        echo "no cross compiler is installed"
        exit 77
    fi
}

what=${1:?gcc, clang or cross}
out=${2:?a directory}/$what
mkdir -p "$out"
case $what in
    gcc | clang)
        if ! command -v "$what" > /dev/null; then
            echo "$what is not installed"
            exit 77
        fi
        read_golden
        write_program "$out/program.c"
        # gcc finds some mistakes only where it optimises, clang finds all that it can without.
        case $what in
            gcc)   test_compiler gcc g++ -O1 ;;
            clang) test_compiler clang clang++ -O0 ;;
        esac ;;
    cross) test_cross ;;
    *)     exit 2 ;;
esac
printf '%d builds\n' "$checks"
