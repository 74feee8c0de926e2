#!/usr/bin/env bash
# Compiles both headers every way they say they can be compiled, without a warning, and runs the
# result.
#
# usage: test_build.sh gcc|clang|musl|mingw|aarch64|wasm DIRECTORY
#
#   gcc, clang      every build macro, optimisation levels, C and C++ standards, behind every header
#                   of the C library, what is refused, threads of the host's
#   musl            compiled and run
#   mingw, aarch64  compiled: make test-windows and make test-aarch64 run the tests
#   wasm            compiled without files and threads, and run (make deps-wasm test-wasm)
#
# Code is made where it is run or where warnings come of it; for the rest the syntax is checked.
# Programs that only run models see no q3n_make.h: nothing of qwen3next.h may be unused there.
# Ends with status 77 if there is no such compiler.
set -euo pipefail
cd "$(dirname "$0")/.."

STRICT=(-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wundef -Werror -ffp-contract=off)
STRICT_C=("${STRICT[@]}" -Wstrict-prototypes -Wmissing-prototypes)
# The largest frame: the manual says what the stack comes to, tests/test_stack.c measures it.
FRAME=-Wframe-larger-than=34816
MODEL=build/models/qwen3_next.q3n
BOTH=(-I. -DQ3N_IMPLEMENTATION -DQ3N_MAKE_IMPLEMENTATION)    # with -x c tools/q3n_make.h
. tests/checks.sh

# Prompt and first greedy ids of the golden.
read_golden() {
    local golden=tests/golden/qwen3_next/golden.json
    prompt=$(tr -d ' \n' < $golden | sed -E 's/.*"greedy":\{"prompt_ids":\[([0-9,]*)\].*/\1/')
    want=$(tr -d ' \n' < $golden \
        | sed -E 's/.*"greedy":\{.*"output_ids":\[(([0-9]+,){7}[0-9]+).*/\1 /; s/,/ /g')
}

run_program() {    # NAME: is the program's text the golden's?
    local got
    got=$("$out/program" $MODEL)
    if [ "$got" != "$want" ]; then fail "$1: ids $got, expected $want"; fi
    ok "$1"
}

compile_and_run() {    # NAME COMPILER FLAGS...
    local name=$1 cc=$2
    shift 2
    "$cc" -std=c11 "${STRICT_C[@]}" "-DPROMPT=$prompt" "$@" -I. tests/build_golden.c \
        -o "$out/program" -lm -lpthread
    run_program "$name"
}

compile_only() {    # NAME COMPILER FLAGS...
    local name=$1
    shift
    "$@"
    ok "$name"
}

# One line of error, and it says so.
check_refused() {    # NAME WORDS COMPILER FLAGS...
    local name=$1 words=$2
    shift 2
    if "$@" -fsyntax-only 2> "$out/log"; then fail "$name: compiles"; fi
    if [ "$(grep -c 'error:' "$out/log")" != 1 ] || ! grep -q "error:.*$words" "$out/log"; then
        head -n 20 "$out/log"
        fail "$name: expected one error with the words '$words'"
    fi
    ok "$name is refused in one line"
}

# Every build macro that the header tests for: a new one is tried without being listed here.
build_macros() {
    grep -oE '\bQ3N_NO_[A-Z0-9_]+' qwen3next.h | sort -u
}

