#!/usr/bin/env python3
"""The converter: every golden checkpoint through it and back, and every way it can fail.

run: python3 tests/test_convert.py
"""
import contextlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import zipfile
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))
TOOLS = os.path.join(HERE, os.pardir, "tools")
GOLDEN = os.path.join(HERE, "golden")
STORIES = os.path.join(HERE, os.pardir, "examples", "stories")
CONVERT = os.path.join(TOOLS, "convert.py")
sys.path.insert(0, TOOLS)

import h5py
import numpy as np

import convert
import files
import hf_config
import hf_names
import keras_checkpoint
import lora
import matrix
import model_plan
import q3n_file
import q3n_numpy
import quantize
import safetensors_file
import synthetic
import tokenizer_file

SAFETENSORS = ("qwen3_next", "qwen3_next_mtp", "qwen3_next_mixed", "qwen3_next_cls",
               "qwen3_next_fp8", "qwen3_moe", "qwen3_moe_nonorm", "qwen3_dense",
               "qwen3_dense_yarn", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_vl")
KERAS = ("qwen3_head_all_moe", "seed_patched_real_rope", "seed_patched_zero_rope")


def golden(name):
    return os.path.join(GOLDEN, name)


def load_json(*path):
    with open(os.path.join(*path), encoding="utf-8") as f:
        return json.load(f)


def source_tensors(folder):
    """All tensors of a safetensors folder as f32, parsed here and not by the converter; FP8 as
    raw bytes."""
    out = {}
    for name in sorted(os.listdir(folder)):
        if not name.endswith(".safetensors"):
            continue
        with open(os.path.join(folder, name), "rb") as f:
            data = f.read()
        (n,) = struct.unpack("<Q", data[:8])
        for key, v in json.loads(data[8:8 + n].decode()).items():
            if key == "__metadata__":
                continue
            begin, end = v["data_offsets"]
            raw = data[8 + n + begin:8 + n + end]
            if v["dtype"] == "BF16":
                x = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
            else:
                x = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2", "F8_E4M3": "u1"}[v["dtype"]])
            out[key] = x.reshape(v["shape"])
    return out


class Case(unittest.TestCase):
    """A folder for each test, and the converter called as the command line calls it."""

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="q3n_")
        self.addCleanup(shutil.rmtree, self.dir)

    def path(self, *names):
        return os.path.join(self.dir, *names)

    def run_main(self, *args):
        """(exit status, stdout, stderr)."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = convert.main([str(a) for a in args])
            except SystemExit as e:
                status = e.code
        return status, out.getvalue(), err.getvalue()

    def convert(self, source, *args):
        """Convert, check the file's own consistency, and hand it back open."""
        out = self.path("out.q3n")
        status, _, err = self.run_main(source, out, *args)
        self.assertEqual(status, 0, err)
        self.messages = err
        f = q3n_file.File(out)
        self.addCleanup(f.file.close)
        self.assertEqual(f.verify(), [])
        return f

    def fails(self, expected, *args):
        """One line on stderr that holds every expected text; status 1; no file is written."""
        before = self.outputs()
        status, _, err = self.run_main(*args)
        self.assertEqual(status, 1, err)
        lines = [line for line in err.splitlines() if "error:" in line]
        self.assertEqual(len(lines), 1, err)
        for text in (expected,) if isinstance(expected, str) else expected:
            self.assertIn(text, lines[0])
        self.assertTrue(lines[0].startswith("convert.py: error: "), lines[0])
        self.assertNotIn("Traceback", err)
        self.assertEqual(self.outputs(), before)

    def outputs(self):
        """The files beside the checkpoints, with their times."""
        return {e.name: e.stat().st_mtime_ns for e in os.scandir(self.dir) if e.is_file()}

    def checkpoint(self, name="model", config=None, tensors=None, patch=None):
        config = config or synthetic.qwen3_config()
        tensors = synthetic.qwen3_tensors(config) if tensors is None else tensors
        return synthetic.write_checkpoint(self.path(name), config, tensors, patch)


# ---- Goldens ----

class Goldens(Case):
    def check(self, got, want):
        got, want = np.asarray(got), np.asarray(want)
        self.assertEqual(got.shape, want.shape)
        self.assertLess(np.abs(got - want).max(), 1e-5 * np.abs(want).max())

    def test_safetensors(self):
        for name in SAFETENSORS:
            with self.subTest(name):
                model = q3n_numpy.Model(self.convert(golden(name), "--type", "f32"))
                want = load_json(golden(name), "golden.json")
                for case in want["cases"]:
                    ids = np.array(case["input_ids"])
                    if "class_logits" in case:
                        self.check(model.classify(ids), case["class_logits"])
                    else:
                        self.check(model.logits(ids)[-1], case["last_logits"])
                if "mtp" in want:
                    drafts = model.drafts(np.array(want["mtp"]["input_ids"]))
                    self.assertEqual(list(drafts.argmax(1)), want["mtp"]["draft_argmax"])
                    self.check(drafts[-1], want["mtp"]["last_draft_logits"])

    def test_types(self):
        """f32 and bf16 hold bf16 weights exactly; f16 to its precision."""
        ids = np.array(load_json(golden("qwen3_next"), "golden.json")["cases"][1]["input_ids"])
        exact = q3n_numpy.Model(self.convert(golden("qwen3_next"), "--type", "f32")).logits(ids)
        for name, bound in ((None, 0), ("bf16", 0), ("f16", 1e-2)):
            f = self.convert(golden("qwen3_next"), *(["--type", name] if name else []))
            types = {t.type.name for t in f.tensors.values() if len(t.dims) > 1
                     and not t.name.endswith("conv1d.weight")}
            self.assertEqual(types, {name or "bf16"})
            error = np.abs(q3n_numpy.Model(f).logits(ids) - exact).max()
            self.assertLessEqual(error, bound * np.abs(exact).max())

    def test_fp8_default_is_bf16(self):
        f = self.convert(golden("qwen3_next_fp8"))
        self.assertIn("--type f32 keeps every bit", self.messages)
        self.assertEqual(f.tensors["layers.0.linear_attn.in_proj_qkvz.weight"].type.name, "bf16")
        self.convert(golden("qwen3_next_fp8"), "--type", "f32")
        self.assertNotIn("keeps every bit", self.messages)

    def test_keras(self):
        for name in KERAS:
            with self.subTest(name):
                f = self.convert(golden(os.path.join("keras", name + ".keras")))
                model = q3n_numpy.Model(f)
                cases = load_json(GOLDEN, "keras", name + ".json")
                case = next(v for k, v in cases.items() if k.startswith("nomask"))
                for ids, want in zip(case["input_ids"], case["output"]):
                    self.check(model.logits(np.array(ids)), want)
                self.assertEqual(f.config["rope_type"],
                                 "table" if "zero_rope" in name else "default")
                self.assertEqual("rope.cos" in f.tensors, "zero_rope" in name)
                self.assertEqual("all zero" in self.messages, "zero_rope" in name)
                self.assertIn("used in training only", self.messages)

    def test_stories(self):
        f = self.convert(STORIES)
        self.assertEqual(f.config["eos_ids"], [4093])
        self.assertEqual(f.tokenizer.tokens[4093], b"<|endoftext|>")
        self.assertEqual(len(f.tokenizer.tokens), 4096)
        case = load_json(STORIES, "golden.json")["greedy"][0]
        prompt = next(v for k, v in case.items() if "prompt" in k and isinstance(v, list))
        output = next(v for k, v in case.items() if "output" in k and isinstance(v, list))
        model = q3n_numpy.Model(f)
        ids = np.array(prompt + output[:24])
        got = model.logits(ids)[len(prompt) - 1:-1].argmax(1)
        self.assertEqual(list(got), output[:24])


# ---- Quantised types ----

class Quantised(Case):
    ERRORS = {"q8": 0.0075, "q6": 0.025, "q4": 0.09, "q3": 0.18}

    @staticmethod
    def quantize(source, out, *args):
        """The command line does it."""
        command = shlex.split(os.environ.get("Q3N", os.path.join(HERE, os.pardir, "build", "q3n")))
        subprocess.run(command + ["quantize", source, out] + list(args), check=True,
                       stdout=subprocess.DEVNULL)
        return q3n_file.File(out)

    def data(self, f, routers=True):
        self.addCleanup(f.file.close)
        return {name: f.data(name) for name in f.tensors
                if routers or not name.endswith(quantize.ROUTERS)}

    def test_as_the_library(self):
        """One step from the checkpoint: the bytes of q3n quantize; from f32 too, but for routers,
        which keep the type they come in."""
        for name in ("qwen3_next_mtp", "qwen3_5_moe", "qwen3_dense", "qwen3_next_fp8"):
            sources = {}
            for kind in ("bf16", "f32"):
                sources[kind] = self.path(kind)
                self.assertEqual(self.run_main(golden(name), sources[kind], "--type", kind)[0], 0)
            for recipe in ("q8", "q6", "q4", "q4m", "q4l", "q3"):
                with self.subTest(name, recipe=recipe):
                    f = self.convert(golden(name), "--type", recipe)
                    wide = self.quantize(sources["f32"], self.path("q"), "--type", recipe)
                    self.assertEqual(self.data(f, False), self.data(wide, False))
                    self.assertEqual(wide.verify(), [])
                    self.assertEqual(wide.config, f.config)
                    if name != "qwen3_next_fp8":          # which bf16 would round
                        self.quantize(sources["bf16"], self.path("q"), "--type",
                                      recipe).file.close()
                        with open(f.path, "rb") as a, open(self.path("q"), "rb") as b:
                            self.assertEqual(a.read(), b.read())

    def test_weights(self):
        """Read back by other code: close to the originals, tensor by tensor."""
        exact = self.convert(golden("qwen3_5_moe"), "--type", "f32")
        want = {name: q3n_numpy.array(exact, name) for name in exact.tensors}
        for recipe, bound in self.ERRORS.items():
            f, seen = self.convert(golden("qwen3_5_moe"), "--type", recipe), set()
            for name, t in f.tensors.items():
                seen.add(t.type.name)
                got, x = q3n_numpy.array(f, name), want[name]
                error = np.sqrt(((got - x) ** 2).sum() / (x ** 2).sum())
                self.assertLess(error, self.ERRORS.get(t.type.name, 0.003), (recipe, name, bound))
            self.assertIn(recipe, seen)

    def test_logits(self):
        ids = np.array(load_json(golden("qwen3_next"), "golden.json")["cases"][1]["input_ids"])
        exact = q3n_numpy.Model(self.convert(golden("qwen3_next"), "--type", "f32")).logits(ids)
        for recipe, bound in (("q8", 0.03), ("q6", 0.13), ("q4", 0.3)):
            got = q3n_numpy.Model(self.convert(golden("qwen3_next"), "--type", recipe)).logits(ids)
            self.assertLess(np.sqrt(((got - exact) ** 2).sum() / (exact ** 2).sum()), bound, recipe)

    def test_errors(self):
        saved = os.environ.get("QWEN3NEXT_LIB")
        try:
            for value in (self.path("none.so"), os.path.join(GOLDEN, "qwen3_next", "config.json")):
                os.environ["QWEN3NEXT_LIB"] = value
                status, _, err = self.run_main(golden("qwen3_next"), self.path("x"), "--type", "q4")
                self.assertEqual(status, 1)
                self.assertIn("run `make`", err)
                self.assertEqual(os.listdir(self.dir), [])
        finally:
            os.environ.pop("QWEN3NEXT_LIB")
            if saved is not None:
                os.environ["QWEN3NEXT_LIB"] = saved
        x = np.ones((40, 33), "<f4")
        x[35, 32] = np.nan
        with self.assertRaises(ValueError) as e:
            definitions = q3n_file.Definitions()
            quantize.Encoder(definitions.abi).encode(definitions.types["q4"], x.tobytes(), 40, 33)
        row, text = e.exception.args
        self.assertIn("row %d, column 32: nan" % (35 - row), text)
        other = definitions.abi + 1
        with self.assertRaisesRegex(q3n_file.ConvertError, "expected the header's %d:" % other):
            quantize.Encoder(other)


