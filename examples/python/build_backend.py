"""Builds the package by PEP 517 with Python's standard library and a C compiler.

A wheel holds the folder qwen3next/ and the library, compiled from the two headers: those of the
checkout, or their copies in a source distribution.  CC and CFLAGS count.
"""
import base64
import hashlib
import io
import os
import pathlib
import re
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile

HERE = pathlib.Path(__file__).resolve().parent
# What a source distribution holds beside this file, and its folder in the checkout.
COPIED = {"qwen3next.h": "../..", "q3n_make.h": "../../tools", "LICENSE": "../.."}
SOURCE = """#define Q3N_IMPLEMENTATION
#define Q3N_MAKE_IMPLEMENTATION
#include "q3n_make.h"
"""
LIBRARY = {"win32": "qwen3next.dll", "darwin": "libqwen3next.dylib"}.get(
    sys.platform, "libqwen3next.so")


def copied(name):
    """The path of a file of COPIED."""
    for path in (HERE / name, HERE / COPIED[name] / name):
        if path.exists():
            return path
    raise RuntimeError("found no %s: pip 21.3 or newer builds in the checkout" % name)


def project():
    """The texts of pyproject.toml, and the version of the header."""
    text = (HERE / "pyproject.toml").read_text(encoding="utf-8")
    values = dict(re.findall(r'^([a-z-]+) = "(.*)"$', text, re.M))
    header = copied("qwen3next.h").read_text(encoding="utf-8")
    values["version"] = ".".join(
        re.search(r"#define Q3N_VERSION_%s (\d+)" % part, header).group(1)
        for part in ("MAJOR", "MINOR", "PATCH"))
    return values


def metadata():
    p = project()
    return ("Metadata-Version: 2.1\nName: %(name)s\nVersion: %(version)s\n"
            "Summary: %(description)s\nLicense: MIT\nLicense-File: LICENSE\n"
            "Requires-Python: %(requires-python)s\n" % p)


def compile_library(path):
    export = ("__declspec(dllexport)" if sys.platform == "win32"
              else '__attribute__((visibility("default")))')
    command = shlex.split(os.environ.get("CC", "cc")) + [
        "-std=c11", "-O2", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-shared",
        "-DQ3N_DEF=" + export]
    command += ["-I%s" % copied(name).parent for name in ("qwen3next.h", "q3n_make.h")]
    command += shlex.split(os.environ.get("CFLAGS", "")) + ["-x", "c", "-", "-o", str(path)]
    if sys.platform != "win32":
        command += ["-lm", "-lpthread"]
    subprocess.run(command, input=SOURCE.encode(), check=True)


def package_files():
    return sorted(p for p in (HERE / "qwen3next").iterdir()
                  if p.suffix == ".py" or p.name == "py.typed")


def write_wheel(path, info, files):
    """A zip archive of files, {name: bytes}, that ends with the list of them and their digests."""
    record = ""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)                # of 1980: the same bytes every time
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
            archive.writestr(entry, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record += "%s,sha256=%s,%d\n" % (name, digest, len(data))
        name = info + "/RECORD"
        archive.writestr(zipfile.ZipInfo(name), record + name + ",,\n")


# ---- What pip calls ----

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    name = "%(name)s-%(version)s" % project()
    info = name + ".dist-info"
    tag = "py3-none-" + re.sub(r"[-.]", "_", sysconfig.get_platform())
    files = {"qwen3next/" + path.name: path.read_bytes() for path in package_files()}
    with tempfile.TemporaryDirectory() as folder:
        library = pathlib.Path(folder) / LIBRARY
        compile_library(library)
        files["qwen3next/" + LIBRARY] = library.read_bytes()
    files[info + "/LICENSE"] = copied("LICENSE").read_bytes()
    files[info + "/METADATA"] = metadata().encode()
    files[info + "/WHEEL"] = ("Wheel-Version: 1.0\nGenerator: build_backend\n"
                              "Root-Is-Purelib: false\nTag: %s\n" % tag).encode()
    wheel = "%s-%s.whl" % (name, tag)
    write_wheel(os.path.join(wheel_directory, wheel), info, files)
    return wheel


def build_sdist(sdist_directory, config_settings=None):
    name = "%(name)s-%(version)s" % project()
    with tarfile.open(os.path.join(sdist_directory, name + ".tar.gz"), "w:gz") as tar:
        for path in package_files():
            tar.add(path, "%s/qwen3next/%s" % (name, path.name))
        for path in [HERE / "pyproject.toml", HERE / "build_backend.py", *map(copied, COPIED)]:
            tar.add(path, "%s/%s" % (name, path.name))
        entry, data = tarfile.TarInfo(name + "/PKG-INFO"), metadata().encode()
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    return name + ".tar.gz"
