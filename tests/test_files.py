#!/usr/bin/env python3
"""What converter and command line read and write: every input replaced by what is no file, every
way in which writing fails.  tests/test_files.c asks the same of the library.

Environment: as tests/test_cli.py.
"""
import contextlib
import errno
import io
import os
import resource
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
TOOLS = os.path.join(HERE, os.pardir, "tools")
GOLDEN = os.path.join(HERE, "golden")
STORIES = os.path.join(HERE, os.pardir, "examples", "stories")
sys.path.insert(0, TOOLS)

import convert
import files
import synthetic
import tokenizer_file

ROOT = os.path.dirname(HERE)
COMMAND = shlex.split(os.environ.get("Q3N", os.path.join(ROOT, "build", "q3n")))
MODEL = os.path.join(os.environ.get("Q3N_MODELS", os.path.join(ROOT, "build", "models")),
                     "stories.q3n")
PATIENCE = 1800                  # seconds until a test that waits for a pipe is ended
NOBODY = 65534


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="q3n_")
        self.addCleanup(shutil.rmtree, self.dir)
        files.inputs.clear()
        signal.alarm(PATIENCE)   # ends the program: nothing here may wait
        self.addCleanup(signal.alarm, 0)

    def path(self, *names):
        return os.path.join(self.dir, *names)

    def write(self, name, text="older", mode=0o644):
        with open(self.path(name), "w") as f:
            f.write(text)
        os.chmod(self.path(name), mode)
        return self.path(name)

    def read(self, name):
        with open(self.path(name), "rb") as f:
            return f.read()

    def listing(self):
        """Names and what they are: what must be as before after an error."""
        return {name: (os.lstat(self.path(name)).st_mode, os.lstat(self.path(name)).st_ino)
                for name in os.listdir(self.dir)}

    def run_main(self, *args):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = convert.main([str(a) for a in args])
        return status, err.getvalue()

    def make(self, kind, path):
        """Something at path that is no readable file."""
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            os.mkdir(path)
        elif kind == "device":
            os.symlink("/dev/zero", path)
        elif kind == "empty":
            open(path, "wb").close()
        elif kind == "nowhere":
            os.symlink(self.path("nothing"), path)

    def run_cli(self, *args, status=0, **options):
        """(stdout, stderr)."""
        done = subprocess.run(COMMAND + list(args), check=False, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=PATIENCE, **options)
        out, err = done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
        self.assertEqual(done.returncode, status, (args, err))
        if status:
            self.assertEqual([line[:12] for line in err.splitlines()], ["q3n: error: "])
        return out, err


# ---- Reading ----

class Inputs(Case):
    def sources(self):
        """(what to convert, arguments, the file to replace) for every file that is read."""
        dense, lora = self.path("dense"), self.path("lora")
        shutil.copytree(STORIES, self.path("stories"))
        shutil.copytree(os.path.join(GOLDEN, "qwen3_next"), self.path("shards"))
        shutil.copytree(os.path.join(GOLDEN, "qwen3_dense"), dense)
        os.mkdir(lora)
        letters = {c: i for i, c in enumerate(tokenizer_file.byte_map())}
        synthetic.write_json(dense, "vocab.json", dict(letters, ab=256))
        synthetic.write_json(dense, "tokenizer_config.json", {})
        for name, text in (("merges.txt", "a b\n"), ("chat_template.jinja", "x")):
            with open(os.path.join(dense, name), "w") as f:
                f.write(text)
        synthetic.write_json(lora, "adapter_config.json", {"peft_type": "LORA", "r": 1})
        shutil.copy(os.path.join(dense, "model.safetensors"),
                    os.path.join(lora, "adapter_model.safetensors"))
        keras = self.path("m.keras")
        shutil.copy(os.path.join(GOLDEN, "keras", "seed_patched_real_rope.keras"), keras)
        shutil.copy(keras, self.path("m.weights.h5"))
        for folder, names in (
                ("stories", ("config.json", "model.safetensors", "tokenizer.json")),
                ("shards", ("model.safetensors.index.json", "model-00003-of-00005.safetensors")),
                ("dense", ("vocab.json", "merges.txt", "tokenizer_config.json",
                           "chat_template.jinja", "config.json"))):
            for name in names:
                yield self.path(folder), (), self.path(folder, name)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            yield dense, ("--lora", lora), os.path.join(lora, name)
        yield dense, ("--config", self.path("other.json")), self.path("other.json")
        yield keras, (), keras
        yield self.path("m.weights.h5"), (), self.path("m.weights.h5")
        yield os.path.join(dense, "model.safetensors"), (), os.path.join(dense, "model.safetensors")

    def test_every_input(self):
        """No wait and no traceback: an error that names the file, unless it may be missing."""
        optional = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json",
                    "merges.txt", "model.safetensors.index.json")
        n = 0
        for source, args, path in list(self.sources()):
            saved = path + ".saved" if os.path.lexists(path) else None
            if saved:
                os.rename(path, saved)
            for kind in ("pipe", "folder", "device", "missing", "empty", "nowhere"):
                self.make(kind, path)
                status, err = self.run_main(source, self.path("out.q3n"), "-q", *args)
                may_be_missing = os.path.basename(path) in optional
                gone = kind in ("missing", "nowhere") and may_be_missing
                with self.subTest(file=path, kind=kind):
                    if status == 0:
                        self.assertTrue(gone or os.path.basename(path) in (
                            "merges.txt", "chat_template.jinja"), kind)
                    else:
                        self.assertEqual((status, err.count("\n")), (1, 1), err)
                        self.assertIn(self.dir if kind in ("missing", "nowhere") else path, err)
                        if kind in ("pipe", "folder", "device") and source != path:
                            self.assertIn("found a %s, expected a regular file" % kind, err)
                n += 1
                if os.path.isdir(path) and not os.path.islink(path):
                    os.rmdir(path)
                elif os.path.lexists(path):
                    os.remove(path)
            if saved:
                os.rename(saved, path)
        self.assertEqual(n, 16 * 6)

    def test_bounded(self):
        path = self.write("a", "12345")
        self.assertEqual(files.read_input(path, 5), b"12345")
        with self.assertRaisesRegex(files.ConvertError, "a: found 5 bytes, expected at most 4"):
            files.read_input(path, 4)
        with self.assertRaisesRegex(files.ConvertError, "not valid UTF-8"):
            with open(path, "wb") as f:
                f.write(b"\xff")
            files.read_text(path, 5)
        with self.assertRaisesRegex(files.ConvertError, "cannot read"):
            files.open_input("a\0b")


