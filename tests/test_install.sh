#!/usr/bin/env bash
# Installs into an empty folder, builds tests/consumer.c with what is there by every way there is,
# runs it, and removes all again.
#
# usage: test_install.sh DIRECTORY         (MAKE, CC: as in the Makefile)
#
# Without pkg-config, cmake or python3 what needs them is skipped, by name.
set -euo pipefail
cd "$(dirname "$0")/.."

ROOT=$PWD
CC=${CC:-cc}
MAKE=${MAKE:-make}
MODEL=$ROOT/build/models/qwen3_dense.q3n
. tests/checks.sh

has() {    # COMMAND NAME_OF_TEST
    if command -v "$1" > /dev/null; then return; fi
    echo "skipped: $2 ($1 is not installed)"
    return 1
}

expect() {    # WHAT GOT WANT
    if [ "$2" != "$3" ]; then
        diff <(printf '%s\n' "$2") <(printf '%s\n' "$3") || true
        fail "$1: see the difference (< found, > expected)"
    fi
    ok "$1"
}

# Does the program print what it should, from the shared library if that is what it was linked with?
# Who links by hand says where that is (LD_LIBRARY_PATH); what CMake made must find it alone.
unset LD_LIBRARY_PATH
check_program() {    # NAME PROGRAM shared|static
    local got loaded=static
    got=$("$2" "$MODEL") || fail "$1: cannot be run"
    if readelf -d "$2" | grep -q "NEEDED.*\[$soname\]"; then loaded=shared; fi
    expect "$1" "$got, $loaded" "qwen3_dense: $n_tensors tensors, $3"
}

# ---- What is installed ----

version_of_header() {
    sed -n 's/^#define Q3N_VERSION_[MP][A-Z]* *\([0-9]*\)$/\1/p' qwen3next.h | paste -s -d.
}

abi_of_header() {
    sed -n 's/^#define Q3N_ABI  *\([0-9]*\).*/\1/p' qwen3next.h
}

# Names of the API: what is declared where Q3N_DEF stands.
api_of() {    # HEADER...
    local header
    for header in "$@"; do
        "$CC" -E -P -DQ3N_DEF=Q3N_PUBLIC -I"$prefix/include" "$header"
    done | tr '\n' ' ' | grep -oE 'Q3N_PUBLIC[^;]*;' \
        | sed -E 's/^[^(]*\b(q3n_[a-z0-9_]+) *\(.*/\1/' | sort -u
}

test_files() {
    local file
    for file in bin/q3n bin/q3n-convert include/qwen3next.h include/q3n_make.h \
        lib/libqwen3next.a "lib/libqwen3next.so.$version" lib/pkgconfig/qwen3next.pc \
        lib/cmake/qwen3next/qwen3next-config.cmake share/man/man1/q3n.1 \
        share/bash-completion/completions/q3n share/zsh/site-functions/_q3n \
        share/fish/vendor_completions.d/q3n.fish share/qwen3next/convert.py \
        share/doc/qwen3next/LICENSE; do
        [ -s "$prefix/$file" ] || fail "$file is not installed"
    done
    for file in q3n q3n-convert; do
        [ -x "$prefix/bin/$file" ] || fail "$file is not executable"
    done
    expect "soname" "$(readelf -d "$prefix/lib/libqwen3next.so" \
        | sed -n 's/.*SONAME.*\[\(.*\)\]/\1/p')" "$soname"
    expect "$soname leads to the library" "$(readlink -f "$prefix/lib/$soname")" \
        "$(readlink -f "$prefix")/lib/libqwen3next.so.$version"
    expect "q3n --version" "$("$prefix/bin/q3n" --version)" "q3n $version"
}

# Staging: the same files as without DESTDIR, and none knows of it.
test_destdir() {
    "$MAKE" install DESTDIR="$out/stage" PREFIX=/usr LIBDIR=/usr/lib/machine > /dev/null
    expect "DESTDIR, LIBDIR: the same files" \
        "$(cd "$out/stage/usr" && find . ! -type d | sed 's|/lib/machine/|/lib/|' | sort)" \
        "$(cd "$prefix" && find . ! -type d | sort)"
    if grep -rIl "$out" "$out/stage"; then fail "files that name DESTDIR"; fi
    grep -qx 'libdir=${prefix}/lib/machine' "$out/stage/usr/lib/machine/pkgconfig/qwen3next.pc" \
        || fail "qwen3next.pc: libdir"
    ok "DESTDIR is in no file"
    "$MAKE" uninstall DESTDIR="$out/stage" PREFIX=/usr LIBDIR=/usr/lib/machine > /dev/null
    expect "DESTDIR: uninstalled" "$(find "$out/stage" ! -type d)" ""
}