# ---- The file ----

class Layout(Case):
    def test_bytes(self):
        """Every number of the header by hand, gaps zero, experts page-aligned and interleaved."""
        f = self.convert(golden("qwen3_next"))
        with open(f.path, "rb") as raw:
            data = raw.read()
        self.assertEqual(data[:8], b"\x89Q3N\r\n\x1a\n")
        version, n, file_bytes, meta_bytes, crc = struct.unpack("<IIQQI", data[8:36])
        self.assertEqual((version, n, file_bytes), (1, 3, len(data)))
        self.assertEqual(data[36:64], bytes(28))
        self.assertEqual(zlib.crc32(data[:32] + bytes(4) + data[36:meta_bytes]), crc)
        used = [(0, meta_bytes)]
        for t in f.tensors.values():
            self.assertEqual(t.offset % 64, 0)
            self.assertEqual(t.stride % 4096, 0)
            self.assertEqual(t.stride > 0, len(t.dims) == 3)
            used += [(t.slice_offset(e), t.slice_offset(e) + t.slice_bytes)
                     for e in range(t.n_slices)]
        used.sort()
        for (_, end), (begin, _) in zip(used, used[1:] + [(len(data), 0)]):
            self.assertLessEqual(end, begin)
            self.assertEqual(data[end:begin].count(0), begin - end)
        gate, up, down = (f.tensors["layers.0.mlp.experts.%s_proj.weight" % part]
                          for part in ("gate", "up", "down"))
        self.assertEqual(gate.offset % 4096, 0)
        self.assertTrue(gate.offset < up.offset < down.offset < gate.offset + gate.stride)
        self.assertEqual(len({gate.stride, up.stride, down.stride}), 1)

    def test_config_entries(self):
        """Keys and values as bytes: what stands in the manual."""
        d = q3n_file.Definitions()
        packed = q3n_file.pack_config({"num_labels": 3, "rope_theta": 2.0, "chat": "none",
                                       "eos_ids": [5, 6]}, d)
        self.assertEqual(packed, b"".join((
            b"\x0a\x01\0\0\x08\0\0\0num_labels\x03" + bytes(7) + bytes(6),
            b"\x0a\x02\0\0\x08\0\0\0rope_theta" + struct.pack("<d", 2.0) + bytes(6),
            b"\x04\x03\0\0\x04\0\0\0chatnone",
            b"\x07\x01\0\0\x10\0\0\0eos_ids" + struct.pack("<qq", 5, 6) + bytes(1))))

    def test_tensor_record(self):
        d = q3n_file.Definitions()
        t = q3n_file.Tensor("ab", d.types["bf16"], (3, 4, 5))
        t.offset, t.stride, t.crc = 8192, 4096, 0x01020304
        records, names = q3n_file.pack_tensors([t])
        self.assertEqual(names, b"ab")
        self.assertEqual(records, struct.pack(
            "<II" "IIII" "QQQ" "QQQ" "I12x", 1, 80, 0, 2, 2, 3, 3, 4, 5, 8192, 40, 4096,
            0x01020304))

    def test_definitions(self):
        """Types and fields come from the header; what it lacks is refused."""
        d = q3n_file.Definitions()
        self.assertEqual({n: t.number for n, t in d.types.items()
                          if n in ("f32", "f16", "bf16")}, {"f32": 0, "f16": 1, "bf16": 2})
        self.assertEqual(d.words["rope_type"], ["default", "linear", "yarn", "table"])
        self.assertEqual(d.words["classifier_input"], ["hidden", "logits"])
        config = self.convert(golden("qwen3_dense")).config
        for key, value, expected in (("no_such_field", 1, "no field no_such_field"),
                                     ("num_hidden_layers", 257, "expected 1 .. 256"),
                                     ("pooling", "middle", "expected one of last")):
            with self.assertRaisesRegex(q3n_file.ConvertError, expected):
                d.check_config(dict(config, **{key: value}))
        with self.assertRaisesRegex(q3n_file.ConvertError, "no value for family"):
            d.check_config({k: v for k, v in config.items() if k != "family"})

    def test_reader_notices_damage(self):
        f = self.convert(golden("qwen3_dense"))
        with open(f.path, "rb") as raw:
            data = bytearray(raw.read())
        t = f.tensors["layers.0.mlp.up_proj.weight"]
        data[t.offset + 7] ^= 1
        self.write("bad.q3n", data)
        with q3n_file.File(self.path("bad.q3n")) as bad:
            self.assertEqual(bad.verify(), [t.name])
        data[70] ^= 1
        self.write("bad.q3n", data)
        with self.assertRaisesRegex(q3n_file.ConvertError, "meta_crc"):
            q3n_file.File(self.path("bad.q3n"))

    def write(self, name, data):
        with open(self.path(name), "wb") as f:
            f.write(data)

    def small_file(self):
        """Metadata with one of everything, and the bytes of the file."""
        definitions = q3n_file.Definitions()
        matrix_, q4 = definitions.types["bf16"], definitions.types["q4"]
        groups = [[q3n_file.Tensor("norm", definitions.types["f32"], (8,))],
                  [q3n_file.Tensor("a.weight", matrix_, (4, 8))],
                  [q3n_file.Tensor("e.%d" % i, q4, (2, 16, 32)) for i in range(3)]]
        tensors = [t for group in groups for t in group]
        config = {"vocab_size": 300, "rms_norm_eps": 1e-6, "name": "n", "layer_types": [0, 1],
                  "labels": ["x", "y"]}
        tokenizer = q3n_file.pack_tokenizer(q3n_file.Tokenizer(
            [bytes([b]) for b in range(256)] + [b"ab"], [(97, 98, 256)], [(256, 1)]))

        def meta(file_bytes):
            return q3n_file.pack_meta(config, tensors, tokenizer, file_bytes, definitions)

        file_bytes = q3n_file.place(groups, len(meta(0)))
        return bytearray(meta(file_bytes)), file_bytes

    def opens(self, meta, file_bytes):
        """Whether a file with these metadata, their checksum made right, is read; else why not."""
        meta[32:36] = bytes(4)
        meta[32:36] = struct.pack("<I", zlib.crc32(meta[36:], zlib.crc32(meta[:36])))
        self.write("h.q3n", meta + bytes(file_bytes - len(meta)))
        try:
            with q3n_file.File(self.path("h.q3n"), self.definitions) as f:
                f.verify()
            return True
        except q3n_file.ConvertError as e:
            return str(e)

    def test_reader_of_hostile_metadata(self):
        """Whatever bytes stand there under a checksum that is right: read, or one error."""
        self.definitions = q3n_file.Definitions()
        meta, file_bytes = self.small_file()
        self.assertIs(self.opens(meta, file_bytes), True)
        rng = random.Random(4)
        refused = 0
        for _ in range(1500):
            bad = meta[:]
            for _ in range(rng.choice((1, 1, 2, 4))):
                at = rng.randrange(36, len(bad))
                bad[at:at + 1] = rng.choice((b"\0", b"\xff", b"\x01", bytes([rng.randrange(256)])))
            refused += self.opens(bad, file_bytes) is not True
        self.assertGreater(refused, 500)
        records = struct.unpack_from("<Q", meta, 64 + 32 + 8)[0] + 8
        for at, value, expected in (
                (records + 12, struct.pack("<I", 0), "norm: dims"),
                (records + 80 + 16, struct.pack("<Q", 0), "a.weight: dims"),
                (records + 160 + 56, struct.pack("<Q", 0), "e.0: stride"),
                (64 + 32, struct.pack("<II", 9, 0), "section 2: found none"),
                (64 + 3 * 32 + 16, struct.pack("<Q", 1 << 63), "section 4")):
            bad = meta[:]
            bad[at:at + len(value)] = value
            self.assertIn(expected, str(self.opens(bad, file_bytes)))

    def test_listing(self):
        f = self.convert(golden("qwen3_dense"))
        run = subprocess.run([sys.executable, os.path.join(TOOLS, "q3n_file.py"), "--verify",
                              f.path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual((run.returncode, run.stderr), (0, b""))
        self.assertIn(b"layers.2.self_attn.q_norm.weight", run.stdout)

    def test_names_that_stdout_cannot_encode(self):
        f = self.convert(golden("qwen3_dense"), "--name", "caf\u00e9")
        for command in (["q3n_file.py", f.path], ["convert.py", golden("qwen3_dense"), f.path,
                                                  "--dry-run", "--name", "caf\u00e9"]):
            run = subprocess.run([sys.executable, os.path.join(TOOLS, command[0])] + command[1:],
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False,
                                 env=dict(os.environ, PYTHONIOENCODING="ascii", PYTHONUTF8="0"))
            self.assertEqual(run.returncode, 0, run.stderr)
            self.assertIn(b"caf\\xe9", run.stdout)


# ---- Values ----

class Values(Case):
    def assert_tensor(self, f, name, want):
        want = np.ascontiguousarray(want, "<f4")
        self.assertEqual(f.tensors[name].dims, want.shape)
        self.assertEqual(f.data(name), want.tobytes(), name)

    def test_hybrid(self):
        """Norms 1 + w in f32, qkvz and ba ungrouped, conv1d transposed, experts by expert."""
        f, s = self.convert(golden("qwen3_next"), "--type", "f32"), \
            source_tensors(golden("qwen3_next"))
        c = f.config
        Hk, Hv, dk, dv = (c["linear_" + k] for k in ("num_key_heads", "num_value_heads",
                                                     "key_head_dim", "value_head_dim"))
        r, p = Hv // Hk, "model.layers.0."
        one = np.float32(1)
        self.assert_tensor(f, "norm.weight", s["model.norm.weight"] + one)
        self.assert_tensor(f, "layers.0.input_layernorm.weight",
                           s[p + "input_layernorm.weight"] + one)
        self.assert_tensor(f, "layers.3.self_attn.q_norm.weight",
                           s["model.layers.3.self_attn.q_norm.weight"] + one)
        self.assert_tensor(f, "layers.0.linear_attn.norm.weight", s[p + "linear_attn.norm.weight"])
        grouped = s[p + "linear_attn.in_proj_qkvz.weight"].reshape(Hk, 2 * dk + 2 * r * dv, -1)
        parts = np.split(grouped, [dk, 2 * dk, 2 * dk + r * dv], 1)
        self.assert_tensor(f, "layers.0.linear_attn.in_proj_qkvz.weight",
                           np.concatenate([a.reshape(-1, c["hidden_size"]) for a in parts]))
        grouped = s[p + "linear_attn.in_proj_ba.weight"].reshape(Hk, 2, r, -1)
        self.assert_tensor(f, "layers.0.linear_attn.in_proj_ba.weight",
                           grouped.transpose(1, 0, 2, 3).reshape(2 * Hv, -1))
        self.assert_tensor(f, "layers.0.linear_attn.conv1d.weight",
                           s[p + "linear_attn.conv1d.weight"][:, 0].T)
        for part in ("gate", "up", "down"):
            self.assert_tensor(f, "layers.1.mlp.experts.%s_proj.weight" % part, np.stack(
                [s["model.layers.1.mlp.experts.%d.%s_proj.weight" % (e, part)] for e in range(8)]))

    def test_separate_and_fused(self):
        f, s = self.convert(golden("qwen3_5_moe_vl"), "--type", "f32"), \
            source_tensors(golden("qwen3_5_moe_vl"))
        p, I = "model.language_model.layers.0.", f.config["moe_intermediate_size"]
        a = p + "linear_attn.in_proj_"
        self.assert_tensor(f, "layers.0.linear_attn.in_proj_qkvz.weight",
                           np.concatenate([s[a + "qkv.weight"], s[a + "z.weight"]]))
        self.assert_tensor(f, "layers.0.linear_attn.in_proj_ba.weight",
                           np.concatenate([s[a + "b.weight"], s[a + "a.weight"]]))
        both = s[p + "mlp.experts.gate_up_proj"]
        self.assert_tensor(f, "layers.0.mlp.experts.gate_proj.weight", both[:, :I])
        self.assert_tensor(f, "layers.0.mlp.experts.up_proj.weight", both[:, I:])
        self.assert_tensor(f, "layers.0.mlp.experts.down_proj.weight",
                           s[p + "mlp.experts.down_proj"])
        self.assertIn("skipped 2 tensors (vision)", self.messages)
        self.assertEqual(f.config["family"], "qwen3_5_moe")

    def test_fp8(self):
        """Blocks of 128 x 128 with partial ones at the edges, by another way of decoding."""
        f, s = self.convert(golden("qwen3_next_fp8"), "--type", "f32"), \
            source_tensors(golden("qwen3_next_fp8"))
        name = "model.layers.3.self_attn.q_proj.weight"          # [256, 192]
        raw, scale = s[name], s[name + "_scale_inv"]
        want = np.empty(raw.shape, np.float32)
        for (i, j), byte in np.ndenumerate(raw):
            sign, e, m = int(byte) >> 7, int(byte) >> 3 & 15, int(byte) & 7
            value = m / 8 * 2.0 ** -6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
            want[i, j] = np.float32(-value if sign else value) * scale[i // 128, j // 128]
        self.assert_tensor(f, "layers.3.self_attn.q_proj.weight", want)

    def test_fp8_numbers(self):
        self.assertEqual([matrix.e4m3(b) for b in (0x00, 0x01, 0x08, 0x38, 0x7E, 0xB8)],
                         [0.0, 2.0 ** -9, 2.0 ** -6, 1.0, 448.0, -1.0])
        self.assertNotEqual(matrix.e4m3(0x7F), matrix.e4m3(0x7F))

    def test_keras_transposes(self):
        path = golden(os.path.join("keras", "seed_patched_real_rope.keras"))
        f = self.convert(path)
        with h5py.File(io.BytesIO(zipfile.ZipFile(path).read("model.weights.h5")), "r") as h:
            p = "layers/transformer_layer_1/"
            a, H, D = p + "attention/", 4, 4
            order = [h_ * D + j for h_ in range(H) for j in (0, 2, 1, 3)]
            self.assert_tensor(f, "lm_head.weight", h["layers/dense/vars/0"][:].T)
            self.assert_tensor(f, "layers.1.self_attn.q_proj.weight",
                               h[a + "w_q/vars/0"][:].T[order])
            self.assert_tensor(f, "layers.1.self_attn.q_proj.bias", h[a + "w_q/vars/1"][:][order])
            self.assert_tensor(f, "layers.1.self_attn.v_proj.weight", h[a + "w_v/vars/0"][:].T)
            e = p + "ffn_layer/experts/ffn_expert_2/ffn_block/down_proj/vars/"
            got = np.frombuffer(f.data("layers.1.mlp.experts.down_proj.weight"), "<f4")
            np.testing.assert_array_equal(got.reshape(4, 16, 256)[2], h[e + "0"][:].T)
            got = np.frombuffer(f.data("layers.1.mlp.experts.down_proj.bias"), "<f4")
            np.testing.assert_array_equal(got.reshape(4, 16)[2], h[e + "1"][:])

    def test_small_blocks(self):
        """Files do not depend on how many rows are in memory at once."""
        for name in ("qwen3_next_fp8", "qwen3_5_moe", os.path.join("keras", KERAS[1] + ".keras")):
            with self.subTest(name):
                with open(self.convert(golden(name)).path, "rb") as f:
                    want = f.read()
                sizes = convert.BLOCK_BYTES, keras_checkpoint.WHOLE_BYTES
                convert.BLOCK_BYTES, keras_checkpoint.WHOLE_BYTES = 1000, 0
                try:
                    with open(self.convert(golden(name)).path, "rb") as f:
                        self.assertEqual(f.read(), want)
                finally:
                    convert.BLOCK_BYTES, keras_checkpoint.WHOLE_BYTES = sizes

    def test_one_plus(self):
        rng = np.random.default_rng(1)
        w = np.concatenate([rng.normal(0, s, 500) for s in (1e-9, 1e-7, 1e-3, 1, 1e5, 1e17)])
        edge = [2.0 ** -24, -2.0 ** -25, 2.0 ** -24 * (1 + 2 ** -23), -1 + 2.0 ** -24,
                2.0 ** 24 + 2, -0.0, 2.0 ** -149, 3e38, 2.0 ** 53, -2.0 ** -24]
        w = np.concatenate([w, edge]).astype("<f4")
        m = matrix.Bytes(1, len(w), "f32", "w", w.tobytes())
        self.assertEqual(model_plan.one_plus(m).data, (np.float32(1) + w).astype("<f4").tobytes())


class Conversion(Case):
    """Rounding between the float types, with numpy and without, against exact arithmetic."""

    def setUp(self):
        Case.setUp(self)
        rng = np.random.default_rng(2)
        self.bits = rng.integers(0, 2 ** 32, 60000, dtype=np.uint32)
        self.bits[:9] = (0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x3F808000, 0x3F818000,
                         0x7F7FFFFF, 0x80000001, 0)
        self.plain = rng.normal(0, 3, 60000).astype("<f4")
        self.plain[:8] = (65504, 65519, -65519, 2.0 ** -24, 2.0 ** -25, 1 + 2.0 ** -11,
                          1 + 3 * 2.0 ** -11, 1e-9)

    def both(self, data, source, target):
        with_numpy = bytes(matrix.convert(data, source, target))
        saved, matrix.numpy = matrix.numpy, None
        try:
            self.assertEqual(bytes(matrix.convert(data, source, target)), with_numpy)
        finally:
            matrix.numpy = saved
        return with_numpy

    def test_bf16(self):
        got = np.frombuffer(self.both(self.bits.tobytes(), "f32", "bf16"), "<u2").astype(int)
        x = self.bits.astype(object)
        for u, g in zip(x, got):
            low, high = u & 0xFFFF, u >> 16
            if u & 0x7FFFFFFF > 0x7F800000:
                self.assertTrue(g & 0x7FFF > 0x7F80)
            else:
                up = low > 0x8000 or (low == 0x8000 and high & 1)
                self.assertEqual(g, high + up)
        wide = np.frombuffer(self.both(got.astype("<u2").tobytes(), "bf16", "f32"), "<u4")
        np.testing.assert_array_equal(wide, got << 16)

    def test_f16(self):
        half = self.both(self.plain.tobytes(), "f32", "f16")
        np.testing.assert_array_equal(np.frombuffer(half, "<f2"), self.plain.astype("<f2"))
        np.testing.assert_array_equal(np.frombuffer(self.both(half, "f16", "f32"), "<f4"),
                                      self.plain.astype("<f2").astype("<f4"))
        self.both(half, "f16", "bf16")

    def test_f16_overflow(self):
        config = synthetic.qwen3_config()
        tensors = synthetic.qwen3_tensors(config)
        big = np.zeros((48, 32), "<f4")
        big[3, 4] = 7e4
        tensors["model.layers.0.mlp.up_proj.weight"] = ("F32", big.shape, big.tobytes())
        folder = self.checkpoint("model", config, tensors)
        expected = ("up_proj.weight", "70000", "--type bf16 or f32")
        self.fails(expected, folder, self.path("out.q3n"), "--type", "f16")
        saved, matrix.numpy = matrix.numpy, None
        try:
            self.fails(expected, folder, self.path("out.q3n"), "--type", "f16")
        finally:
            matrix.numpy = saved

    def test_mixed_types(self):
        """Each matrix keeps its type; parts of one that differ become f32."""
        f = golden("qwen3_5")
        shutil.copytree(f, self.path("model"))
        s = source_tensors(f)
        tensors = {}
        for name, x in s.items():
            if name.endswith("in_proj_z.weight"):
                tensors[name] = ("F32", x.shape, x.tobytes())
            elif name.endswith("out_proj.weight"):
                tensors[name] = ("F16", x.shape, x.astype("<f2").tobytes())
            else:
                tensors[name] = ("BF16", x.shape, bytes(matrix.convert(x.tobytes(), "f32", "bf16")))
        synthetic.write_safetensors(self.path("model", "model.safetensors"), tensors)
        f = self.convert(self.path("model"))
        types = {n: f.tensors["layers.0.linear_attn.%s.weight" % n].type.name
                 for n in ("in_proj_qkvz", "in_proj_ba", "out_proj")}
        self.assertEqual(types, {"in_proj_qkvz": "f32", "in_proj_ba": "bf16", "out_proj": "f16"})
        qkvz = np.frombuffer(f.data("layers.0.linear_attn.in_proj_qkvz.weight"), "<f4")
        p = "model.layers.0.linear_attn.in_proj_"
        np.testing.assert_array_equal(qkvz.reshape(-1, 64), np.concatenate(
            [s[p + "qkv.weight"], s[p + "z.weight"]]))


# ---- Checkpoints as they come ----

class Checkpoints(Case):
    def data(self, f):
        return {name: f.data(name) for name in f.tensors}

    def test_single_file_and_shards(self):
        """An index, several files without one, one file, a path to a file: the same model."""
        want = self.data(self.convert(golden("qwen3_next")))
        source = golden("qwen3_next")
        self.assertEqual(self.data(self.convert(os.path.join(
            source, "model.safetensors.index.json"))), want)
        shutil.copytree(source, self.path("loose"))
        os.remove(self.path("loose", "model.safetensors.index.json"))
        self.assertEqual(self.data(self.convert(self.path("loose"))), want)
        shutil.copytree(golden("qwen3_dense"), self.path("one"))
        want = self.data(self.convert(golden("qwen3_dense")))
        os.rename(self.path("one", "model.safetensors"), self.path("one", "other.safetensors"))
        self.assertEqual(self.data(self.convert(self.path("one"))), want)
        self.assertEqual(self.data(self.convert(self.path("one", "other.safetensors"))), want)

    def test_not_in_the_index(self):
        """A tensor of a shard counts, as in transformers, though the index does not name it."""
        shutil.copytree(golden("qwen3_next"), self.path("m"))
        index = load_json(self.path("m"), "model.safetensors.index.json")
        del index["weight_map"]["model.norm.weight"]
        synthetic.write_json(self.path("m"), "model.safetensors.index.json", index)
        self.assertEqual(self.data(self.convert(self.path("m"))),
                         self.data(self.convert(golden("qwen3_next"))))

    def test_old_rope_fields(self):
        new = self.convert(golden("qwen3_dense_yarn")).config
        shutil.copytree(golden("qwen3_dense_yarn"), self.path("m"))
        config = load_json(self.path("m"), "config.json")
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        for key in ("type", "rope_type"):
            config["rope_scaling"] = dict(rope)
            config["rope_scaling"][key] = config["rope_scaling"].pop("rope_type")
            synthetic.write_json(self.path("m"), "config.json", config)
            old = self.convert(self.path("m")).config
            self.assertEqual(dict(old, name=""), dict(new, name=""))

    def rope(self, warnings=None, **changes):
        config = synthetic.qwen3_config(max_position_embeddings=1000, **changes)
        return hf_config.read(config, "config.json", [] if warnings is None else warnings)

    def test_rope_scaling(self):
        c = self.rope(rope_scaling={"type": "linear", "factor": 4})
        self.assertEqual((c["rope_type"], c["rope_factor"], c["max_position_embeddings"]),
                         ("linear", 4.0, 1000))
        yarn = {"rope_type": "yarn", "factor": 4.0}
        c = self.rope(rope_scaling=yarn)
        self.assertEqual((c["rope_original_max_position"], c["rope_attention_factor"],
                          c["max_position_embeddings"]), (1000, 0.0, 4000))
        c = self.rope(rope_scaling=dict(yarn, original_max_position_embeddings=500,
                                        beta_fast=16, beta_slow=2, attention_factor=1.5))
        self.assertEqual([c["rope_" + k] for k in ("original_max_position", "beta_fast",
                                                   "beta_slow", "attention_factor")],
                         [500, 16.0, 2.0, 1.5])
        self.assertEqual(c["max_position_embeddings"], 2000)
        c = self.rope(rope_scaling=dict(yarn, mscale=1.0, mscale_all_dim=0.5))
        self.assertAlmostEqual(c["rope_attention_factor"],
                               (0.1 * np.log(4) + 1) / (0.05 * np.log(4) + 1))

    def test_layer_patterns(self):
        base = load_json(golden("qwen3_next"), "config.json")
        base.update(num_hidden_layers=6, layer_types=None, full_attention_interval=3,
                    decoder_sparse_step=2, mlp_only_layers=[3])
        c = hf_config.read(base, "config.json", [])
        self.assertEqual(c["layer_types"], [1, 1, 0, 1, 1, 0])
        self.assertEqual(c["layer_experts"], [0, 1, 0, 0, 0, 1])
        c = hf_config.read(load_json(golden("qwen3_moe_nonorm"), "config.json"), "config.json", [])
        self.assertEqual((c["num_experts"], c["norm_topk_prob"], c["layer_experts"],
                          c["attention_bias"]), (6, 0, [0, 1, 0], 1))
        moe = load_json(golden("qwen3_moe"), "config.json")
        for value, expected in ((None, 0), (True, 1), (False, 0)):
            moe["norm_topk_prob"] = value
            self.assertEqual(hf_config.read(moe, "c", [])["norm_topk_prob"], expected)
        for family in ("qwen3_next", "qwen3_5_moe"):
            c = load_json(golden(family), "config.json")
            c.pop("norm_topk_prob", None)
            self.assertEqual(hf_config.read(c, "c", [])["norm_topk_prob"], 1)
        dense = synthetic.qwen3_config(num_key_value_heads=None)
        c = hf_config.read(dense, "config.json", [])
        self.assertEqual((c["head_dim"], c["num_key_value_heads"], c["rotary_dim"]), (16, 2, 16))

    def test_tied_head_in_the_file(self):
        """lm_head beside tied embeddings: passed over if equal, kept if it differs."""
        config = synthetic.qwen3_config(tie_word_embeddings=True)
        tensors = synthetic.qwen3_tensors(config)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        f = self.convert(self.checkpoint("model", config, tensors))
        self.assertEqual(f.config["tie_word_embeddings"], 1)
        self.assertNotIn("lm_head.weight", f.tensors)
        self.assertIn("skipped 1 tensor (tied to embed_tokens): lm_head.weight", self.messages)
        dtype, shape, data = tensors["lm_head.weight"]
        tensors["lm_head.weight"] = (dtype, shape, data[:-1] + b"\0")
        f = self.convert(self.checkpoint("model", config, tensors))
        self.assertEqual(f.config["tie_word_embeddings"], 0)
        self.assertEqual(f.data("lm_head.weight"), data[:-1] + b"\0")
        self.assertIn("differs from embed_tokens", self.messages)

    def test_names_of_other_wrappers(self):
        """Prefixes of multimodal and of bare models."""
        config = synthetic.qwen3_config(tie_word_embeddings=False)
        tensors = synthetic.qwen3_tensors(config)
        want = self.data(self.convert(self.checkpoint("model", config, tensors)))
        for change in (lambda n: n.replace("model.", "model.language_model."),
                       lambda n: "language_model." + n):
            renamed = {change(n): t for n, t in tensors.items()}
            renamed["visual.patch_embed.proj.weight"] = ("BF16", (2,), b"1234")
            f = self.convert(self.checkpoint("model", config, renamed))
            self.assertEqual(self.data(f), want)
            self.assertIn("skipped 1 tensor (vision)", self.messages)
        config = synthetic.qwen3_config()
        tensors = synthetic.qwen3_tensors(config)
        want = self.data(self.convert(self.checkpoint("model", config, tensors)))
        bare = {n[len("model."):]: t for n, t in tensors.items()}
        self.assertEqual(self.data(self.convert(self.checkpoint("model", config, bare))), want)
        tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"]
        self.convert(self.checkpoint("model", config, tensors))
        self.assertIn("passed over: model.language_model.norm.weight", self.messages)
        tensors["language_model.lm_head.weight"] = tensors["lm_head.weight"] = \
            tensors["model.embed_tokens.weight"]
        self.fails("found also as", self.checkpoint("model", config, tensors), self.path("o.q3n"))

    def test_long_names(self):
        """A million characters are read once, not once for each of their beginnings."""
        for name in ("mtp.fc." * 140000 + "\n", "layers.1" * 120000, "layers.0." * 120000 + "\n",
                     "a.lm_head.weight" * 60000 + ".", "_orig_mod." * 100000 + "x",
                     "x." * 500000 + "layers.0", ".visual" * 140000, "mtp.layers." + "1" * 1000000,
                     "lm_head.weight" + "w" * 1000000 + "."):
            hf_names.Names([name], "w").plain(name)

    def test_classification(self):
        f = self.convert(golden("qwen3_next_cls"))
        self.assertEqual((f.config["num_labels"], f.config["pooling"],
                          f.config["classifier_input"], f.config["tie_word_embeddings"]),
                         (3, "last", "hidden", 1))
        self.assertIn("no lm_head.weight", self.messages)
        self.assertEqual(self.convert(golden("qwen3_next_cls"), "--pooling", "mean")
                         .config["pooling"], "mean")
        config = synthetic.qwen3_config(architectures=["Qwen3ForSequenceClassification"],
                                        id2label={"0": "a", "1": "b"})
        self.fails(("score.weight", "found nothing, expected [2, 32]"),
                   self.checkpoint("model", config), self.path("out.q3n"))

    def test_mtp(self):
        f = self.convert(golden("qwen3_next_mtp"))
        self.assertEqual(f.config["num_mtp_layers"], 1)
        self.assertEqual(f.tensors["mtp.fc.weight"].dims, (64, 128))
        self.assertEqual(f.tensors["mtp.layers.0.mlp.experts.up_proj.weight"].dims, (8, 32, 64))

    def test_unknown_tensors_are_named(self):
        config = synthetic.qwen3_config()
        tensors = synthetic.qwen3_tensors(config)
        tensors["model.layers.0.self_attn.q_proj.bias"] = ("BF16", (32,), bytes(64))
        tensors["model.rotary_emb.inv_freq"] = ("F32", (2,), bytes(8))
        f = self.convert(self.checkpoint("model", config, tensors))
        self.assertIn("warning: 1 tensors are not part of qwen3 and were passed over: "
                      "model.layers.0.self_attn.q_proj.bias", self.messages)
        self.assertIn("computed from the configuration", self.messages)
        self.assertNotIn("layers.0.self_attn.q_proj.bias", f.tensors)

    def test_config_and_set(self):
        config = synthetic.qwen3_config()
        folder = self.checkpoint("model", config)
        os.rename(os.path.join(folder, "config.json"), self.path("other.json"))
        self.fails("config.json: cannot read", folder, self.path("out.q3n"))
        f = self.convert(folder, "--config", self.path("other.json"), "--set", "rms_norm_eps=0.5",
                         "--set", 'rope_scaling={"rope_type": "linear", "factor": 2}',
                         "--name", "thing")
        self.assertEqual((f.config["rms_norm_eps"], f.config["rope_type"], f.config["name"]),
                         (0.5, "linear", "thing"))

    def test_dry_run(self):
        status, out, err = self.run_main(golden("qwen3_5_moe_vl"), self.path("out.q3n"),
                                         "--dry-run")
        self.assertEqual(status, 0, err)
        self.assertEqual(os.listdir(self.dir), [])
        f = self.convert(golden("qwen3_5_moe_vl"))
        for name, t in f.tensors.items():
            line = next(s for s in out.splitlines() if s.startswith("tensor  %s " % name))
            for part in (t.type.name, str(list(t.dims)), "%d bytes" % t.bytes):
                self.assertIn(part, line)
        self.assertIn("skipped model.visual.patch_embed.proj.weight", out)
        self.assertIn("model.language_model.layers.3.self_attn.q_proj.weight", out)
        self.assertIn("total   %d tensors, %d bytes" % (len(f.tensors), f.file_bytes), out)
        self.assertIn("config  num_experts                      8", out)


# ---- What is refused ----

class Refused(Case):
    def refuse(self, expected, config=None, tensors=None, patch=None):
        self.fails(expected, self.checkpoint("model", config, tensors, patch),
                   self.path("out.q3n"))

    def test_configurations(self):
        cases = (
            (dict(model_type="llama"), ("model_type", "'llama'", "qwen3_next")),
            (dict(hidden_act="gelu"), ("hidden_act", "silu")),
            (dict(rope_scaling={"rope_type": "dynamic", "factor": 2}), ("rope_type", "'dynamic'")),
            (dict(rope_scaling={"type": "longrope"}), ("type", "'longrope'")),
            (dict(rope_scaling={"type": "yarn"}), ("factor", "a number")),
            (dict(rope_scaling={"type": "yarn", "factor": 2, "truncate": False}), "truncate"),
            (dict(use_sliding_window=True, sliding_window=64, max_window_layers=0),
             "sliding-window"),
            (dict(layer_types=["sliding_attention"]), "sliding-window"),
            (dict(layer_types=["full_attention"] * 2), ("layer_types", "1 of full_attention")),
            (dict(quantization_config={"quant_method": "awq", "bits": 4}),
             ("quant_method", "'awq'")),
            (dict(quantization_config={"quant_method": "gptq"}), "'gptq'"),
            (dict(hidden_size="wide"), ("hidden_size", "'wide'", "whole number")),
            (dict(vocab_size=0), ("vocab_size", "at least 1")),
            (dict(num_key_value_heads=3), ("num_attention_heads", "multiple of")),
            (dict(head_dim=15), ("partial_rotary_factor", "15")),
            (dict(num_hidden_layers=200), "nothing, expected"),
            (dict(num_hidden_layers=257), "num_hidden_layers: found 257, expected at most 256"),
            (dict(intermediate_size=0), "intermediate_size"),
            (dict(rms_norm_eps=2.0), ("rms_norm_eps", "0.0 .. 1.0")),
            (dict(tie_word_embeddings=[]), ("tie_word_embeddings", "true or false")),
            (dict(rope_scaling="yarn"), ("rope_scaling", "an object")),
        )
        for changes, expected in cases:
            with self.subTest(changes):
                if changes.get("num_hidden_layers") == 200:
                    status, _, err = self.run_main(
                        self.checkpoint("model", synthetic.qwen3_config(**changes),
                                        synthetic.qwen3_tensors(synthetic.qwen3_config())),
                        self.path("out.q3n"))
                    self.assertEqual(status, 1)
                    self.assertLessEqual(err.count("error: "), 20)
                    self.assertIn("found 2189 of the model's tensors missing", err)
                    continue
                self.refuse(expected, synthetic.qwen3_config(**changes),
                            synthetic.qwen3_tensors(synthetic.qwen3_config()))
        self.assertEqual(len(hf_config.read(synthetic.qwen3_config(
            use_sliding_window=True, sliding_window=64, max_window_layers=1), "c", [])
            ["layer_types"]), 1)

    def test_broken_json(self):
        folder = self.checkpoint()
        for text, expected in (("{", "not valid JSON"), ("[1]", "found a JSON list"),
                               ("\xff", "not valid JSON"), ("[" * 100000, "not valid JSON")):
            with open(os.path.join(folder, "config.json"), "w", encoding="latin-1") as f:
                f.write(text)
            self.fails(("config.json", expected), folder, self.path("out.q3n"))

    def test_headers(self):
        """A safetensors header whose numbers contradict each other or the file."""
        name = "model.norm.weight"

        def change(key, value):
            return lambda header: header[name].__setitem__(key, value)

        cases = (
            (change("shape", [31]), (name, "found 64 bytes", "expected 62 for BF16 [31]")),
            (change("dtype", "F32"), (name, "found 64 bytes", "expected 128 for F32 [32]")),
            (change("dtype", 7), (name, "expected dtype, shape and data_offsets")),
            (change("shape", [-1]), (name, "expected dtype, shape")),
            (change("shape", [1.5]), (name, "expected dtype, shape")),
            (change("data_offsets", [64, 0]), (name, "64 > 0")),
            (change("data_offsets", [0, 1 << 62]), (name, "truncated")),
            (change("data_offsets", [0]), (name, "expected dtype, shape")),
            (lambda header: header.update({name: []}), (name, "expected dtype, shape")),
        )
        for patch, expected in cases:
            with self.subTest(expected):
                self.refuse(("model.safetensors",) + expected, patch=patch)

    def test_files(self):
        folder = self.checkpoint()
        path = os.path.join(folder, "model.safetensors")
        with open(path, "rb") as f:
            good = f.read()
        (n,) = struct.unpack("<Q", good[:8])
        name = b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "a": 1}'
        cases = (
            (good[:-1], "truncated"),
            (good[:n], "header: found %d bytes, expected %d" % (n - 8, n)),
            (good[:5], "found 5 bytes, expected at least 8"), (b"", "found 0 bytes"),
            (struct.pack("<Q", 1 << 60) + good[8:], "header: found a length of"),
            (struct.pack("<Q", 3) + b"{}x", "header: not valid JSON"),
            (struct.pack("<Q", 2) + b"[]", "header: found a JSON list"),
            (struct.pack("<Q", len(name)) + name, "a stands twice"),
        )
        for data, expected in cases:
            with self.subTest(expected):
                with open(path, "wb") as f:
                    f.write(data)
                self.fails(("model.safetensors", expected), folder, self.path("out.q3n"))

    def test_tensors(self):
        config = synthetic.qwen3_config()
        good = synthetic.qwen3_tensors(config)
        name = "model.layers.0.self_attn.k_proj.weight"
        dtype, _, data = good[name]
        for tensor, expected in (((dtype, (32, 16), data), "found [32, 16], expected [16, 32]"),
                                 (("I16", (16, 32), data), "found type I16, expected BF16"),
                                 ((dtype, (16 * 32,), data), "found [512], expected [16, 32]"),
                                 (None, "found nothing, expected [16, 32]")):
            tensors = dict(good)
            del tensors[name]
            if tensor:
                tensors[name] = tensor
            with self.subTest(expected):
                self.refuse((name + ": " + expected,), config, tensors)

    def test_all_problems_are_named(self):
        config = synthetic.qwen3_config()
        tensors = synthetic.qwen3_tensors(config)
        gone = ["model.norm.weight", "model.layers.0.mlp.down_proj.weight",
                "model.layers.0.self_attn.q_norm.weight"]
        for name in gone:
            del tensors[name]
        status, _, err = self.run_main(self.checkpoint("model", config, tensors), self.path("o"))
        self.assertEqual(status, 1)
        for name in gone:
            self.assertIn(name + ": found nothing, expected [", err)
        self.assertEqual(len(err.splitlines()), 3)

    def test_fp8_scales(self):
        shutil.copytree(golden("qwen3_next_fp8"), self.path("m"))
        raw = safetensors_file.read_header(self.path("m", "model.safetensors"))
        name = "model.layers.0.linear_attn.out_proj.weight"
        tensors = {k: (e.dtype, e.shape, e.store.read(e.offset, e.bytes)) for k, e in raw.items()}
        for change, expected in ((None, "found nothing, expected [2, 1]"),
                                 (("BF16", (1, 2), bytes(4)), "found [1, 2], expected [2, 1]"),
                                 (("I16", (2, 1), bytes(4)), "found type I16")):
            spoiled = {k: v for k, v in tensors.items() if k != name + "_scale_inv"}
            if change:
                spoiled[name + "_scale_inv"] = change
            synthetic.write_safetensors(self.path("m", "model.safetensors"), spoiled)
            safetensors_file.Store.close_all()
            self.fails((name + "_scale_inv", expected), self.path("m"), self.path("out.q3n"))

    def test_index(self):
        shutil.copytree(golden("qwen3_next"), self.path("m"))
        index = load_json(self.path("m"), "model.safetensors.index.json")
        last = "model-00005-of-00005.safetensors"
        os.rename(self.path("m", last), self.path("gone"))
        self.fails(("found no " + last, "expected 5 shards"), self.path("m"), self.path("out.q3n"))
        os.rename(self.path("gone"), self.path("m", last))
        for change, expected in (({"extra.weight": last}, "extra.weight: found in the index"),
                                 ({"extra.weight": "../" + last}, "one without a path"),
                                 ({"extra.weight": 3}, "weight_map")):
            spoiled = {"weight_map": dict(index["weight_map"], **change)}
            synthetic.write_json(self.path("m"), "model.safetensors.index.json", spoiled)
            self.fails(("index.json", expected), self.path("m"), self.path("out.q3n"))

    def test_places(self):
        self.fails("no such file", self.path("nothing"), self.path("out.q3n"))
        self.fails(("no such file", "hf download Qwen/Qwen3-0.6B --local-dir"), "Qwen/Qwen3-0.6B",
                   self.path("out.q3n"))
        os.mkdir(self.path("empty"))
        synthetic.write_json(self.path("empty"), "config.json", synthetic.qwen3_config())
        self.fails("found no weights, expected *.safetensors", self.path("empty"),
                   self.path("out.q3n"))
        open(self.path("empty", "pytorch_model.bin"), "w").close()
        self.fails(("pytorch_model.bin", "safe_serialization"), self.path("empty"),
                   self.path("out.q3n"))
        self.fails("another kind of file", CONVERT, self.path("out.q3n"))
        folder = self.checkpoint()
        self.fails("expected it to exist", folder, self.path("no", "out.q3n"))
        self.fails("found a folder, expected a regular file", folder, self.dir)
        shutil.copy(os.path.join(folder, "model.safetensors"),
                    os.path.join(folder, "model2.safetensors"))
        os.rename(os.path.join(folder, "model.safetensors"),
                  os.path.join(folder, "model1.safetensors"))
        self.fails("found also in", folder, self.path("out.q3n"))

    def test_usage(self):
        for args in ((), ("a",), ("a", "b", "--type", "q5"), ("a", "b", "--set", "x"),
                     ("a", "b", "--tokenizer", "t", "--no-tokenizer"),
                     ("a", "b", "--pooling", "x")):
            status, _, err = self.run_main(*args)
            self.assertEqual(status, 2, args)
            self.assertIn("usage: convert.py", err)


# ---- LoRA ----

class Lora(Case):
    def setUp(self):
        Case.setUp(self)
        self.model_config = synthetic.qwen3_config(tie_word_embeddings=False)
        self.base = {}
        for name, (_, shape, data) in synthetic.qwen3_tensors(self.model_config).items():
            self.base[name] = np.frombuffer(bytes(matrix.convert(data, "bf16", "f32")),
                                            "<f4").reshape(shape)
        self.checkpoint("model", self.model_config)
        self.rng = np.random.default_rng(5)

    def random(self, *shape):
        return self.rng.normal(0, 0.1, shape).astype("<f4")

    def adapter(self, tensors, **config):
        """tensors {name below base_model.model.: f32 array}."""
        os.makedirs(self.path("lora"), exist_ok=True)
        settings = dict({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}, **config)
        synthetic.write_json(self.path("lora"), "adapter_config.json", settings)
        synthetic.write_safetensors(self.path("lora", "adapter_model.safetensors"), {
            "base_model.model." + n: ("F32", x.shape, x.tobytes()) for n, x in tensors.items()})
        return self.path("lora")

    def pair(self, module, rows, cols, r=4):
        return {module + ".lora_A.weight": self.random(r, cols),
                module + ".lora_B.weight": self.random(rows, r)}

    def merged(self, *args):
        return self.convert(self.path("model"), "--type", "f32", "--lora", self.path("lora"), *args)

    def check(self, f, name, want):
        got = np.frombuffer(f.data(name), "<f4").reshape(want.shape)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)

    def test_merge(self):
        """w + alpha / r * B A, others untouched; the same for every block size."""
        q, up = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
        t = dict(self.pair(q, 32, 32), **self.pair(up, 48, 32))
        self.adapter(t)
        for block in (convert.BLOCK_BYTES, 300):
            saved, convert.BLOCK_BYTES = convert.BLOCK_BYTES, block
            try:
                f = self.merged()
            finally:
                convert.BLOCK_BYTES = saved
            for module in (q, up):
                a, b = (t["%s.lora_%s.weight" % (module, x)].astype(float) for x in "AB")
                self.check(f, module[len("model."):] + ".weight",
                           self.base[module + ".weight"] + 2 * (b @ a))
            k = "model.layers.0.self_attn.k_proj.weight"
            self.assertEqual(f.data(k[len("model."):]), self.base[k].tobytes())
        f = self.convert(self.path("model"), "--lora", self.path("lora"))
        self.assertEqual(f.tensors["layers.0.self_attn.q_proj.weight"].type.name, "bf16")

    def test_scales(self):
        q, k = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
        t = dict(self.pair(q, 32, 32), **self.pair(k, 16, 32, r=9))
        self.adapter(t, use_rslora=True, rank_pattern={"k_proj": 9}, alpha_pattern={"k_.*": 6})
        f = self.merged()
        for module, scale in ((q, 8 / 2), (k, 6 / 3)):
            a, b = (t["%s.lora_%s.weight" % (module, x)].astype(float) for x in "AB")
            self.check(f, module[len("model."):] + ".weight",
                       self.base[module + ".weight"] + scale * (b @ a))

    def test_patterns(self):
        """The first key that is a module's name or its end, as PEFT's get_pattern_key."""
        keys = {"k_proj": 1, "layers.1.k_proj": 2, r"layers\.[0-9]+\.(q|k)_proj": 3, "proj": 4,
                "q_proj": 5, "m.layers.2.o_proj": 6, "o_proj": 7, ".*up": 8, "x.*|b": 9}
        modules = ["m.layers.1.k_proj", "m.layers.1.q_proj", "k_proj", "q_proj",
                   "m.layers.2.o_proj", "m.layers.3.o_proj", "m.proj", "m.xproj", "xproj.m",
                   "m.b", "m.b.c", "up", ".up", "", ".", "m.layers.1.k_proj.m"]
        for order in (list(keys), list(keys)[::-1]):
            found = lora.Patterns(hf_config.Json({k: keys[k] for k in order}, "w"))
            for module in modules:
                want = next((keys[k] for k in order if re.match(r"(.*\.)?(%s)$" % k, module)), 0)
                self.assertEqual(found.value(module, 0), want, module)

    def test_hostile_patterns(self):
        """No key takes long: many names are looked up, what could take for ever is refused."""
        refused = ("a?" * 60 + "b", "(a|a)" * 40 + "b", "(a+)+", "a*" * 20, "a" * 201, "[", "*",
                   "a{99999999999}", "(" * 99 + ")" * 99)
        for key in refused:
            with self.subTest(key):
                with self.assertRaisesRegex(files.ConvertError, "as key|at most"):
                    lora.Patterns(hf_config.Json({key: 4}, "w"))
        many = lora.Patterns(hf_config.Json({"m.%d.proj" % i: i for i in range(20000)}, "w"))
        self.assertEqual([many.value("x.m.%d.proj" % i, 0) for i in range(20000)],
                         list(range(20000)))
        self.assertEqual(many.value("a." * 200000, 7), 7)
        with self.assertRaisesRegex(files.ConvertError, "at most 16 keys"):
            lora.Patterns(hf_config.Json({"a.*%d" % i: 4 for i in range(20000)}, "w"))
        with self.assertRaisesRegex(files.ConvertError, "at most 200"):
            lora.Patterns(hf_config.Json({"a.*b": 4}, "w")).value("a." * 200000, 7)

    def test_embedding_and_whole_tensors(self):
        e, norm = "model.embed_tokens", self.random(32)
        t = {e + ".lora_embedding_A": self.random(4, 64),
             e + ".lora_embedding_B": self.random(32, 4),
             "model.norm.modules_to_save.weight": norm}
        self.adapter(t)
        f = self.merged()
        self.check(f, "embed_tokens.weight", self.base[e + ".weight"] + 2 * (
            t[e + ".lora_embedding_B"] @ t[e + ".lora_embedding_A"]).T)
        self.assertEqual(f.data("norm.weight"), norm.tobytes())

    def test_before_permutation(self):
        """An adapter of grouped in_proj_qkvz is merged into the grouped rows."""
        module = "model.layers.0.linear_attn.in_proj_qkvz"
        t = self.pair(module, 384, 64)
        self.adapter(t)
        plain = self.convert(golden("qwen3_next"), "--type", "f32")
        name = "layers.0.linear_attn.in_proj_qkvz.weight"
        before = np.frombuffer(plain.data(name), "<f4").reshape(384, 64)
        f = self.convert(golden("qwen3_next"), "--type", "f32", "--lora", self.path("lora"))
        delta = (2 * t[module + ".lora_B.weight"] @ t[module + ".lora_A.weight"])
        order = np.concatenate([np.concatenate([np.arange(g * 192 + at, g * 192 + at + n)
                                                for g in range(2)])
                                for at, n in ((0, 32), (32, 32), (64, 64), (128, 64))])
        self.check(f, name, before + delta[order])

    def test_refused(self):
        q = "model.layers.0.self_attn.q_proj"
        good = self.pair(q, 32, 32)
        half = {q + ".lora_A.weight": self.random(4, 32)}
        cases = (
            (good, dict(use_dora=True), "use_dora"), (good, dict(bias="all"), "bias"),
            (good, dict(peft_type="IA3"), "peft_type"),
            (good, dict(r=8), "found rank 4, expected 8"),
            (good, dict(target_parameters=["mlp.experts.down_proj"]), "target_parameters"),
            (half, {}, (q, "expected lora_A and lora_B")),
            (self.pair(q, 32, 16), {}, (q, "found lora_A [4, 16] and lora_B [32, 4]", "[32, 32]")),
            (self.pair("model.layers.7.self_attn.q_proj", 32, 32), {},
             ("model.layers.7.self_attn.q_proj", "expected a matrix of the model")),
            (self.pair("model.layers.0.input_layernorm", 32, 1), {}, "input_layernorm"),
            ({"other.weight": self.random(2)}, {}, ("other.weight", "the checkpoint has not")),
            (self.pair(q, 32, 32, r=0), dict(rank_pattern={"q_proj": 0}), (q, "[0, 32]")),
            (dict(good, **{q + ".lora_magnitude_vector": self.random(32)}), {},
             "lora_magnitude_vector"),
        )
        for tensors, config, expected in cases:
            with self.subTest(expected):
                self.adapter(tensors, **config)
                self.fails(expected, self.path("model"), self.path("out.q3n"), "--lora",
                           self.path("lora"))
        self.fails("adapter_config.json", self.path("model"), self.path("out.q3n"), "--lora",
                   self.path("model"))
        os.rename(self.path("lora", "adapter_model.safetensors"),
                  self.path("lora", "adapter_model.bin"))
        self.fails(("adapter_model.bin", "safe_serialization"), self.path("model"),
                   self.path("out.q3n"), "--lora", self.path("lora"))


# ---- Keras ----

def h5_names(h):
    """Paths of the datasets of an open HDF5 file."""
    names = []
    h.visititems(lambda name, item: names.append(name) if hasattr(item, "shape") else None)
    return names


class Keras(Case):
    def tensors(self, name):
        """Datasets of a golden by path, and its configuration."""
        archive = zipfile.ZipFile(golden(os.path.join("keras", name + ".keras")))
        out = {}
        with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as h:
            h.visititems(lambda n, d: out.update({n: d[:]}) if hasattr(d, "shape") else None)
        return out, json.loads(archive.read("config.json"))

    def write_h5(self, tensors, name="m.weights.h5"):
        with h5py.File(self.path(name), "w") as h:
            for key, value in tensors.items():
                h.create_dataset(key, data=value)
        return self.path(name)

    def write_keras(self, tensors, config, **options):
        path = self.write_h5(tensors, "inner.h5")
        with zipfile.ZipFile(self.path("m.keras"), "w", **options) as z:
            z.writestr("metadata.json", "{}")
            z.writestr("config.json", json.dumps(config))
            z.write(path, "model.weights.h5")
        os.remove(path)
        return self.path("m.keras")

    def test_weights_only(self):
        """Geometry from shapes; what they do not say is asked for."""
        want = self.convert(golden("keras/qwen3_head_all_moe.keras"))
        tensors, _ = self.tensors("qwen3_head_all_moe")
        path = self.write_h5(tensors)
        self.fails("--set num_experts_per_tok=K", path, self.path("out2.q3n"))
        f = self.convert(path, "--set", "num_experts_per_tok=2", "--name", "qwen3_head_all_moe")
        self.assertEqual(f.config, want.config)
        self.assertEqual([f.data(n) for n in f.tensors], [want.data(n) for n in want.tensors])
        synthetic.write_json(self.dir, "c.json", {"num_experts_per_tok": 2, "norm_eps": 1e-5,
                                                  "max_seq_len": 16})
        f = self.convert(path, "--config", self.path("c.json"))
        self.assertEqual((f.config["rms_norm_eps"], f.config["max_position_embeddings"]),
                         (1e-5, 16))
        no_tables = {n: v for n, v in tensors.items() if "/rope/" not in n}
        path = self.write_h5(no_tables)
        self.fails("--set num_attention_heads=N", path, self.path("out2.q3n"))
        f = self.convert(path, "--set", "num_experts_per_tok=2", "--set", "num_attention_heads=4")
        self.assertEqual((f.config["head_dim"], f.config["num_key_value_heads"]), (4, 2))
        self.assertIn("no rotary tables", self.messages)

    def test_task_models(self):
        """Both prefixes; a classifier over the logits; pooling by revision or by option."""
        ids = np.array([3, 1, 4, 1, 5])
        for name, prefix, pooling in (("qwen3_head_all_moe", "layers/qwen3/", "last"),
                                      ("seed_patched_real_rope", "layers/qwen3_next/", "first")):
            tensors, config = self.tensors(name)
            logits = q3n_numpy.Model(self.convert(golden("keras/%s.keras" % name))).logits(ids)
            task = {prefix + n: v for n, v in tensors.items()}
            rng = np.random.default_rng(3)
            task["layers/dense/vars/0"] = w = rng.normal(size=(61, 3)).astype("f4")
            task["layers/dense/vars/1"] = b = rng.normal(size=3).astype("f4")
            nested = {"class_name": "Functional", "config": {"layers": [{"config": {}}, config]}}
            path = self.write_keras(task, nested)
            f = self.convert(path)
            self.assertEqual((f.config["num_labels"], f.config["classifier_input"],
                              f.config["pooling"]), (3, "logits", pooling))
            row = {"last": -1, "first": 0}[pooling]
            np.testing.assert_allclose(q3n_numpy.Model(f).classify(ids), logits[row] @ w + b,
                                       rtol=0, atol=1e-5)
            f = self.convert(path, "--pooling", "mean")
            np.testing.assert_allclose(q3n_numpy.Model(f).classify(ids), logits.mean(0) @ w + b,
                                       rtol=0, atol=1e-5)
            nested["config"]["pooling_strategy"] = "mean"
            self.assertEqual(self.convert(self.write_keras(task, nested)).config["pooling"], "mean")
            del task["layers/dense/vars/0"], task["layers/dense/vars/1"]
            self.assertEqual(self.convert(self.write_keras(task, nested)).config["num_labels"], 0)

    def test_dense_layers(self):
        """A layer without a router is a dense FFN."""
        tensors, config = self.tensors("qwen3_head_all_moe")
        p = "blocks/transformer_layer/ffn_layer/"
        mixed = {n: v for n, v in tensors.items() if not n.startswith(p)}
        rng = np.random.default_rng(4)
        for part, shape in (("gate", (16, 24)), ("up", (16, 24)), ("down", (24, 16))):
            mixed["%s%s_proj/vars/0" % (p, part)] = rng.normal(size=shape).astype("f4")
        f = self.convert(self.write_keras(mixed, config))
        self.assertEqual((f.config["layer_experts"], f.config["intermediate_size"]), ([0, 1], 24))
        self.assertEqual(f.data("layers.0.mlp.down_proj.weight"),
                         np.ascontiguousarray(mixed[p + "down_proj/vars/0"].T).tobytes())
        self.assertTrue(np.isfinite(q3n_numpy.Model(f).logits([1, 2, 3])).all())

    def test_tables(self):
        """The file's tables are followed: by theta where one explains them, else kept."""
        tensors, config = self.tensors("qwen3_head_all_moe")
        rope = ["blocks/transformer_layer%s/attention/rope/vars/" % s for s in ("", "_1")]

        def with_theta(theta, scale=1.0):
            angle = np.arange(32)[:, None] * (theta ** -(np.arange(2) / 2.0)) * scale
            changed = dict(tensors)
            for p in rope:
                changed[p + "0"], changed[p + "1"] = (np.cos(angle).astype("f4"),
                                                      np.sin(angle).astype("f4"))
            return changed

        f = self.convert(self.write_keras(tensors, config))
        self.assertEqual((f.config["rope_type"], f.config["rope_theta"]), ("default", 1e6))
        self.assertNotIn("warning", self.messages)
        f = self.convert(self.write_keras(with_theta(3e4), config))
        self.assertEqual((f.config["rope_type"], f.config["rope_theta"]), ("default", 3e4))
        self.assertIn("rotary tables follow theta 30000", self.messages)
        odd = with_theta(1e4, 0.5)
        f = self.convert(self.write_keras(odd, config))
        self.assertEqual(f.config["rope_type"], "table")
        self.assertEqual(f.data("rope.cos"), odd[rope[0] + "0"].tobytes())
        self.assertEqual(f.data("rope.sin"), odd[rope[0] + "1"].tobytes())
        odd[rope[1] + "1"] = odd[rope[1] + "1"] + 1
        self.fails(("transformer_layer_1/attention/rope", "the same in every layer"),
                   self.write_keras(odd, config), self.path("out2.q3n"))

    def test_refused(self):
        tensors, config = self.tensors("qwen3_head_all_moe")
        p = "blocks/transformer_layer_1/attention/w_k/vars/0"
        gone = {n: v for n, v in tensors.items() if n != p}
        self.fails((p, "found nothing, expected [16, 8]"), self.write_keras(gone, config),
                   self.path("out.q3n"))
        self.fails((p, "found [16, 4], expected [16, 8]"),
                   self.write_keras(dict(tensors, **{p: tensors[p][:, :4]}), config),
                   self.path("out.q3n"))
        self.fails((p, "found type int32"),
                   self.write_keras(dict(tensors, **{p: tensors[p].astype("i4")}), config),
                   self.path("out.q3n"))
        self.fails("a bias of lm_head", self.write_keras(
            dict(tensors, **{"layers/dense/vars/1": np.zeros(61, "f4")}), config),
            self.path("out.q3n"))
        self.fails("expected it stored", self.write_keras(tensors, config,
                                                          compression=zipfile.ZIP_DEFLATED),
                   self.path("out.q3n"))
        inner = config["config"]
        for key, value, expected in (("num_experts_per_tok", 9, "at most 4"),
                                     ("num_experts_per_tok", "x", "whole number"),
                                     ("max_seq_len", -3, "whole number"),
                                     ("norm_eps", "x", "a number")):
            changed = dict(config, config=dict(inner, **{key: value}))
            self.fails((key, expected), self.write_keras(tensors, changed), self.path("out.q3n"))
        path = self.write_keras(tensors, config)
        with open(path, "rb") as f:
            data = f.read()
        for spoiled, expected in ((data[:200], "cannot read the archive"), (b"", "cannot read"),
                                  (data.replace(b"\x89HDF", b"\x89HDG"), "not a readable HDF5")):
            with open(path, "wb") as f:
                f.write(spoiled)
            self.fails(expected, path, self.path("out.q3n"))
        with open(self.path("x.weights.h5"), "wb") as f:
            f.write(b"nothing")
        self.fails("not a readable HDF5", self.path("x.weights.h5"), self.path("out.q3n"))
        with h5py.File(self.path("x.weights.h5"), "w") as h:
            h.create_dataset("a", data=[1.0])
        self.fails(("embeddings/vars/0", "found nothing"), self.path("x.weights.h5"),
                   self.path("out.q3n"))
        self.fails("expected safetensors for --lora", golden("keras/%s.keras" % KERAS[0]),
                   self.path("out.q3n"), "--lora", self.dir)

    def test_hostile_configurations(self):
        """Whatever stands under a key of config.json: a file or one error."""
        _, config = self.tensors("qwen3_head_all_moe")
        with zipfile.ZipFile(golden("keras/qwen3_head_all_moe.keras")) as archive:
            weights = archive.read("model.weights.h5")
        keys = ("num_attention_heads", "num_key_value_heads", "num_experts_per_tok", "moe_config",
                "norm_eps", "rope_theta", "max_seq_len", "max_position_embeddings",
                "pooling_strategy")
        for key in keys:
            for value in ("x", [], [1], {"gating_config": {"top_k": "a"}}, 1.5, 0, -1, 10 ** 30,
                          True, float("nan")):
                changed = json.loads(json.dumps(config))
                keras_checkpoint.find_model(changed)[key] = value
                with zipfile.ZipFile(self.path("m.keras"), "w") as archive:
                    archive.writestr("config.json", json.dumps(changed))
                    archive.writestr("model.weights.h5", weights)
                with self.subTest("%s = %r" % (key, value)):
                    status, _, err = self.run_main(self.path("m.keras"), self.path("out.q3n"), "-q",
                                                   "--dry-run")
                    self.assertIn(status, (0, 1))
                    self.assertEqual(err.count("error: "), status, err)

    def test_damaged_datasets(self):
        """A block that HDF5 cannot unpack names file and dataset; data elsewhere are not read."""
        tensors, _ = self.tensors("qwen3_head_all_moe")
        for part, where in (("w_q", "w_q/vars/0"), ("rope", "rope/vars/0")):
            with h5py.File(self.path("m.weights.h5"), "w") as h:
                for key, value in tensors.items():
                    h.create_dataset(key, data=value, compression="gzip")
                places = [h[k].id.get_chunk_info(0).byte_offset for k in h5_names(h) if part in k]
            with open(self.path("m.weights.h5"), "r+b") as f:
                for place in places:
                    f.seek(place)
                    f.write(b"\xff" * 16)
            self.fails(("m.weights.h5: ", where, "cannot read"), self.path("m.weights.h5"),
                       self.path("out.q3n"), "--set", "num_experts_per_tok=2")
        with h5py.File(self.path("m.weights.h5"), "w") as h:
            h.create_dataset("embeddings/vars/0", (4, 4), "f4", external=[("other", 0, 64)])
        self.fails(("embeddings/vars/0", "another file"), self.path("m.weights.h5"),
                   self.path("out.q3n"))

    def test_training_state_is_named(self):
        tensors, config = self.tensors("qwen3_head_all_moe")
        tensors.update({"optimizer/vars/0": np.zeros(3, "f4"), "strange/vars/0": np.zeros(3, "f4"),
                        "blocks/x/seed_generator/vars/0": np.zeros(2, "u4")})
        self.convert(self.write_keras(tensors, config))
        for text in ("(optimizer state): optimizer/vars/0", "(random state of training)",
                     "warning: 1 datasets are not part of the design model and were passed over: "
                     "strange/vars/0"):
            self.assertIn(text, self.messages)

    def test_a_folder_with_one_keras_file(self):
        os.mkdir(self.path("folder"))
        shutil.copy(golden("keras/%s.keras" % KERAS[0]), self.path("folder"))
        self.assertEqual(self.convert(self.path("folder")).config["family"], "design")


# ---- Tokenizer ----

CHATML = "{{ '<|im_start|>' }}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
EMPTY_THINK = "{%- if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"


class Tokenizers(Case):
    def setUp(self):
        Case.setUp(self)
        self.char = {b: c for c, b in tokenizer_file.byte_map().items()}
        self.vocab = {self.char[b]: b for b in range(256)}
        self.merges = [("h", "e"), ("l", "l"), ("he", "ll"), (self.char[32], "hell")]
        for left, right in self.merges:
            self.vocab[left + right] = len(self.vocab)
        self.special = len(self.vocab)
        self.folder = self.checkpoint("model", synthetic.qwen3_config(
            vocab_size=512, bos_token_id=7, eos_token_id=[9, 600, 9]))

    def json(self, **changes):
        split = {"type": "Split", "pattern": {"Regex": tokenizer_file.PATTERNS["qwen2"]},
                 "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        value = {
            "added_tokens": [
                {"id": self.special, "content": "<|end|>", "special": True, "lstrip": True},
                {"id": self.special + 1, "content": "caf\u00e9", "rstrip": True,
                 "normalized": True, "single_word": True}],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "model": {"type": "BPE", "vocab": self.vocab,
                      "merges": ["%s %s" % m for m in self.merges]}}
        value.update(changes)
        return value

    def write(self, name, value):
        synthetic.write_json(self.folder, name, value)

    def remove(self, *names):
        for name in names:
            if os.path.exists(os.path.join(self.folder, name)):
                os.remove(os.path.join(self.folder, name))

    def test_section(self):
        """Every number of the section, unpacked here."""
        self.write("tokenizer.json", self.json())
        f = self.convert(self.folder)
        with open(f.path, "rb") as raw:
            data = raw.read()
        kind, _, offset, size, _ = struct.unpack_from("<IIQQQ", data, 64 + 3 * 32)
        self.assertEqual(kind, 4)
        s = data[offset:offset + size]
        n, n_merges, n_added, zero = struct.unpack_from("<IIII", s)
        self.assertEqual((n, n_merges, n_added, zero), (self.special + 2, 4, 2, 0))
        offsets = struct.unpack_from("<%dI" % (n + 1), s, 16)
        at = 16 + 4 * (n + 1)
        merges = struct.unpack_from("<12I", s, at)
        added = struct.unpack_from("<4I", s, at + 48)
        text = s[at + 64:]
        tokens = [text[a:b] for a, b in zip(offsets, offsets[1:])]
        self.assertEqual(tokens, [bytes([b]) for b in range(256)]
                         + [b"he", b"ll", b"hell", b" hell", b"<|end|>",
                            "caf\u00e9".encode()])
        self.assertEqual(merges, (104, 101, 256, 108, 108, 257, 256, 257, 258, 32, 258, 259))
        self.assertEqual(added, (self.special, 1 | 2, self.special + 1, 4 | 8 | 16))
        self.assertEqual((f.config["tokenizer_pattern"], f.config["tokenizer_nfc"]), ("qwen2", 1))

    def test_forms(self):
        """Merges as pairs, and vocab.json + merges.txt + added_tokens_decoder, are the same."""
        self.write("tokenizer.json", self.json())
        want = self.convert(self.folder).tokenizer
        value = self.json()
        value["model"]["merges"] = [list(m) for m in self.merges]
        self.write("tokenizer.json", value)
        self.assertEqual(self.convert(self.folder).tokenizer, want)
        self.remove("tokenizer.json")
        self.write("vocab.json", self.vocab)
        with open(os.path.join(self.folder, "merges.txt"), "w", encoding="utf-8") as f:
            f.write("#version: 0.2\n" + "".join("%s %s\n" % m for m in self.merges))
        self.write("tokenizer_config.json", {
            "eos_token": None, "unk_token": None, "pad_token": None, "added_tokens_decoder": {
                str(t["id"]): t for t in self.json()["added_tokens"]}})
        f = self.convert(self.folder)
        self.assertEqual(f.tokenizer, want)
        self.assertEqual((f.config["tokenizer_pattern"], f.config["tokenizer_nfc"]), ("qwen2", 1))
        other = tokenizer_file.load(self.folder, "qwen3_5_moe", 512)
        self.assertEqual(other.pattern, "qwen3_5")
        os.remove(os.path.join(self.folder, "merges.txt"))
        self.fails("merges.txt: cannot read", self.folder, self.path("out2.q3n"))

    def test_patterns(self):
        value = self.json()
        regex = value["pre_tokenizer"]["pretokenizers"][0]["pattern"]
        regex["Regex"] = tokenizer_file.PATTERNS["qwen3_5"]
        self.assertEqual(regex["Regex"].count("\\p{M}"), 2)
        self.write("tokenizer.json", value)
        self.assertEqual(self.convert(self.folder).config["tokenizer_pattern"], "qwen3_5")
        regex["Regex"] = tokenizer_file.PATTERNS["qwen2"]
        self.write("tokenizer.json", value)
        for settings in ({"pretokenize_regex": tokenizer_file.PATTERNS["qwen3_5"]},
                         {"tokenizer_class": "Qwen3_5Tokenizer"}):
            self.write("tokenizer_config.json", settings)
            self.assertEqual(self.convert(self.folder).config["tokenizer_pattern"], "qwen3_5")
        self.write("tokenizer.json", self.json(normalizer=None))
        self.assertEqual(self.convert(self.folder).config["tokenizer_nfc"], 0)
        self.assertEqual(load_json(STORIES, "tokenizer.json")["pre_tokenizer"]["pretokenizers"][0]
                         ["pattern"]["Regex"], tokenizer_file.PATTERNS["qwen2"])

    def test_refused(self):
        def model(**changes):
            return {"model": dict(self.json()["model"], **changes), "added_tokens": []}

        steps = self.json()["pre_tokenizer"]["pretokenizers"]
        digits = dict(steps[0], pattern={"Regex": "\\\\p{N}{1,3}"})
        cases = (
            (model(type="Unigram"), ("type", "'Unigram'", "--no-tokenizer")),
            (model(byte_fallback=True), ("byte_fallback", "--no-tokenizer")),
            (model(vocab={k: v for k, v in self.vocab.items() if k != "h"}),
             ("merge 0", "no token 'h'")),
            (model(vocab={}, merges=[]), ("vocab", "no tokens")),
            (model(vocab=dict(self.vocab, x=1)), "id 1: found"),
            (model(vocab=dict(self.vocab, xy=-1)), "token id of 'xy': found -1"),
            (model(vocab=dict(self.vocab, xy=512)),
             "found 512, expected less than vocab_size, 512"),
            (model(vocab=dict(self.vocab, **{"\u4e2d": 300})), "token 300"),
            (model(merges=["a b c"]), ("merge 0", "two tokens")),
            (model(merges=["h x"]), ("merge 0", "no token 'hx'")),
            (model(merges=3), ("merges", "a list")),
            ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, steps[1]]}},
             ("pre-tokenizer pattern", "--no-tokenizer")),
            ({"pre_tokenizer": {"type": "Whitespace"}}, ("pre_tokenizer", "ByteLevel")),
            ({"normalizer": {"type": "NFKC"}}, ("normalizer", "NFC or none")),
            ({"added_tokens": [{"id": 4}]}, "added token"),
            ({"added_tokens": [{"id": self.special, "content": "\ud800"}]},
             "expected valid Unicode"),
        )
        for changes, expected in cases:
            with self.subTest(expected):
                self.write("tokenizer.json", self.json(**changes))
                self.fails(expected, self.folder, self.path("out.q3n"))
        f = self.convert(self.folder, "--no-tokenizer")
        self.assertIsNone(f.tokenizer)
        self.assertNotIn("tokenizer_pattern", f.config)
        self.fails("found no tokenizer.json", self.folder, self.path("out2.q3n"), "--tokenizer",
                   GOLDEN)

    def test_special_ids(self):
        """generation_config.json first; else config.json and the tokenizer's own eos_token."""
        self.write("tokenizer.json", self.json())
        self.write("tokenizer_config.json", {"eos_token": {"content": "<|end|>"},
                                             "pad_token": "he", "bos_token": None})
        c = self.convert(self.folder).config
        self.assertEqual((c["eos_ids"], c["bos_id"], c["pad_id"]), ([9, self.special], 7, 256))
        self.write("generation_config.json", {"eos_token_id": 11, "pad_token_id": 3})
        c = self.convert(self.folder).config
        self.assertEqual((c["eos_ids"], c["pad_id"]), ([11], 256))
        self.write("generation_config.json", {"eos_token_id": [12, 11, 12]})
        self.assertEqual(self.convert(self.folder).config["eos_ids"], [12, 11])
        self.write("generation_config.json", {"eos_token_id": "x"})
        self.fails(("generation_config.json", "token ids"), self.folder, self.path("out2.q3n"))
        self.remove("generation_config.json", "tokenizer_config.json", "tokenizer.json")
        c = self.convert(self.folder).config
        self.assertEqual((c["eos_ids"], "pad_id" in c), ([9], False))

    def test_many_special_ids(self):
        """Lists of any length are compared once, not each id with each."""
        n = 300000
        config = dict(load_json(self.folder, "config.json"), eos_token_id=list(range(n)))
        self.write("config.json", config)
        self.write("generation_config.json", {"eos_token_id": list(range(n, 2 * n))})
        self.assertNotIn("eos_ids", self.convert(self.folder).config)

    def test_another_folder(self):
        self.write("tokenizer.json", self.json())
        synthetic.write_checkpoint(self.path("bare"), synthetic.qwen3_config(vocab_size=512),
                                   synthetic.qwen3_tensors(synthetic.qwen3_config(vocab_size=512)))
        want = self.convert(self.folder).tokenizer
        self.assertIsNone(self.convert(self.path("bare")).tokenizer)
        f = self.convert(self.path("bare"), "--tokenizer", self.folder)
        self.assertEqual(f.tokenizer, want)

    def test_chat_kinds(self):
        tools = "<tools> <tool_call>{\"name\": ...}</tool_call>"
        xml = "<tool_call> <function=example_function_name>"
        cases = (
            ("", "none"), ("{{ messages }}", "unknown"), (CHATML, "chatml"),
            (tools + CHATML, "qwen3_instruct"), ("You are Qwen" + tools + CHATML, "chatml"),
            (tools + CHATML + EMPTY_THINK, "qwen3"),
            (tools + CHATML.replace("assistant\\n", "assistant\\n<think>\\n"), "qwen3_thinking"),
            (xml + CHATML, "qwen3_coder"), (xml + CHATML + EMPTY_THINK, "qwen3_5"),
            (xml + CHATML + EMPTY_THINK.replace("false", "true"), "qwen3_5_nothinking"),
            (xml + "reasoning_effort" + CHATML + EMPTY_THINK, "qwen3_8"),
        )
        self.write("tokenizer.json", self.json())
        for template, kind in cases:
            self.assertEqual(tokenizer_file.chat_kind(template), kind, template)
        self.write("tokenizer_config.json", {"chat_template": [
            {"name": "other", "template": CHATML}, {"name": "default", "template": xml + CHATML}]})
        self.assertEqual(self.convert(self.folder).config["chat"], "qwen3_coder")
        for value in ([{"name": [], "template": ""}], [{"name": "a", "template": 1}], ["x"], {}, 1):
            self.write("tokenizer_config.json", {"chat_template": value})
            self.fails("chat_template", self.folder, self.path("out2.q3n"))
        self.write("chat_template.json", {"chat_template": CHATML})
        self.assertEqual(self.convert(self.folder).config["chat"], "chatml")
        with open(os.path.join(self.folder, "chat_template.jinja"), "w", encoding="utf-8") as f:
            f.write(tools + CHATML)
        self.assertEqual(self.convert(self.folder).config["chat"], "qwen3_instruct")

    def test_byte_map(self):
        """The map is one to one over all bytes and keeps printable ASCII."""
        chars = tokenizer_file.byte_map()
        self.assertEqual(sorted(chars.values()), list(range(256)))
        self.assertEqual([chars[c] for c in "!~\u0120\u010a"], [33, 126, 32, 10])