# ---- Writing ----

class Outputs(Case):
    def put(self, name, data=b"newer"):
        with files.Output(self.path(name)) as f:
            f.write(data)

    def test_new(self):
        """The umask decides about a new file, and nothing else is there."""
        old = os.umask(0o027)
        self.addCleanup(os.umask, old)
        self.put("new")
        self.assertEqual(self.read("new"), b"newer")
        self.assertEqual(stat.S_IMODE(os.stat(self.path("new")).st_mode), 0o640)
        self.assertEqual(os.listdir(self.dir), ["new"])

    def test_mode_is_kept(self):
        for mode in (0o600, 0o640, 0o666, 0o755):
            self.write("a", mode=mode)
            self.put("a")
            self.assertEqual(self.read("a"), b"newer")
            self.assertEqual(stat.S_IMODE(os.stat(self.path("a")).st_mode), mode)

    def test_not_readable_while_unfinished(self):
        self.write("a", mode=0o600)
        with files.Output(self.path("a")) as f:
            self.assertEqual(stat.S_IMODE(os.fstat(f.fileno()).st_mode), 0o600)

    def test_links(self):
        """The file at the end of a chain of links is replaced, or made; the links stay."""
        os.mkdir(self.path("d"))
        self.write("d/real")
        os.symlink("d/real", self.path("one"))
        os.symlink(self.path("one"), self.path("two"))
        os.symlink("d/none", self.path("to_none"))
        self.put("two")
        self.put("to_none")
        for link in ("one", "two", "to_none"):
            self.assertTrue(os.path.islink(self.path(link)))
        self.assertEqual((self.read("d/real"), self.read("d/none")), (b"newer", b"newer"))
        self.assertEqual(sorted(os.listdir(self.path("d"))), ["none", "real"])

    def test_what_is_no_file(self):
        os.symlink("loop", self.path("loop"))
        os.symlink("/dev/null", self.path("null"))
        os.mkfifo(self.path("pipe"))
        os.mkdir(self.path("folder"))
        before = self.listing()
        for name in ("loop", "null", "pipe", "folder", "none/x", "x" * 300):
            with self.subTest(name), self.assertRaises(files.ConvertError) as caught:
                self.put(name)
            self.assertIn(self.path(name), str(caught.exception))
        self.assertEqual(self.listing(), before)
        self.put("x" * 255)              # the longest name there is

    def test_no_permission(self):
        self.write("a", mode=0o444)
        if os.geteuid() == 0:            # who may write everywhere
            os.chown(self.dir, NOBODY, NOBODY)
            os.seteuid(NOBODY)
            self.addCleanup(os.seteuid, 0)
        with self.assertRaisesRegex(files.ConvertError, "a: cannot write: Permission denied"):
            self.put("a")
        os.chmod(self.dir, 0o555)
        self.addCleanup(os.chmod, self.dir, 0o755)
        with self.assertRaisesRegex(files.ConvertError, "b: cannot write: Permission denied"):
            self.put("b")

    def test_system_errors(self):
        """Every call of the system that can fail, failing: the old file stays, nothing is left."""
        for old in (False, True):
            for name in ("fdopen", "fchmod", "fsync", "replace"):
                if old:
                    self.write("a", mode=0o600)
                elif name == "fchmod":
                    continue
                before = self.listing()

                def fail(*_, **__):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                with self.subTest(name, old=old), mock.patch.object(os, name, fail):
                    with self.assertRaises((files.ConvertError, OSError)) as caught:
                        self.put("a")
                    self.assertIn("Input/output error", str(caught.exception))
                self.assertEqual(self.listing(), before)

    def test_full_disk(self):
        """The limit on a file's size stands for the disk: also in what is still buffered."""
        code = ("import resource, sys; sys.path.insert(0, %r); import files\n"
                "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))\n"
                "try:\n"
                "    with files.Output(sys.argv[1]) as f: f.write(bytes(int(sys.argv[2])))\n"
                "except files.ConvertError as e: print(e)" % TOOLS)
        self.write("a")
        before = self.listing()
        for n in (5001, 1 << 20):
            run = subprocess.run([sys.executable, "-c", code, self.path("a"), str(n)], check=True,
                                 stdout=subprocess.PIPE, universal_newlines=True)
            self.assertEqual(run.stdout, "%s: cannot write: %s\n" % (self.path("a"),
                                                                     os.strerror(errno.EFBIG)))
            self.assertEqual(self.listing(), before)

    def test_exceptions(self):
        self.write("a")
        before = self.listing()
        for error in (ValueError("x"), KeyboardInterrupt(), SystemExit(3), OSError(5, "x", "b")):
            with self.assertRaises(type(error)), files.Output(self.path("a")) as f:
                f.write(b"half")
                raise error
            self.assertEqual(self.listing(), before)

    def test_two_writers(self):
        """Each has its own unfinished file; who ends last wins, and the file is one of the two."""
        with files.Output(self.path("a")) as f, files.Output(self.path("a")) as g:
            f.write(b"first" * 1000)
            g.write(b"second" * 1000)
            self.assertEqual(len(os.listdir(self.dir)), 2)
        self.assertEqual(self.read("a"), b"first" * 1000)
        self.assertEqual(os.listdir(self.dir), ["a"])

    def test_killed(self):
        """kill -9 in the middle: the old file is as it was."""
        code = ("import os, sys; sys.path.insert(0, %r); import files\n"
                "with files.Output(sys.argv[1]) as f:\n"
                "    f.write(b'half'); f.flush(); os.kill(os.getpid(), 9)" % TOOLS)
        self.write("a")
        run = subprocess.run([sys.executable, "-c", code, self.path("a")], check=False)
        self.assertEqual(run.returncode, -9)
        self.assertEqual(self.read("a"), b"older")

    def test_input_is_output(self):
        """Under its own name, another spelling, a link, a hard link; for each kind of input."""
        source = self.path("m")
        shutil.copytree(STORIES, source)
        before = {name: self.read("m/" + name) for name in os.listdir(source)}
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            path = os.path.join(source, name)
            os.symlink(path, self.path("soft"))
            os.link(path, self.path("hard"))
            for out in (path, os.path.join(source, "..", "m", ".", name), self.path("soft"),
                        self.path("hard")):
                status, err = self.run_main(source, out, "-q")
                self.assertEqual((status, err.count("\n")), (1, 1))
                self.assertIn("found the input", err)
            os.remove(self.path("soft"))
            os.remove(self.path("hard"))
        self.assertEqual({name: self.read("m/" + name) for name in os.listdir(source)}, before)
        self.assertEqual(self.run_main(source, self.path("out"), "-q"), (0, ""))
        self.assertEqual(self.run_main(source, self.path("out"), "-q"), (0, ""))    # again


