#!/usr/bin/env python3
"""Random hostile checkpoints: whatever the converter writes, the library opens.

Small sound folders are changed at random (values, types, extremes, names, deletions, copies, bytes
of the files) and converted in this process: either one error in words, or a file that opens.
Q3N_SEED and Q3N_CASES choose other and more cases than those of every run; a case that fails says
the two that repeat it alone.
"""
import contextlib
import copy
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [HERE, os.path.join(ROOT, "tools"), os.path.join(ROOT, "examples", "python")]

import convert                   # noqa: E402
import make_fuzz_corpus          # noqa: E402
import q3n_file                  # noqa: E402
import qwen3next                 # noqa: E402
import safetensors_file          # noqa: E402
import synthetic                 # noqa: E402

SEED = int(os.environ.get("Q3N_SEED", "1"))
CASES = int(os.environ.get("Q3N_CASES", "400"))
SECONDS = 60                     # of one case, which takes milliseconds: more is a hang
MEMORY = os.path.isdir("/dev/shm") and os.access("/dev/shm", os.W_OK)

NUMBERS = (0, 1, -1, 2, 3, 7, 16, 17, 255, 256, 257, 269, 270, 271, 4096, 1 << 16, (1 << 24) + 1,
           (1 << 30) + 1, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63,
           10 ** 30, -(1 << 63), 0.0, -0.0, 0.5, 1e-300, 1e300, 1.5, float("nan"), float("inf"))
TEXTS = ("", " ", "a", "he", "<|end|>", "\0", "\n", "\u0120", "\u00bd", "caf\u00e9", "e\u0301",
         "\ud800", "\U0001f600", "x" * 31, "x" * 32, "x" * 255, "x" * 256, "x" * 4096, "x" * 4097,
         "NFC", "NFKC", "ByteLevel", "Split", "BPE", "Sequence", "TemplateProcessing", "qwen3",
         "qwen3_5", "yarn", "linear", "regression", "0", "-1", "1e5", "../../x", "%s%n")


class Hang(Exception):
    """The case takes too long."""


# ---- Changes of JSON ----

def any_value(r, pool):
    kind = r.randrange(9)
    if kind < 3:
        return r.choice(NUMBERS)
    if kind < 5:
        return r.choice(TEXTS)
    if kind == 5:
        return r.choice((None, True, False, [], {}))
    if kind == 6:
        return [r.choice(NUMBERS) for _ in range(r.choice((1, 2, 17, 300)))]
    if kind == 7:
        return {r.choice(TEXTS): r.choice(NUMBERS)}
    return copy.deepcopy(r.choice(pool))         # something that stands elsewhere


