"""examples/python as a package: installed by pip into a venv, from the checkout and from a source
distribution, with the library compiled by what is there."""
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import unittest
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "examples" / "python"
STORIES = ROOT / "build" / "models" / "stories.q3n"

# Run in the venv, in an empty folder: where the package is, what it carries, what it computes.
PROGRAM = """
import importlib.metadata, json, pathlib, sys, qwen3next
folder = pathlib.Path(qwen3next.__file__).parent
qwen3next.load()
with qwen3next.Model(sys.argv[1]) as model, model.session(capacity=64) as session:
    text = "".join(session.generate(sys.argv[2], 8, temperature=0))
print(json.dumps({"folder": str(folder), "library": qwen3next._lib._name, "text": text,
                  "files": sorted(p.name for p in folder.iterdir() if p.is_file()),
                  "version": importlib.metadata.version("qwen3next"),
                  "makes": hasattr(qwen3next.load(), "q3n_quantize_rows"),
                  "library_version": qwen3next.load().q3n_version()}))
"""


def quick_environment():
    """Not optimised, without SIMD kernels: how it is built is what counts."""
    environment = {k: v for k, v in os.environ.items()
                   if k not in ("QWEN3NEXT_LIB", "PYTHONPATH", "PIP_FIND_LINKS")}
    return dict(environment, CFLAGS="-O0 -DQ3N_NO_SIMD", PIP_NO_INDEX="1",
                PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_CACHE_DIR="1")


@unittest.skipUnless(importlib.util.find_spec("ensurepip"), "python3-venv is not installed")
class Installed(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.venv = pathlib.Path(cls.folder.name, "venv")
        subprocess.run([sys.executable, "-m", "venv", str(cls.venv)], check=True)
        cls.python = str(cls.venv / "bin" / "python")

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def run_python(self, *args):
        done = subprocess.run([self.python, *args], cwd=self.folder.name, env=quick_environment(),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        return done.stdout.decode()

    def check_installed(self):
        case = json.loads((ROOT / "examples/stories/golden.json").read_text())["greedy"][0]
        prompt = "<|endoftext|>" + case["prompt"]
        found = json.loads(self.run_python("-c", PROGRAM, str(STORIES), prompt))
        folder = pathlib.Path(found["folder"])
        self.assertIn(self.venv.resolve(), folder.resolve().parents)
        self.assertEqual(pathlib.Path(found["library"]).parent, folder)
        self.assertEqual(found["files"],
                         ["__init__.py", "__main__.py", "libqwen3next.so", "py.typed"])
        v = found["library_version"]
        self.assertEqual(found["version"], "%d.%d.%d" % (v // 10000, v // 100 % 100, v % 100))
        self.assertTrue(found["makes"])          # q3n_make.h is in it too
        self.assertGreater(len(found["text"]), 8)
        self.assertTrue(case["text"].startswith(prompt + found["text"]), found["text"])

    def test_checkout(self):
        before = sorted(PACKAGE.rglob("*"))
        self.run_python("-m", "pip", "install", "--quiet", str(PACKAGE))
        self.assertEqual(sorted(PACKAGE.rglob("*")), before)      # builds leave nothing here
        self.check_installed()
        done = subprocess.run([self.python, "-m", "qwen3next"], cwd=self.folder.name,
                              env=quick_environment(), stderr=subprocess.PIPE)
        self.assertEqual((done.returncode, done.stderr.split()[0]), (2, b"usage:"))

    def test_source_distribution(self):
        sys.path.insert(0, str(PACKAGE))
        try:
            import build_backend
        finally:
            sys.path.pop(0)
        name = build_backend.build_sdist(self.folder.name)
        with tarfile.open(os.path.join(self.folder.name, name)) as tar:
            tar.extractall(self.folder.name)
        self.run_python("-m", "pip", "wheel", "--quiet", "--wheel-dir", self.folder.name,
                        "./" + name[:-len(".tar.gz")])
        wheel, = pathlib.Path(self.folder.name).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            self.assertIsNone(archive.testzip())
            self.assertIn("qwen3next/libqwen3next.so", archive.namelist())
            licence, = [n for n in archive.namelist() if n.endswith(".dist-info/LICENSE")]
            self.assertEqual(archive.read(licence), (ROOT / "LICENSE").read_bytes())
        self.run_python("-m", "pip", "install", "--quiet", "--force-reinstall", str(wheel))
        self.check_installed()


if __name__ == "__main__":
    unittest.main()