test_exports() {
    local want
    want=$(api_of "$prefix"/include/*.h)
    [ "$(wc -l <<< "$want")" -gt 80 ] || fail "found few functions in the headers"
    expect "shared library: exports the API and nothing else" \
        "$(nm -D --defined-only "$prefix/lib/$soname" | awk '$2 != "A" { print $3 }' \
            | sed 's/@.*//' | sort)" "$want"
    expect "static library: the same" \
        "$(nm -g --defined-only "$prefix/lib/libqwen3next.a" | awk 'NF == 3 { print $3 }' | sort)" \
        "$want"
    expect "versions of symbols" "$(nm -D --defined-only --with-symbol-versions \
        "$prefix/lib/$soname" | grep -c "@@QWEN3NEXT_$abi\$")" "$(wc -l <<< "$want")"
}

# ---- Ways to build with it ----

test_by_hand() {
    "$CC" -std=c11 tests/consumer.c -I"$prefix/include" -L"$prefix/lib" -lqwen3next \
        -o "$out/program"
    LD_LIBRARY_PATH=$prefix/lib check_program "cc, shared" "$out/program" shared
    "$CC" -std=c11 tests/consumer.c -I"$prefix/include" "$prefix/lib/libqwen3next.a" \
        -lm -lpthread -o "$out/program"
    check_program "cc, static" "$out/program" static
    # Few kernels: that the header is found and complete is what counts.
    "$CC" -std=c11 -O0 -DQ3N_IMPLEMENTATION -DQ3N_NO_SIMD tests/consumer.c -I"$prefix/include" \
        -lm -lpthread -o "$out/program"
    check_program "cc, header alone" "$out/program" static
}

test_pkg_config() {
    has pkg-config "pkg-config" || return 0
    export PKG_CONFIG_PATH=$prefix/lib/pkgconfig
    pkg-config --validate qwen3next
    expect "pkg-config --modversion" "$(pkg-config --modversion qwen3next)" "$version"
    # shellcheck disable=SC2046
    "$CC" -std=c11 tests/consumer.c $(pkg-config --cflags --libs qwen3next) -o "$out/program"
    LD_LIBRARY_PATH=$prefix/lib check_program "pkg-config, shared" "$out/program" shared
    if ! "$CC" -static -x c - -o "$out/program" <<< 'int main(void) { return 0; }' \
        2> "$out/log"; then
        echo "skipped: pkg-config --static (the static C library is not installed)"
        return
    fi
    # shellcheck disable=SC2046
    "$CC" -std=c11 -static tests/consumer.c $(pkg-config --static --cflags --libs qwen3next) \
        -o "$out/program"
    check_program "pkg-config --static" "$out/program" static
}

# Neither optimised nor with all kernels: how it is built is what counts.
QUICK=(-DCMAKE_BUILD_TYPE=Debug -DCMAKE_C_FLAGS=-DQ3N_NO_SIMD)

cmake_in() {    # SOURCES FOLDER OPTIONS...
    local sources=$1 folder=$2
    shift 2
    mkdir -p "$folder"
    cmake -S "$sources" -B "$folder" -DCMAKE_C_COMPILER="$CC" "$@" > "$folder/log" \
        && cmake --build "$folder" >> "$folder/log" || { cat "$folder/log"; return 1; }
}

test_find_package() {
    has cmake "cmake, find_package" || return 0
    mkdir -p "$out/find"
    cat > "$out/find/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.14)
project(consumer C)
find_package(qwen3next ${version%.*} REQUIRED)
foreach(kind qwen3next shared static)
    add_executable(program_\${kind} $ROOT/tests/consumer.c)
    target_link_libraries(program_\${kind} PRIVATE qwen3next::\${kind})
endforeach()
add_library(headers OBJECT $ROOT/tests/consumer.c)
target_link_libraries(headers PRIVATE qwen3next::headers)
find_package(qwen3next 99 QUIET)
if(qwen3next_FOUND)
    message(FATAL_ERROR "version 99 was found")
endif()
END
    cmake_in "$out/find" "$out/find/build" -DCMAKE_PREFIX_PATH="$prefix"
    check_program "cmake, find_package: qwen3next" "$out/find/build/program_qwen3next" shared
    check_program "cmake, find_package: shared" "$out/find/build/program_shared" shared
    check_program "cmake, find_package: static" "$out/find/build/program_static" static
}

test_fetch_content() {
    has cmake "cmake, FetchContent" || return 0
    mkdir -p "$out/fetch"
    cat > "$out/fetch/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.18)
project(consumer C)
include(FetchContent)
FetchContent_Declare(qwen3next SOURCE_DIR $ROOT SOURCE_SUBDIR tools/cmake)
FetchContent_MakeAvailable(qwen3next)
add_executable(program $ROOT/tests/consumer.c)
target_link_libraries(program PRIVATE qwen3next::qwen3next)
add_executable(program_headers $ROOT/tests/consumer.c)
target_link_libraries(program_headers PRIVATE qwen3next::headers)
target_compile_definitions(program_headers PRIVATE Q3N_IMPLEMENTATION)
END
    cmake_in "$out/fetch" "$out/fetch/build" -DBUILD_SHARED_LIBS=ON "${QUICK[@]}"
    check_program "cmake, FetchContent: shared" "$out/fetch/build/program" shared
    check_program "cmake, FetchContent: headers" "$out/fetch/build/program_headers" static
    expect "cmake: the same exports" \
        "$(nm -D --defined-only "$(find "$out/fetch/build" -name "$soname")" | sort -k 3 \
            | awk '$2 != "A" { print $3 }')" \
        "$(nm -D --defined-only "$prefix/lib/$soname" | sort -k 3 | awk '$2 != "A" { print $3 }')"
}

# CMake's own build and install, found by the same package files.
test_cmake_install() {
    has cmake "cmake, install" || return 0
    cmake_in "$ROOT/tools/cmake" "$out/alone" "${QUICK[@]}" \
        -DCMAKE_INSTALL_PREFIX="$out/alone/prefix"
    cmake --install "$out/alone" > "$out/alone/log"
    rm -rf "$out/find/build"
    sed -i 's/(kind .*)/(kind qwen3next static)/' "$out/find/CMakeLists.txt"
    cmake_in "$out/find" "$out/find/build" -DCMAKE_PREFIX_PATH="$out/alone/prefix"
    check_program "cmake, install" "$out/find/build/program_qwen3next" static
    expect "cmake, install: qwen3next.pc" \
        "$(find "$out/alone/prefix" -name qwen3next.pc -exec sed -n 's/^includedir=//p' {} +)" \
        '${prefix}/include'
}

test_converter() {
    has python3 "q3n-convert" || return 0
    # From elsewhere, with no variable that leads back to the sources.
    (cd "$out" && env -u QWEN3NEXT_LIB -u PYTHONPATH "$prefix/bin/q3n-convert" \
        "$ROOT/tests/golden/qwen3_dense" dense.q3n --type q8 2> convert.log) \
        || { cat "$out/convert.log"; fail "q3n-convert"; }
    grep -q '^q3n-convert: wrote ' "$out/convert.log" || fail "q3n-convert: its name"
    "$prefix/bin/q3n" quantize "$MODEL" "$out/quantized.q3n" --type q8 > /dev/null 2>&1
    cmp "$out/dense.q3n" "$out/quantized.q3n" || fail "q3n-convert and q3n quantize differ"
    ok "q3n-convert with the installed header and library"
    # Also what is imported only when it is needed.
    local module modules=$prefix/share/qwen3next
    for module in $(sed -nE 's/^ *(import|from) ([a-z0-9_]+).*/\2/p' "$modules"/*.py); do
        if [ -e "tools/$module.py" ] && ! [ -e "$modules/$module.py" ]; then
            fail "q3n-convert: $module.py is not installed"
        fi
    done
    ok "q3n-convert: all modules"
}

test_uninstall() {
    "$MAKE" uninstall PREFIX="$prefix" > /dev/null
    expect "uninstalled: nothing is left" "$(find "$prefix" ! -type d)" ""
    expect "no folders of its own are left" "$(find "$prefix" -name '*qwen3next*')" ""
}

out=${1:?a directory}
rm -rf "$out"
mkdir -p "$out"
out=$(cd "$out" && pwd)
prefix=$out/prefix
version=$(version_of_header)
abi=$(abi_of_header)
soname=libqwen3next.so.$abi
n_tensors=$(build/q3n info "$MODEL" --tensors --json | sed 's/.*"tensors"//' \
    | grep -o '"name"' | wc -l)
if [ "$(uname)" != Linux ]; then
    echo "knows the names of Linux only"
    exit 77
fi
"$MAKE" install PREFIX="$prefix" > "$out/install.log" || { cat "$out/install.log"; fail install; }
test_files
test_destdir
test_exports
test_by_hand
test_pkg_config
test_find_package
test_fetch_content
test_cmake_install
test_converter
test_uninstall
printf '%d checks\n' "$checks"
