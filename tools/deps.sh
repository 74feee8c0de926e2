#!/usr/bin/env bash
# Installs what building and testing need and this machine lacks; what is there already is not
# touched.  Debian and its relatives: through apt-get, with sudo unless run by root.
#
# usage: deps.sh build|aarch64|windows|wasm DIRECTORY
#
#   build     C and C++ compiler, cmocka, a Python with numpy and h5py (the latter in
#             DIRECTORY/venv where the system's Python cannot have them); cmake, pkg-config and
#             python3-venv for the tests of what is installed, if they can be had
#   aarch64   cross compiler, qemu-user, and cmocka for arm64, unpacked into DIRECTORY/sysroot
#   windows   MinGW-w64, wine, and cmocka compiled from Debian's source in DIRECTORY/cmocka
#   wasm      zig cc and wasmtime from PyPI in DIRECTORY/venv
set -euo pipefail

CC=${CC:-cc}
CXX=${CXX:-c++}

say() { printf 'deps: %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

has() { command -v "$1" > /dev/null 2>&1; }

# apt-get as root.  Fails with what to do by hand where that is impossible.
apt_install() {
    has apt-get || fail "no apt-get here: please install the equivalents of: $*"
    local as_root=()
    if [ "$(id -u)" != 0 ]; then
        has sudo || fail "not root and no sudo: please run as root: apt-get install $*"
        as_root=(sudo)
    fi
    say "installing: $*"
    # A fresh container has no package lists, an old one has outdated ones: an update mends both.
    if ! "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
            apt-get install -qq -y --no-install-recommends "$@" > /dev/null 2>&1; then
        "${as_root[@]}" apt-get update -qq \
            || fail "apt-get update failed: is there a network?  Needed: $*"
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
            apt-get install -qq -y --no-install-recommends "$@" > /dev/null \
            || fail "apt-get cannot install: $* (is there a network?)"
    fi
}

compiles() {    # LANGUAGE COMPILER HEADER
    printf '#include <%s>\nint main(void) { return 0; }\n' "$3" \
        | "$2" -x "$1" - -o /dev/null > /dev/null 2>&1
}

has_cmocka() {
    printf '%s\n' '#include <stdarg.h>' '#include <stddef.h>' '#include <stdint.h>' \
        '#include <setjmp.h>' '#include <cmocka.h>' 'int main(void) { return 0; }' \
        | "$CC" -x c - -o /dev/null -lcmocka > /dev/null 2>&1
}

python_works() { "$1" -c 'import numpy, h5py' > /dev/null 2>&1; }

# A Python with numpy and h5py: the first on the path, the system's, or one of our own.
python_found() {
    local python
    for python in "${PYTHON:-python3}" /usr/bin/python3 "$1/venv/bin/python"; do
        if python_works "$python"; then return 0; fi
    done
    return 1
}

python_install() {
    if has apt-get && { [ "$(id -u)" = 0 ] || has sudo; }; then
        apt_install python3 python3-numpy python3-h5py
        return
    fi
    has python3 || fail "no python3: please install Python 3.8 or newer with numpy and h5py"
    say "making $1/venv with numpy and h5py"
    python3 -m venv "$1/venv" || fail "python3 -m venv failed: please install numpy and h5py"
    "$1/venv/bin/python" -m pip install --quiet numpy h5py \
        || fail "pip cannot install numpy and h5py: is there a network?"
}

deps_build() {
    local packages=()
    compiles c "$CC" stdio.h || packages+=(gcc libc6-dev)
    compiles c++ "$CXX" memory || packages+=(g++)
    if [ ${#packages[@]} -gt 0 ]; then apt_install "${packages[@]}"; fi
    compiles c "$CC" stdio.h || fail "'$CC' still compiles no C"
    compiles c++ "$CXX" memory || fail "'$CXX' still compiles no C++"
    has_cmocka || apt_install libcmocka-dev
    has_cmocka || fail "'$CC' still does not find cmocka"
    python_found "$1" || python_install "$1"
    python_found "$1" || fail "still no Python with numpy and h5py"
    packages=()
    has cmake || packages+=(cmake)
    has pkg-config || packages+=(pkg-config)
    python3 -c 'import ensurepip' 2> /dev/null || packages+=(python3-venv)
    if [ ${#packages[@]} -gt 0 ]; then
        (apt_install "${packages[@]}") || say "without ${packages[*]}: tests will be skipped"
    fi
    say "compiler, cmocka, Python with numpy and h5py are there"
}

# cmocka for another architecture, without root and without telling the system of it: apt-get with
# lists of its own.
cmocka_arm64() {
    local root
    root=$(cd "$1" && pwd)
    mkdir -p "$root/apt/lists/partial" "$root/apt/archives/partial" "$root/sysroot"
    : > "$root/apt/status"
    local apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64
               -o "Dir::State::Lists=$root/apt/lists" -o "Dir::State::Status=$root/apt/status"
               -o "Dir::Cache=$root/apt" -o APT::Sandbox::User= -o Debug::NoLocking=1)
    say "fetching cmocka for arm64"
    "${apt[@]}" update || fail "apt-get update for arm64 failed: is there a network?"
    (cd "$root/apt" && "${apt[@]}" download libcmocka0 libcmocka-dev) \
        || fail "cannot fetch libcmocka for arm64"
    local package
    for package in "$root"/apt/*.deb; do dpkg-deb -x "$package" "$root/sysroot"; done
    rm -r "$root/apt"
}

deps_aarch64() {
    local packages=()
    compiles c aarch64-linux-gnu-gcc stdio.h \
        || packages+=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross)
    has qemu-aarch64 || packages+=(qemu-user)
    if [ ${#packages[@]} -gt 0 ]; then apt_install "${packages[@]}"; fi
    mkdir -p "$1"
    [ -e "$1/sysroot/usr/include/cmocka.h" ] || cmocka_arm64 "$1"
    say "cross compiler, qemu-aarch64 and cmocka for arm64 are there"
}

# Debian's source package, by lists of our own: the system's may have no sources.
cmocka_windows() {
    local root file
    root=$(mkdir -p "$1/cmocka" "$1/apt/lists/partial" && cd "$1" && pwd)
    mkdir -p "$root/apt/sources"
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
        if [ -e "$file" ]; then
            sed 's/^Types: deb$/Types: deb-src/; s/^deb /deb-src /' "$file" \
                > "$root/apt/sources/$(basename "$file")"
        fi
    done
    local apt=(apt-get -qq -o Dir::Etc::sourcelist=- -o "Dir::Etc::sourceparts=$root/apt/sources"
               -o "Dir::State::Lists=$root/apt/lists" -o APT::Sandbox::User= -o Debug::NoLocking=1)
    say "fetching the source of cmocka"
    "${apt[@]}" update || say "some of apt's sources did not answer"
    (cd "$root/apt" && "${apt[@]}" source --download-only cmocka) \
        || fail "cannot fetch the source of cmocka"
    tar -xf "$root"/apt/cmocka_*.orig.tar.?z -C "$root/apt"
    cp "$root"/apt/cmocka-*/include/*.h "$root/cmocka/"
    : > "$root/cmocka/config.h"
    x86_64-w64-mingw32-gcc -O1 -D__USE_MINGW_ANSI_STDIO=1 -DHAVE_CONFIG_H -DHAVE_ASSERT_H \
        -DHAVE_INTTYPES_H -DHAVE_IO_H -DHAVE_MALLOC_H -DHAVE_SIGNAL_H -DHAVE_STRINGS_H \
        -DHAVE_TIME_H -DHAVE_UNISTD_H -DHAVE_STRUCT_TIMESPEC -DHAVE_SNPRINTF -DHAVE_VSNPRINTF \
        -DHAVE_GCC_THREAD_LOCAL_STORAGE -I"$root/cmocka" -c "$root"/apt/cmocka-*/src/cmocka.c \
        -o "$root/cmocka/cmocka.o" || fail "cmocka does not compile for Windows"
    rm -r "$root/apt"
}

deps_windows() {
    local packages=()
    has x86_64-w64-mingw32-gcc || packages+=(gcc-mingw-w64-x86-64)
    has wine || packages+=(wine wine64)
    if [ ${#packages[@]} -gt 0 ]; then apt_install "${packages[@]}"; fi
    [ -e "$1/cmocka/cmocka.o" ] || cmocka_windows "$1"
    say "MinGW-w64, wine and cmocka for Windows are there"
}

deps_wasm() {
    local python=$1/venv/bin/python
    if ! "$python" -c 'import ziglang, wasmtime' > /dev/null 2>&1; then
        mkdir -p "$1"
        "${PYTHON:-python3}" -m venv "$1/venv" \
            || fail "python3 -m venv failed: please install python3-venv"
        "$python" -m pip install --quiet ziglang wasmtime \
            || fail "pip cannot install ziglang and wasmtime: is there a network?"
    fi
    say "zig cc and wasmtime are in $1/venv"
}

case ${1:-} in
    build)   deps_build "$2" ;;
    aarch64) deps_aarch64 "$2" ;;
    windows) deps_windows "$2" ;;
    wasm)    deps_wasm "$2" ;;
    *)       fail "usage: deps.sh build|aarch64|windows|wasm DIRECTORY" ;;
esac