def places(value, out):
    """(container, key) of everything inside value; of long containers some."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys if len(keys) < 40 else list(keys)[:20] + list(keys)[-20:]:
        out.append((value, key))
        if isinstance(value[key], (dict, list)):
            places(value[key], out)
    return out


def change_text(r, text):
    at = r.randrange(len(text) + 1)
    piece = r.choice(TEXTS)
    return r.choice((text[:at] + piece + text[at:], text[:at], text[at:], text * 2, piece,
                     text.upper()))


def change(r, value):
    """One change inside a dict or list, in place."""
    found = places(value, [])
    if not found:
        return
    owner, key = r.choice(found)
    old, kind = owner[key], r.randrange(8)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(old, str):
        owner[key] = change_text(r, old)
    elif kind == 2 and isinstance(old, (int, float)) and abs(old) < 1e300:
        owner[key] = r.choice((-old, old + 1, old - 1, float(old), str(old), [old], old * 2))
    elif kind == 3 and isinstance(owner, list):
        owner.extend([copy.deepcopy(old)] * r.choice((1, 1, 2, 20)))
    elif kind == 4 and isinstance(owner, dict):
        owner[change_text(r, key)] = owner.pop(key)
    elif kind == 5 and isinstance(owner, dict):
        owner[change_text(r, key)] = copy.deepcopy(old)
    else:
        owner[key] = any_value(r, [o[k] for o, k in found])


# ---- Sound folders ----

def dense():
    config = synthetic.qwen3_config(vocab_size=270, hidden_size=16, head_dim=8,
                                    intermediate_size=16, eos_token_id=263, pad_token_id=262)
    return config, synthetic.qwen3_tensors(config)


def yarn():
    config, tensors = dense()
    config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0,
                              "beta_slow": 1.0, "original_max_position_embeddings": 32}
    return config, tensors


def hybrid():
    rng = random.Random(1)
    config = copy.deepcopy(make_fuzz_corpus.HYBRID)
    return config, {name: synthetic.bf16_noise(rng, shape) for name, shape in
                    make_fuzz_corpus.hybrid_shapes(config).items()}


def classifier():
    config, tensors = dense()
    config.update(architectures=["Qwen3ForSequenceClassification"], problem_type="regression",
                  id2label={"0": "no", "1": "yes", "2": "caf\u00e9"})
    tensors["score.weight"] = synthetic.bf16_noise(random.Random(2), (3, 16))
    return config, tensors


def words(r):
    """The files of a tokenizer, in one of its forms."""
    t = make_fuzz_corpus.tokenizer()
    end = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}
    if r.random() < 0.5:
        t["post_processor"] = {"type": "TemplateProcessing", "single": [
            {"Sequence": {"id": "A", "type_id": 0}}, end], "pair": [], "special_tokens": {
                "<|end|>": {"id": "<|end|>", "ids": [263], "tokens": ["<|end|>"]}}}
    settings = {"eos_token": "<|end|>", "pad_token": {"content": "<think>"}, "bos_token": None,
                "additional_special_tokens": ["<|end|>"], "add_eos_token": True,
                "tokenizer_class": "Qwen2Tokenizer"}
    if r.random() < 0.5:
        settings["added_tokens_decoder"] = {str(a["id"]): a for a in t["added_tokens"]}
    out = {"tokenizer_config.json": settings,
           "special_tokens_map.json": {"eos_token": "<|end|>"},
           "generation_config.json": {"eos_token_id": [263, 262], "pad_token_id": 262}}
    if r.random() < 0.6:
        out["tokenizer.json"] = t
    else:
        out["vocab.json"] = t["model"]["vocab"]
        out["merges.txt"] = "#version: 0.2\n" + "\n".join(map(" ".join, t["model"]["merges"]))
        out["added_tokens.json"] = {a["content"]: a["id"] for a in t["added_tokens"]}
    if r.random() < 0.2:
        out["chat_template.jinja"] = "<|im_start|>"
    elif r.random() < 0.5:
        settings["chat_template"] = [{"name": "default", "template": "<|im_start|>"}]
    return out


def change_tensors(r, tensors):
    name = r.choice(list(tensors))
    dtype, shape, data = tensors[name]
    kind = r.randrange(6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[change_text(r, name)] = tensors.pop(name)
    elif kind == 2:
        tensors[name] = (r.choice(("F32", "F16", "F8_E4M3", "I64", "BOOL", "Q", "")), shape, data)
    elif kind == 3:
        tensors[name] = (dtype, r.choice(([], [0], [1 << 62, 4], list(shape) + [1], shape[::-1],
                                          [r.choice(NUMBERS)])), data)
    elif kind == 4:
        tensors[name] = (dtype, shape, data[:r.randrange(len(data) + 1)])
    else:
        at = r.randrange(len(data) // 2) * 2
        tensors[name] = (dtype, shape, data[:at] + b"\xc0\x7f" + data[at + 2:])


def write_tree(r, folder):
    """A folder with some changes in it."""
    config, tensors = r.choice((dense, yarn, hybrid, classifier))()
    tree = dict(words(r), **{"config.json": config})
    for _ in range(r.choice((1, 1, 1, 2, 3, 8))):
        name = r.choice(list(tree) + ["config.json", "tokenizer.json", "tensors"])
        if name == "tensors":
            change_tensors(r, tensors)
        elif isinstance(tree.get(name), str):
            tree[name] = change_text(r, tree[name])
        elif name in tree:
            change(r, tree[name])
    os.makedirs(folder)
    for name, value in tree.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=r.random() < 0.9)
        data = bytearray(text.encode("utf-8", "surrogatepass"))
        if r.random() < 0.03 and data:
            at = r.randrange(len(data))
            data[at:at + r.randrange(3)] = bytes(r.randrange(256) for _ in range(r.randrange(3)))
        with open(os.path.join(folder, name), "wb") as f:
            f.write(data)
    path = os.path.join(folder, "model.safetensors")
    with contextlib.suppress(ZeroDivisionError):
        synthetic.write_safetensors(path, tensors)
    if r.random() < 0.03:
        with open(path, "r+b") as f:
            f.seek(r.randrange(os.path.getsize(path)))
            f.write(struct.pack("<I", r.getrandbits(32)))


# ---- The test ----

class HostileTrees(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="q3n_", dir="/dev/shm" if MEMORY else None)
        self.addCleanup(shutil.rmtree, self.dir)
        self.definitions = q3n_file.Definitions()
        self.opened = self.refused = 0

    def arguments(self, r, folder, out):
        args = [folder, out]
        if r.random() < 0.2:
            args += ["--name", r.choice(TEXTS)]
        if r.random() < 0.1:
            args += ["--type", r.choice(("f32", "f16", "bf16"))]
        if r.random() < 0.1:
            args += ["--allow-nan"]
        if r.random() < 0.1:
            args += ["--pooling", r.choice(("first", "mean"))]
        return convert.parse_arguments(args, list(self.definitions.recipes))

    def one(self, r, top):
        folder, out = os.path.join(top, "model"), os.path.join(top, "out.q3n")
        write_tree(r, folder)
        args = self.arguments(r, folder, out)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                convert.convert(args, self.definitions)
        except q3n_file.ConvertError as e:
            self.assertTrue(str(e).strip())
            self.assertEqual(os.listdir(top), ["model"])
            self.refused += 1
        else:
            self.assertEqual(sorted(os.listdir(top)), ["model", "out.q3n"])
            self.check_open(out)
            self.opened += 1
        finally:
            safetensors_file.Store.close_all()

    def check_open(self, out):
        """The library opens it, tokenizes, and the reader of the tools agrees."""
        with qwen3next.Model(out) as model, q3n_file.File(out) as f:
            self.assertEqual(f.verify(), [])
            self.assertEqual(model.config["vocab_size"], f.config["vocab_size"])
            self.assertEqual(model.labels, f.config.get("labels"))
            if f.tokenizer is None:
                return
            around = [f.config.get("tokenizer_" + part, []) for part in ("prefix", "suffix")]
            ids = model.tokenize("hello <|end|> caf\u00e9", prefix=True, suffix=True)
            self.assertEqual(ids[:len(around[0])], around[0])
            self.assertEqual(ids[len(ids) - len(around[1]):], around[1])
            self.assertLess(max(ids), f.config["vocab_size"])

    def test_trees(self):
        def alarm(*_):
            raise Hang

        limited = hasattr(signal, "setitimer")
        if limited:
            before = signal.signal(signal.SIGALRM, alarm)
            self.addCleanup(signal.signal, signal.SIGALRM, before)
            self.addCleanup(signal.setitimer, signal.ITIMER_REAL, 0)
        for seed in range(SEED, SEED + CASES):
            with self.subTest("Q3N_SEED=%d Q3N_CASES=1" % seed):
                if limited:
                    signal.setitimer(signal.ITIMER_REAL, SECONDS)
                with tempfile.TemporaryDirectory(dir=self.dir) as top:
                    self.one(random.Random(seed), top)
        # Both outcomes are common, or the changes are no test.
        if CASES >= 100:
            self.assertGreater(self.opened, CASES // 20)
            self.assertGreater(self.refused, CASES // 4)


if __name__ == "__main__":
    unittest.main()