# ---- The program ----

BIG_VOCAB, BIG_HIDDEN = 400000, 384      # 307 MB as bf16


class Program(Case):
    def big(self):
        """A checkpoint whose embedding is a hole in the file: large, quickly made, all zeros."""
        config = synthetic.qwen3_config(vocab_size=BIG_VOCAB, hidden_size=BIG_HIDDEN)
        shapes = synthetic.qwen3_shapes(config)
        shapes["model.embed_tokens.weight"] = shapes.pop("model.embed_tokens.weight")    # last
        header, at = {}, 0
        for name, shape in shapes.items():
            n = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + n]}
            at += n
        text = json.dumps(header).encode()
        os.mkdir(self.path("big"))
        synthetic.write_json(self.path("big"), "config.json", config)
        with open(self.path("big", "model.safetensors"), "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            f.truncate(8 + len(text) + at)
        return self.path("big")

    def without(self, *modules):
        """An environment in which these modules cannot be imported."""
        folder = self.path("blocked")
        os.makedirs(folder, exist_ok=True)
        for name in modules:
            with open(os.path.join(folder, name + ".py"), "w") as f:
                f.write("raise ImportError('blocked')\n")
        return dict(os.environ, PYTHONPATH=folder)

    def run_program(self, *args, **options):
        run = subprocess.run([sys.executable, CONVERT] + list(args), stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, universal_newlines=True, **options)
        return run.returncode, run.stdout, run.stderr

    def test_standard_library_alone(self):
        """Without numpy and h5py the same bytes; where they are needed, a line that says so."""
        env = self.without("numpy", "h5py")
        probe = subprocess.run([sys.executable, "-c", "import numpy"], env=env,
                               stderr=subprocess.DEVNULL)
        self.assertNotEqual(probe.returncode, 0)
        for name, type_ in (("qwen3_next", "bf16"), ("qwen3_next", "f32"), ("qwen3_5_moe", "f16")):
            status, _, err = self.run_program(golden(name), self.path("a.q3n"), "--type", type_,
                                              env=env)
            self.assertEqual(status, 0, err)
            with open(self.path("a.q3n"), "rb") as a, \
                    open(self.convert(golden(name), "--type", type_).path, "rb") as b:
                self.assertEqual(a.read(), b.read())
        for source, expected in ((golden("qwen3_next_fp8"), "needs numpy: pip install numpy"),
                                 (golden("keras/%s.keras" % KERAS[0]), "pip install h5py")):
            status, _, err = self.run_program(source, self.path("b.q3n"), env=env)
            self.assertEqual((status, err.count("\n")), (1, 1))
            self.assertIn(expected, err)
        status, _, err = self.run_program(golden("qwen3_dense"), self.path("b.q3n"), "--lora", ".",
                                          env=env)
        self.assertIn("--lora needs numpy", err)
        self.assertFalse(os.path.exists(self.path("b.q3n")))

    def test_memory(self):
        """307 MB go through less than 120 MB beside the interpreter and numpy."""
        folder = self.big()
        code = ("import resource, sys; sys.path.insert(0, %r); import convert, numpy\n"
                "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
                "before = peak(); status = convert.main(sys.argv[1:]); "
                "print(status, peak() - before)" % TOOLS)
        for type_ in ("bf16", "f16"):
            run = subprocess.run([sys.executable, "-c", code, folder, self.path("o.q3n"), "--type",
                                  type_, "-q"], stdout=subprocess.PIPE, universal_newlines=True)
            status, kib = map(int, run.stdout.split())
            self.assertEqual(status, 0)
            self.assertLess(kib, 120 << 10)
            self.assertGreater(os.path.getsize(self.path("o.q3n")), 2 * BIG_VOCAB * BIG_HIDDEN)

    def test_signals(self):
        """Ctrl-C and SIGTERM in the middle: nothing is left, an older file is as it was."""
        folder = self.big()
        for number in (signal.SIGINT, signal.SIGTERM):
            with open(self.path("o.q3n"), "w") as f:
                f.write("older")
            run = subprocess.Popen([sys.executable, CONVERT, folder, self.path("o.q3n"), "--type",
                                    "f32", "-q"], stderr=subprocess.PIPE, universal_newlines=True)
            while len(os.listdir(self.dir)) < 3 and run.poll() is None:     # the unfinished file
                time.sleep(0.002)
            run.send_signal(number)
            _, err = run.communicate()
            self.assertEqual((run.returncode, err),
                             (128 + number, "convert.py: interrupted: nothing was written\n"))
            self.assertEqual([n for n in os.listdir(self.dir) if n != "big"], ["o.q3n"])
            with open(self.path("o.q3n")) as f:
                self.assertEqual(f.read(), "older")

    def test_failure_in_the_middle(self):
        """A file that shrinks, and a disk that fills, while it is converted."""
        folder = self.checkpoint()
        original = convert.Progress.add

        def spoil(action):
            def add(progress, n):
                action()
                original(progress, n)
            return add

        def shrink():
            os.truncate(os.path.join(folder, "model.safetensors"), 4000)

        def full():
            raise OSError(28, "No space left on device")

        for action, expected in ((full, "No space left on device"),
                                 (shrink, "found the end of the file")):
            convert.Progress.add = spoil(action)
            try:
                self.fails(expected, folder, self.path("out.q3n"))
            finally:
                convert.Progress.add = original

    def test_room(self):
        folder, usage = self.checkpoint(), shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=1000)
        try:
            self.fails(("found 1000 bytes free on the disk", "expected at least"), folder,
                       self.path("out.q3n"))
        finally:
            shutil.disk_usage = usage

    def test_progress(self):
        """A bar with rate and time left on a terminal, lines elsewhere, nothing with -q."""
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        clock, now = time.time, [100.0]
        time.time = lambda: now[0]
        try:
            for stream, expected in (
                    (Terminal(), "\r[###############---------------]  50 %  50.0 MiB of 100.0 MiB"
                                 "  5.0 MiB/s  0:10 left"),
                    (io.StringIO(), "convert.py:  50 %  50.0 MiB of 100.0 MiB  5.0 MiB/s  0:10 left"
                                    "\n")):
                now[0] = 100.0
                with contextlib.redirect_stderr(stream):
                    progress = convert.Progress(100 << 20, False)
                    now[0] += 10
                    progress.add(50 << 20)
                self.assertIn(expected, stream.getvalue())
                quiet = type(stream)()
                with contextlib.redirect_stderr(quiet):
                    convert.Progress(100 << 20, True).add(100 << 20)
                self.assertEqual(quiet.getvalue(), "")
        finally:
            time.time = clock
        status, out, err = self.run_main(golden("qwen3_dense"), self.path("o.q3n"), "-q")
        self.assertEqual((status, out, err), (0, "", ""))

    def test_tokenizer_model(self):
        status = subprocess.call([sys.executable, os.path.join(HERE, "make_tokenizer_model.py"),
                                  STORIES, self.path("o.q3n")])
        self.assertEqual(status, 0)
        with q3n_file.File(self.path("o.q3n")) as f:
            self.assertEqual((len(f.tokenizer.tokens), f.config["vocab_size"]), (4096, 151936))


if __name__ == "__main__":
    unittest.main()