# Every header that a C library has, but those that only say that they are for another machine.
write_headers() {    # COMPILER
    local name
    {
        for name in aio alloca arpa/inet assert byteswap complex cpio ctype direct dirent dlfcn \
            endian err errno execinfo fcntl fenv float fmtmsg fnmatch ftw getopt glob grp iconv \
            inttypes io iso646 langinfo libgen limits link locale malloc math memory monetary \
            net/if netdb netinet/in netinet/tcp nl_types poll process pthread pwd regex sched \
            search semaphore setjmp signal spawn stdalign stdarg stdbool stddef stdint stdio \
            stdlib stdnoreturn string strings syslog tar termios tgmath threads time uchar ulimit \
            unistd utime utmpx values wchar wctype winsock2 windows wordexp; do
            printf '%s.h\n' "$name"
        done
        "$1" -E -v -x c /dev/null 2>&1 | sed -n '/^#include <...>/,/^End/s/^ //p' \
            | while read -r name; do (cd "$name" && ls sys/*.h 2> /dev/null || true); done | sort -u
    } | while read -r name; do
        if printf '#include <%s>\n' "$name" \
            | "$1" -std=c99 -Werror -fsyntax-only -x c - 2> /dev/null
        then printf '#include <%s>\n' "$name"; fi
    done > "$out/headers.h"
}

# ... and every function that these headers declare as a macro with arguments, as the C standard
# allows a library, and as people do who count their allocations.
write_function_macros() {
    {
        cat "$out/headers.h"
        printf '#include <immintrin.h>\n'
        gcc -std=c11 -D_GNU_SOURCE -fsyntax-only -aux-info "$out/functions" -x c "$out/headers.h"
        sed -nE 's/^[^(]*[ *]([a-z][a-z0-9_]*) \(.*/\1/p' "$out/functions" | sort -u \
            | grep -vxE 'void|int|char|double|long' \
            | sed -E 's/.*/#undef &\n#define &(...) (&)(__VA_ARGS__)/'
    } > "$out/functions.h"
    if [ "$(grep -c '#define' "$out/functions.h")" -lt 500 ]; then fail "found few functions"; fi
}

# A sum of what the preprocessor leaves of both headers.
text_of() {    # COMPILER FLAGS...
    local cc=$1
    shift
    "$cc" -std=c11 -E -P "${BOTH[@]}" "$@" -x c tools/q3n_make.h | cksum
}

# Macros by what they change here: kernels alone, or others; those of other architectures nothing.
sort_macros() {    # COMPILER
    local macro all few
    all=$(text_of "$1")
    few=$(text_of "$1" -DQ3N_NO_SIMD)
    about_kernels=() about_others=()
    for macro in Q3N_STATIC $(build_macros); do
        if [ "$(text_of "$1" -DQ3N_NO_SIMD "-D$macro")" != "$few" ]; then
            about_others+=("$macro")
        elif [ "$(text_of "$1" "-D$macro")" != "$all" ]; then
            about_kernels+=("$macro")
        else
            case $(uname -m):$macro in
            x86_64:Q3N_NO_NEON | aarch64:Q3N_NO_AVX*) ok "$1 -D$macro changes nothing here" ;;
            *) fail "$1 -D$macro changes nothing" ;;
            esac
        fi
    done
}

# What is not about kernels is tried with the scalar ones, which take half the time to compile.
test_macros() {    # COMPILER
    local cc=$1 macro
    for macro in "${about_kernels[@]}"; do
        compile_and_run "$cc -D$macro" "$cc" -O0 -DQ3N_IMPLEMENTATION "-D$macro"
    done
    for macro in "${about_others[@]}"; do
        compile_and_run "$cc -D$macro" "$cc" -O0 -DQ3N_IMPLEMENTATION -DQ3N_NO_SIMD "-D$macro"
    done
    # shellcheck disable=SC2046
    compile_and_run "$cc, all Q3N_NO_*" "$cc" -O0 -DQ3N_IMPLEMENTATION \
        $(build_macros | sed 's/^/-D/')
    compile_only "$cc, own Q3N_ASSERT" "$cc" "${STRICT_C[@]}" -std=c11 "${BOTH[@]}" \
        -fsyntax-only '-DQ3N_ASSERT(x)=((void)sizeof(x))' -x c tools/q3n_make.h
}

# What makes files: with every macro, and run.
test_make() {    # COMPILER
    local cc=$1 macro
    local implementation=("$cc" "${STRICT_C[@]}" -std=c11 "${BOTH[@]}" -fsyntax-only)
    for macro in "${about_kernels[@]}" "${about_others[@]}"; do
        compile_only "$cc -D$macro, q3n_make.h" "${implementation[@]}" "-D$macro" -x c \
            tools/q3n_make.h
    done
    # shellcheck disable=SC2046
    compile_only "$cc, all Q3N_NO_*, q3n_make.h" "${implementation[@]}" \
        $(build_macros | sed 's/^/-D/') -x c tools/q3n_make.h
    "$cc" -std=c11 "${STRICT_C[@]}" -O0 "${BOTH[@]}" -DQ3N_NO_SIMD tests/build_make.c \
        -o "$out/make" -lm -lpthread
    [ "$("$out/make")" = "2008 127" ] || fail "$cc: q3n_make.h"
    ok "$cc, q3n_make.h"
}

