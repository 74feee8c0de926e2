"""Builds the package by PEP 517 with Python's standard library and a C compiler.

A wheel holds the folder qwen3next/ and the library, compiled from the two headers: those of the
checkout, or the copies beside this file in a source distribution.  CC and CFLAGS count.
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
ROOT = HERE.parent.parent
# Where each header may be.
HEADERS = {"qwen3next.h": (HERE, ROOT), "q3n_make.h": (HERE, ROOT / "tools")}
IMPLEMENTATIONS = {"qwen3next.h": "Q3N_IMPLEMENTATION", "q3n_make.h": "Q3N_MAKE_IMPLEMENTATION"}
LIBRARY = {"win32": "qwen3next.dll", "darwin": "libqwen3next.dylib"}.get(
    sys.platform, "libqwen3next.so")


def headers():
    """{name: path} of what there is."""
    found = {name: folder / name for name, folders in HEADERS.items() for folder in folders[::-1]
             if (folder / name).exists()}
    if len(found) < len(HEADERS):
        raise RuntimeError("found no qwen3next.h: pip 21.3 or newer builds in the checkout")
    return found


def project():
    """The texts of pyproject.toml, and the version of the header."""
    text = (HERE / "pyproject.toml").read_text(encoding="utf-8")
    values = dict(re.findall(r'^([a-z-]+) = "(.*)"$', text, re.M))
    header = headers()["qwen3next.h"].read_text(encoding="utf-8")
    values["version"] = ".".join(
        re.search(r"#define Q3N_VERSION_%s (\d+)" % part, header).group(1)
        for part in ("MAJOR", "MINOR", "PATCH"))
    return values


def metadata():
    p = project()
    return ("Metadata-Version: 2.1\nName: %(name)s\nVersion: %(version)s\n"
            "Summary: %(description)s\nLicense: MIT\nRequires-Python: %(requires-python)s\n" % p)


def compile_library(path):
    found = headers()
    source = "".join('#define %s\n#include "%s"\n' % (IMPLEMENTATIONS[name], name)
                     for name in IMPLEMENTATIONS)
    export = ("__declspec(dllexport)" if sys.platform == "win32"
              else '__attribute__((visibility("default")))')
    command = shlex.split(os.environ.get("CC", "cc")) + [
        "-std=c11", "-O2", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-shared",
        "-DQ3N_DEF=" + export] + ["-I%s" % path.parent for path in found.values()]
    command += shlex.split(os.environ.get("CFLAGS", "")) + ["-x", "c", "-", "-o", str(path)]
    if sys.platform != "win32":
        command += ["-lm", "-lpthread"]
    subprocess.run(command, input=source.encode(), check=True)


def package_files():
    return sorted(p for p in (HERE / "qwen3next").iterdir()
                  if p.suffix == ".py" or p.name == "py.typed")


class Wheel:
    """A zip archive that ends with the list of its files and their digests."""

    def __init__(self, path, info):
        self.archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
        self.info, self.record = info, ""

    def add(self, name, data, mode=0o644):
        entry = zipfile.ZipInfo(name)                    # of 1980: the same bytes every time
        entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, (0o100000 | mode) << 16
        self.archive.writestr(entry, data)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        self.record += "%s,sha256=%s,%d\n" % (name, digest, len(data))

    def close(self):
        name = self.info + "/RECORD"
        self.archive.writestr(zipfile.ZipInfo(name), self.record + name + ",,\n")
        self.archive.close()


# ---- What pip calls ----

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    p = project()
    tag = "py3-none-" + re.sub(r"[-.]", "_", sysconfig.get_platform())
    name = "%(name)s-%(version)s" % p
    wheel = Wheel(os.path.join(wheel_directory, "%s-%s.whl" % (name, tag)), name + ".dist-info")
    for path in package_files():
        wheel.add("qwen3next/" + path.name, path.read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        library = pathlib.Path(folder) / LIBRARY
        compile_library(library)
        wheel.add("qwen3next/" + LIBRARY, library.read_bytes(), 0o755)
    wheel.add(wheel.info + "/METADATA", metadata().encode())
    wheel.add(wheel.info + "/WHEEL", ("Wheel-Version: 1.0\nGenerator: build_backend\n"
                                      "Root-Is-Purelib: false\nTag: %s\n" % tag).encode())
    wheel.close()
    return "%s-%s.whl" % (name, tag)


def build_sdist(sdist_directory, config_settings=None):
    name = "%(name)s-%(version)s" % project()
    with tarfile.open(os.path.join(sdist_directory, name + ".tar.gz"), "w:gz") as tar:
        for path in package_files():
            tar.add(path, "%s/qwen3next/%s" % (name, path.name))
        for path in [HERE / "pyproject.toml", HERE / "build_backend.py", *headers().values()]:
            tar.add(path, "%s/%s" % (name, path.name))
        entry, data = tarfile.TarInfo(name + "/PKG-INFO"), metadata().encode()
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    return name + ".tar.gz"