# ---- The command line ----

KINDS = ("pipe", "folder", "device", "missing", "empty", "nowhere")


class CommandLine(Case):
    def each_kind(self):
        """(kind, path) of each thing that is no file; it goes again."""
        for kind in KINDS:
            self.make(kind, self.path(kind))
            yield kind, self.path(kind)

    def test_models(self):
        for kind, path in self.each_kind():
            for args in (("info", path), ("run", path, "-p", "x"), ("verify", path),
                         ("quantize", path, self.path("out")), ("bench", path)):
                with self.subTest(args=args):
                    self.assertIn(path, self.run_cli(*args, status=1)[1])
        self.assertFalse(os.path.exists(self.path("out")))

    def test_names_are_shown_once(self):
        for name, shown in (("x", "x"), ("a\nb", "a\\x0Ab")):
            path = self.path(name, "none")
            for args in (("info", path), ("run", MODEL, "-p", "x", "--session", path)):
                err = self.run_cli(*args, status=1)[1]
                self.assertEqual(err.count(shown + "/none"), 1, err)

    def test_texts(self):
        """A pipe without a writer is empty, and no wait."""
        for kind, path in self.each_kind():
            for args in (("run", "-f"), ("run", "--ids-file"), ("perplexity", "-f"),
                         ("logits", "--ids-file")):
                with self.subTest(args=args, kind=kind):
                    self.run_cli(args[0], MODEL, args[1], path, "-q" if args[0] == "run" else "-v",
                                 status=1)
            for command in ("tokenize", "detokenize"):
                with self.subTest(command, kind=kind):
                    fails = kind not in ("pipe", "empty")
                    self.run_cli(command, MODEL, "-f", path, status=int(fails))

    def test_pipes(self):
        """A text may come through a pipe: stdin, one of the shell's, one with a name."""
        text = b"Once upon a time"
        want = self.run_cli("tokenize", MODEL, text.decode())[0]
        self.assertEqual(self.run_cli("tokenize", MODEL, "-f", "-", input=text)[0], want)
        read, write = os.pipe()
        os.write(write, text)
        os.close(write)
        got = self.run_cli("tokenize", MODEL, "-f", "/dev/fd/%d" % read, pass_fds=[read])[0]
        os.close(read)
        self.assertEqual(got, want)
        name = self.path("named")
        os.mkfifo(name)
        with open(name, "r+b", buffering=0) as pipe:
            run = subprocess.Popen(COMMAND + ["tokenize", MODEL, "-f", name],
                                   stdout=subprocess.PIPE)
            fds = "/proc/%d/fd" % run.pid
            while not any(os.path.realpath(os.path.join(fds, fd)) == os.path.realpath(name)
                          for fd in os.listdir(fds)):
                time.sleep(0.01)         # what no one reads is gone when the pipe is closed
            pipe.write(text)
        self.assertEqual(run.communicate(timeout=PATIENCE)[0].decode(), want)

    def test_session_files(self):
        """What cannot be a session's file is refused before anything is written."""
        run = ("run", MODEL, "-p", "Once", "-n", "3", "--greedy", "-q", "--session")
        for kind, path in self.each_kind():
            if kind == "missing":
                continue
            if kind == "nowhere":
                self.run_cli(*run, path)
                self.assertTrue(os.path.islink(path))
                self.assertTrue(os.path.isfile(self.path("nothing")))
                continue
            self.assertEqual(self.run_cli(*run, path, status=1)[0], "")
        out, err = self.run_cli(*run, self.path("none", "s"), status=1)
        self.assertEqual(out, "")
        self.assertIn(os.strerror(errno.ENOENT), err)
        path = self.path("s")
        self.run_cli(*run, path)
        os.chmod(path, 0o600)
        before = self.read("s")
        self.run_cli(*run, path, "--append")
        self.assertNotEqual(self.read("s"), before)
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        self.assertEqual([n for n in os.listdir(self.dir) if n.endswith(".part")], [])

    def test_one_file(self):
        """q3n quantize A A, and A under other names."""
        shutil.copy(MODEL, self.path("a"))
        before = self.read("a")
        os.symlink("a", self.path("soft"))
        os.link(self.path("a"), self.path("hard"))
        for name in ("a", "soft", "hard", "./a"):
            err = self.run_cli("quantize", self.path("a"), self.dir + "/" + name, status=1)[1]
            self.assertIn("give another name", err)
        self.assertEqual(self.read("a"), before)
        self.assertEqual(len(os.listdir(self.dir)), 3)

    def test_summary(self):
        """It is told of what was written, which need not be readable."""
        def nobody():
            os.umask(0o777)
            if os.geteuid() == 0:
                os.setuid(NOBODY)
        os.chmod(self.dir, 0o777)
        path = self.path("m")
        for args in (("quantize", MODEL, path),
                     ("init", path, "--preset", "tiny", "--layers", "1")):
            out = self.run_cli(*args)[0].splitlines()
            os.remove(path)
            told = self.run_cli(*args, preexec_fn=nobody)[0].splitlines()
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0)
            self.assertEqual(told[0].split(",")[0], out[0].split(",")[0])
            self.assertEqual(told[1:], out[1:])
            os.remove(path)

    def test_full_disk(self):
        """An error with the system's reason, though the limit would send a signal."""
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (100000, resource.RLIM_INFINITY))
        self.write("m")
        before = self.listing()
        for args in (("quantize", MODEL, self.path("m")),
                     ("init", self.path("m"), "--preset", "tiny", "--layers", "1")):
            err = self.run_cli(*args, status=1, preexec_fn=limit)[1]
            self.assertIn(os.strerror(errno.EFBIG), err)
            self.assertEqual(self.listing(), before)


if __name__ == "__main__":
    unittest.main()