# As C and as C++ of every year (c17 is c11 with its faults mended), the API also twice and behind
# every header.
test_standards() {    # C_COMPILER CXX_COMPILER
    local cc=$1 cxx=$2 std before
    local implementation=("$cc" "${STRICT_C[@]}" "${BOTH[@]}" -fsyntax-only -x c)
    printf '%s\n' '#include "qwen3next.h"' '#include "qwen3next.h"' \
        '#include "tools/q3n_make.h"' '#include "tools/q3n_make.h"' \
        'int main(void) { return q3n_version() == 0; }' > "$out/api.c"
    # Strict modes hide much once any header is in, and all of them define much.
    for std in c99 c11 c2x gnu17; do
        for before in stdio.h "$out/headers.h"; do
            compile_only "$cc -std=$std behind $before" "${implementation[@]}" -std=$std \
                -include $before tools/q3n_make.h
            compile_only "$cc -std=$std behind $before, API" "$cc" -std=$std "${STRICT_C[@]}" -I. \
                -fsyntax-only -include $before "$out/api.c"
        done
    done
    for std in c++11 c++14 c++17 c++20 c++2b gnu++17; do
        for before in /dev/null "$out/headers.h"; do
            compile_only "$cxx -std=$std behind $before, API" "$cxx" -std=$std "${STRICT[@]}" -I. \
                -fsyntax-only -include $before -x c++ "$out/api.c"
        done
    done
}

# That <tgmath.h> puts no other function for one that is called (logf for log) shows in what the
# object wants from outside.
test_headers() {    # COMPILER
    local cc=$1
    compile_and_run "$cc behind every header" "$cc" -O0 -DQ3N_IMPLEMENTATION \
        -include "$out/headers.h"
    nm -u "$out/program" > "$out/symbols"
    compile_and_run "$cc -O0" "$cc" -O0 -DQ3N_IMPLEMENTATION
    nm -u "$out/program" | diff - "$out/symbols" || fail "$cc: calls other functions behind headers"
    ok "$cc calls the same functions behind every header"
}

test_refusals() {    # C_COMPILER CXX_COMPILER
    local cc=$1 cxx=$2 flag
    # Without a C library: there may be none for the machine.
    local implementation=("$cc" -std=c11 -ffreestanding -DQ3N_IMPLEMENTATION -x c qwen3next.h)
    for flag in -ffast-math -ffinite-math-only -Ofast; do
        check_refused "$cc $flag" ffast-math "${implementation[@]}" "$flag"
    done
    if [[ $(uname -m) == x86_64 ]]; then
        check_refused "$cc -m32" 64-bit "${implementation[@]}" -m32
    fi
    if [[ $cc == clang ]]; then
        check_refused "$cc for big-endian" little-endian "${implementation[@]}" \
            --target=powerpc64-linux-gnu
    fi
    check_refused "$cxx" 'C file' "$cxx" -std=c++11 -DQ3N_IMPLEMENTATION -x c++ qwen3next.h
    check_refused "$cxx, q3n_make.h" 'C file' "$cxx" -std=c++11 "${BOTH[@]}" -x c++ tools/q3n_make.h
    check_refused "$cc -Ofast, q3n_make.h" ffast-math "$cc" -std=c11 "${BOTH[@]}" -Ofast -x c \
        tools/q3n_make.h
    check_refused "$cc, q3n_make.h alone" Q3N_IMPLEMENTATION "$cc" -std=c11 -I. \
        -DQ3N_MAKE_IMPLEMENTATION -x c tools/q3n_make.h
    mkdir -p "$out/other"
    sed 's/\(define Q3N_VERSION_PATCH\) .*/\1 99/' qwen3next.h > "$out/other/qwen3next.h"
    check_refused "$cc, headers of two versions" 'different versions' "$cc" -std=c11 \
        -I"$out/other" -x c tools/q3n_make.h
}

# The library without threads in a program with threads.
test_host_threads() {    # COMPILER
    "$1" -std=c11 "${STRICT_C[@]}" -O0 -g1 -fsanitize=thread -DQ3N_IMPLEMENTATION \
        -DQ3N_NO_THREADS -I. tests/build_threads.c -o "$out/threads" -lm -lpthread
    [ "$("$out/threads" $MODEL)" = "0 wrong, used" ] || fail "$1: threads of the host's"
    ok "$1 -DQ3N_NO_THREADS -fsanitize=thread, threads of the host's"
}

test_compiler() {    # C_COMPILER CXX_COMPILER
    local cc=$1 cxx=$2
    "$cc" --version | head -n 1
    write_headers "$cc"
    test_refusals "$cc" "$cxx"
    test_standards "$cc" "$cxx"
    test_headers "$cc"
    sort_macros "$cc"
    test_macros "$cc"
    test_make "$cc"
    compile_only "$cc -march=native" "$cc" "${STRICT_C[@]}" -std=c11 -O0 -march=native \
        -DQ3N_IMPLEMENTATION -c -x c qwen3next.h -o "$out/object.o"
    "$cc" -std=c11 "-DPROMPT=$prompt" -I. tests/build_golden.c "$out/object.o" -o "$out/program" \
        -lm -lpthread
    run_program "$cc, program and object apart"
}

test_gcc() {
    test_compiler gcc g++
    write_function_macros
    compile_only "gcc, every function of the C library a macro" gcc -std=c11 -D_GNU_SOURCE \
        "${BOTH[@]}" -fsyntax-only -include "$out/functions.h" -x c tools/q3n_make.h
    # gcc finds some mistakes only where it optimises.
    compile_and_run "gcc -O3" gcc -O3 "$FRAME" "${BOTH[@]}" -include tools/q3n_make.h
    test_host_threads gcc
}

test_musl() {
    write_headers musl-gcc
    compile_and_run "musl-gcc" musl-gcc -O1 "$FRAME" -static -DQ3N_IMPLEMENTATION
    compile_only "musl-gcc -std=c99 behind every header" musl-gcc "${STRICT_C[@]}" -std=c99 \
        "${BOTH[@]}" -fsyntax-only -include "$out/headers.h" -x c tools/q3n_make.h
}

test_cross() {    # COMPILER
    write_headers "$1"
    compile_only "$1" "$1" -std=c11 "${STRICT_C[@]}" -O1 "$FRAME" -DQ3N_IMPLEMENTATION -x c -c \
        qwen3next.h -o "$out/object.o"
    compile_only "$1 -std=c99 behind every header" "$1" "${STRICT_C[@]}" -std=c99 \
        "${BOTH[@]}" -fsyntax-only -include "$out/headers.h" -x c tools/q3n_make.h
}

test_mingw() {
    test_cross x86_64-w64-mingw32-gcc
    # MinGW's isfinite narrows doubles, and its printf attribute knows the old runtime only.
    compile_only "x86_64-w64-mingw32-gcc, command line" x86_64-w64-mingw32-gcc -std=c11 \
        "${STRICT_C[@]}" -O0 -D__USE_MINGW_ANSI_STDIO=1 -Wno-float-conversion -Wno-format \
        examples/q3n/*.c -o "$out/q3n.exe"
}

test_wasm() {
    local python=build/wasm/venv/bin/python std
    local flags=(-target wasm32-wasi "${STRICT_C[@]}" "${BOTH[@]}" -DQ3N_NO_STDIO -DQ3N_NO_THREADS)
    if ! "$python" -c 'import ziglang, wasmtime' 2> /dev/null; then
        echo "zig cc and wasmtime are not installed: make deps-wasm"
        exit 77
    fi
    for std in c99 c11; do
        compile_only "wasm32-wasi -std=$std behind time.h" "$python" -m ziglang cc "${flags[@]}" \
            -std=$std -include time.h -c -x c tools/q3n_make.h -o "$out/object.o"
    done
    "$python" -m ziglang cc "${flags[@]}" -std=c11 -O2 "-DPROMPT=$prompt" tests/build_golden.c \
        -o "$out/program.wasm"
    printf '#!/bin/sh\nexec %s tests/run_wasm.py %s "$@"\n' "$python" "$out/program.wasm" \
        > "$out/program"
    chmod +x "$out/program"
    run_program "wasm32-wasi, run in wasmtime"
}

need() {    # COMPILER
    if ! command -v "$1" > /dev/null; then
        echo "$1 is not installed"
        exit 77
    fi
}

what=${1:?gcc, clang, musl, mingw, aarch64 or wasm}
out=${2:?a directory}/$what
mkdir -p "$out"
read_golden
case $what in
    gcc)     need gcc; need g++; test_gcc ;;
    clang)   need clang; need clang++; test_compiler clang clang++ ;;
    musl)    need musl-gcc; test_musl ;;
    mingw)   need x86_64-w64-mingw32-gcc; test_mingw ;;
    aarch64) need aarch64-linux-gnu-gcc; test_cross aarch64-linux-gnu-gcc ;;
    wasm)    test_wasm ;;
    *)       exit 2 ;;
esac
printf '%d builds\n' "$checks"
