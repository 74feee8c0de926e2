#!/usr/bin/env python3
"""What the converter believes: settings in two places, names, heads, adapters, hostile JSON.

Expectations marked [HF] were measured with transformers 5.17, those marked [PEFT] with peft 0.21,
on the same inputs; neither is needed here.

run: python3 tests/test_convert_config.py
"""
import json
import math
import os
import random
import re
import shlex
import shutil
import struct
import subprocess
import unittest

import numpy as np

from test_convert import Case, golden, load_json
import hf_config
import hf_names
import matrix
import q3n_file
import synthetic
from files import ConvertError

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}


def config_of(family, **changes):
    """A config with what its family must say, and no rotary settings."""
    c = {"model_type": family, "vocab_size": 50, "hidden_size": 64, "intermediate_size": 32,
         "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
         "max_position_embeddings": 256}
    if family in ("qwen3_next", "qwen3_5_text"):
        c.update(linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=8,
                 linear_value_head_dim=8)
    if family in ("qwen3_next", "qwen3_moe"):
        c.update(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    c.update(changes)
    return {k: v for k, v in c.items() if v is not GONE}


def nested(outer, **inner):
    return dict({"model_type": "qwen3_5", "text_config": config_of("qwen3_5_text", **inner)},
                **outer)


GONE = object()                          # no such key
WARNS = "warns"                          # in an expectation: the text of a warning
NEXT, MOE = "qwen3_next", "qwen3_moe"


def rope(**changes):
    return {"rope_parameters": dict(PLAIN, **changes)}


def yarn(**changes):
    return {"rope_parameters": dict(YARN, **dict({"rope_theta": 1e6}, **changes))}


# By row of the table in hf_config.py: (config, what comes of it), a text for a refusal.  [HF]
ROWS = {
    "rope set": (
        (config_of("qwen3", rope_theta=5e5, rope_scaling=YARN),
         dict(rope_type="yarn", rope_theta=5e5, rope_factor=4.0)),
        (config_of("qwen3", rope_scaling=dict(YARN, rope_theta=1e6), **rope()),
         dict(rope_type="yarn", rope_theta=1e6, max_position_embeddings=256)),
        (config_of("qwen3", rope_scaling=dict(YARN, rope_theta=2e5), **rope()),
         {"rope_theta": 2e5, WARNS: "rope_theta 1000000.0 of rope_parameters is not used"}),
        (config_of("qwen3", rope_scaling=YARN, rope_theta=5e5, **rope()),
         {"rope_theta": 5e5, WARNS: "rope_theta 1000000.0 of rope_parameters is not used"}),
        (config_of("qwen3", rope_scaling=YARN, **rope(rope_theta=1e4)),
         {"rope_type": "yarn", "rope_theta": 1e4, WARNS: "no rope_theta, using 10000"}),
        (config_of("qwen3", rope_scaling=YARN, **rope()), "rope_theta: found 1000000.0, expected "
         "10000.0: rope_scaling replaces rope_parameters"),
        (config_of(NEXT, rope_scaling=YARN, rope_theta=1e6, **rope(partial_rotary_factor=0.5)),
         "partial_rotary_factor: found 0.5, expected 0.25: rope_scaling replaces"),
        (config_of("qwen3", rope_scaling={"rope_type": "default", "rope_theta": 1e6}, **yarn()),
         {"rope_type": "default", WARNS: "factor 4.0 of rope_parameters is not used"}),
        (config_of("qwen3", rope_scaling={}, **yarn()), dict(rope_type="yarn")),
        (config_of("qwen3", rope_scaling=None, **yarn()), dict(rope_type="yarn")),
        (config_of("qwen3", rope_scaling="yarn"), "rope_scaling: found 'yarn', expected an object"),
    ),
    "rope by layer": tuple(
        (config_of(family, rope_parameters={"full_attention": PLAIN}),
         "full_attention: found {'rope_type': 'default'") for family in ("qwen3", NEXT, MOE)),
    "rope type": (
        (config_of("qwen3", rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2}),
         dict(rope_type="linear", rope_factor=2.0)),
        (config_of("qwen3", rope_theta=1e6, rope_scaling=dict(YARN, type="linear")),
         {"rope_type": "yarn", WARNS: "type 'linear' is not used: 'yarn' counts"}),
        (config_of("qwen3", rope_theta=1e6, rope_scaling=dict(YARN, type="yarn", rope_type=None)),
         "rope_type: found None"),
        (config_of("qwen3", rope_theta=1e6, rope_scaling={"factor": 4.0}),
         dict(rope_type="default", rope_factor=1.0)),
    ),
    "rope_theta": (
        (config_of("qwen3", rope_theta=5e5, **rope()),
         {"rope_theta": 1e6, WARNS: "rope_theta 500000.0 is not used"}),
        (config_of("qwen3", rope_theta=5e5, rope_parameters={"rope_type": "default"}),
         dict(rope_theta=5e5)),
        (config_of("qwen3", rope_theta=1000000), dict(rope_theta=1e6)),
        (config_of("qwen3"), {"rope_theta": 10000.0, WARNS: "no rope_theta, using 10000"}),
        (config_of("qwen3", rope_theta=None), "rope_theta: found None, expected a number"),
        (config_of("qwen3", rope_theta=5e5, **rope(rope_theta=None)), "rope_theta: found None"),
        (config_of("qwen3", rope_theta="1e6"), "rope_theta: found '1e6', expected a number"),
        (config_of("qwen3", **yarn(rope_theta=1)), "rope_theta: found 1, expected a number above"),
        (config_of("qwen3", rope_theta=-5), "rope_theta: found -5, expected a number above 1"),
        (config_of("qwen3", rope_theta=True), "rope_theta: found True, expected a number"),
    ),
    "rotary factor": (
        (config_of(NEXT, **rope()), dict(rotary_dim=8)),
        (config_of(NEXT, partial_rotary_factor=0.5, **rope()), dict(rotary_dim=16)),
        (config_of(NEXT, partial_rotary_factor=0.5, **rope(partial_rotary_factor=0.75)),
         {"rotary_dim": 24, WARNS: "partial_rotary_factor 0.5 is not used: 0.75 counts"}),
        (config_of(NEXT, partial_rotary_factor=None, **rope()), dict(rotary_dim=32)),
        (config_of(NEXT, **rope(partial_rotary_factor=None)), "partial_rotary_factor: found None"),
        (config_of(NEXT, **yarn(partial_rotary_factor=1)), dict(rotary_dim=32)),
        (config_of("qwen3", **rope(partial_rotary_factor=0.5)),
         {"rotary_dim": 32, WARNS: "partial_rotary_factor 0.5 is not used"}),
        (config_of(MOE, partial_rotary_factor=0.5, **rope()),
         {"rotary_dim": 32, WARNS: "partial_rotary_factor 0.5 is not used"}),
        (config_of("qwen3", **yarn(partial_rotary_factor=0.5)),
         "partial_rotary_factor: found 0.5, expected 1"),
    ),
    "yarn original": (
        (config_of("qwen3", **yarn()), dict(rope_original_max_position=64)),
        (config_of("qwen3", original_max_position_embeddings=32, **yarn()),
         {"rope_original_max_position": 32,
          WARNS: "rope_parameters: original_max_position_embeddings 64 is not used: 32 counts"}),
        (config_of("qwen3", rope_parameters={"rope_type": "yarn", "factor": 4, "rope_theta": 1e6}),
         dict(rope_original_max_position=256, max_position_embeddings=1024)),
        (config_of("qwen3", **yarn(original_max_position_embeddings=128.0)),
         dict(rope_original_max_position=128, max_position_embeddings=512)),
        (config_of("qwen3", **yarn(original_max_position_embeddings=64.5)), "found 64.5"),
        (config_of("qwen3", **yarn(original_max_position_embeddings=None)), "found None"),
        (config_of("qwen3", **yarn(original_max_position_embeddings=0)), "found 0"),
        (config_of("qwen3", **yarn(original_max_position_embeddings=True)), "found True"),
        (config_of("qwen3", original_max_position_embeddings=None, **yarn()), "found None"),
    ),
    "yarn optional": (
        (config_of("qwen3", **yarn(factor=None)), dict(rope_factor=4.0)),
        (config_of("qwen3", max_position_embeddings=128, **yarn(factor=None)),
         dict(rope_factor=2.0, max_position_embeddings=128)),
        (config_of("qwen3", max_position_embeddings=32, **yarn(factor=None)), "factor: found None"),
        (config_of("qwen3", **yarn(factor=4)), dict(rope_factor=4.0)),
        (config_of("qwen3", rope_parameters={"rope_type": "yarn"}), "factor: found None"),
        (config_of("qwen3", **yarn(beta_fast=0, beta_slow=0.0)),
         dict(rope_beta_fast=32.0, rope_beta_slow=1.0)),
        (config_of("qwen3", **yarn(beta_fast=None, beta_slow=None)),
         dict(rope_beta_fast=32.0, rope_beta_slow=1.0)),
        (config_of("qwen3", **yarn(beta_fast=16, beta_slow=2)),
         dict(rope_beta_fast=16.0, rope_beta_slow=2.0)),
        (config_of("qwen3", **yarn(beta_fast=1, beta_slow=32)), "beta_fast: found 1, expected at"),
        (config_of("qwen3", **yarn(beta_slow=-1.0)), "beta_fast: found None"),
        (config_of("qwen3", **yarn(attention_factor=None)), dict(rope_attention_factor=0.0)),
        (config_of("qwen3", **yarn(attention_factor=2)), dict(rope_attention_factor=2.0)),
        (config_of("qwen3", **yarn(attention_factor=0)), "attention_factor: found 0, expected a"),
        (config_of("qwen3", **yarn(mscale=0.7)), dict(rope_attention_factor=0.0)),
        (config_of("qwen3", **yarn(mscale=0, mscale_all_dim=1)), dict(rope_attention_factor=0.0)),
        (config_of("qwen3", **yarn(mscale=2, mscale_all_dim=1.0)), dict(
            rope_attention_factor=(0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1))),
        (config_of("qwen3", **yarn(mscale=2, mscale_all_dim=1.0, factor=1)),
         dict(rope_attention_factor=0.0)),
        (config_of("qwen3", **yarn(mscale=-9, mscale_all_dim=1.0)), "mscale: found -9"),
        (config_of("qwen3", **yarn(truncate=True)), dict(rope_type="yarn")),
        (config_of("qwen3", **yarn(truncate=False)), "truncate: found False, expected true"),
        (config_of("qwen3", **yarn(truncate=None)), "truncate: found None, expected true"),
    ) + tuple((config_of("qwen3", **yarn(**{key: value})), "%s: found %r" % (key, value))
              for key in ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale",
                          "mscale_all_dim") for value in (True, False, "8", "", [1], {})),
    "experts": (
        (config_of(MOE, num_local_experts=2, **rope()),
         {"num_experts": 2, WARNS: "num_experts 4 is not used: 2 counts"}),
        (config_of(MOE, num_experts=GONE, num_local_experts=2, **rope()), dict(num_experts=2)),
        (config_of(MOE, num_experts=GONE, **rope()), "num_experts: found None"),
        (config_of(NEXT, num_local_experts=2, **rope()),
         {"num_experts": 4, WARNS: "num_local_experts 2 is not used: 4 counts"}),
        (config_of(NEXT, num_experts=GONE, num_local_experts=2, **rope()), "num_experts"),
    ),
    "layer kinds": (
        (config_of(NEXT, **rope()), dict(layer_types=[1, 1, 1, 0])),
        (config_of(NEXT, full_attention_interval=2, **rope()), dict(layer_types=[1, 0, 1, 0])),
        (config_of(NEXT, full_attention_interval=2, layer_types=["linear_attention"] * 4, **rope()),
         {"layer_types": [1] * 4, WARNS: "full_attention_interval 2 is not used"}),
        (config_of(NEXT, layer_types=["attention"] * 4, **rope()), dict(layer_types=[0] * 4)),
        (config_of(NEXT, layer_types=["linear"] * 4, **rope()), "layer_types"),
        (config_of("qwen3", layer_types=["attention"] * 4, **rope()), "layer_types"),
    ),
    "sliding window": (
        (config_of("qwen3", use_sliding_window=True, **rope()), dict(layer_types=[0] * 4)),
        (config_of("qwen3", use_sliding_window=True, max_window_layers=4, sliding_window=16,
                   **rope()), dict(layer_types=[0] * 4)),
        (config_of("qwen3", use_sliding_window=True, max_window_layers=3, sliding_window=16,
                   **rope()), "sliding-window attention in use, of 16 tokens, expected"),
        (config_of("qwen3", use_sliding_window=True, max_window_layers=0, sliding_window=256,
                   **rope()), dict(layer_types=[0] * 4)),
        (config_of("qwen3", use_sliding_window=True, max_window_layers=0, **rope()),
         dict(layer_types=[0] * 4)),
        (config_of("qwen3", use_sliding_window=True, max_window_layers=0,
                   max_position_embeddings=4097, **rope()), "of 4096 tokens"),
        (config_of("qwen3", use_sliding_window=True, max_window_layers=0, sliding_window=256,
                   **yarn(original_max_position_embeddings=256)), "the whole context, 1024 tokens"),
        (config_of("qwen3", use_sliding_window=True, num_hidden_layers=29,
                   max_position_embeddings=8192, **rope()), "of 4096 tokens"),
        (config_of("qwen3", use_sliding_window=True, max_window_layers=0, sliding_window=16,
                   layer_types=["full_attention"] * 4, **rope()), dict(layer_types=[0] * 4)),
        (config_of("qwen3", layer_types=["sliding_attention"] * 4, sliding_window=16, **rope()),
         "sliding-window attention in use"),
        (config_of("qwen3", use_sliding_window=True, max_window_layers=0, sliding_window=None,
                   **rope()), dict(layer_types=[0] * 4)),
        (config_of(MOE, use_sliding_window=True, sliding_window=16, **rope()), "of 16 tokens"),
        (config_of(MOE, use_sliding_window=True, max_position_embeddings=5000, **rope()),
         "of 4096 tokens"),
        (config_of(MOE, use_sliding_window=False, sliding_window=16, **rope()),
         dict(layer_types=[0] * 4)),
        (config_of(NEXT, use_sliding_window=True, sliding_window=16, **rope()),
         dict(layer_types=[1, 1, 1, 0])),
    ),
    "head_dim": (
        (config_of("qwen3", head_dim=GONE, **rope()), dict(head_dim=128)),
        (config_of("qwen3", head_dim=None, **rope()), "head_dim: found None"),
        (config_of(NEXT, head_dim=GONE, **rope()), dict(head_dim=256)),
        (config_of(MOE, head_dim=GONE, **rope()), dict(head_dim=32)),
        (config_of(MOE, head_dim=None, **rope()), dict(head_dim=32)),
        (config_of("qwen3", num_key_value_heads=None, **rope()), dict(num_key_value_heads=2)),
        (config_of(NEXT, num_key_value_heads=GONE, **rope()), dict(num_key_value_heads=2)),
    ),
    "text_config": (
        (nested({}, **rope()), dict(rope_theta=1e6)),
        (nested({"rms_norm_eps": 0.5, "hidden_size": 7}, **rope()),
         {"rms_norm_eps": 1e-6, "hidden_size": 64, WARNS: "rms_norm_eps 0.5 is not used"}),
        (nested({"rope_theta": 5.0}), {"rope_theta": 1e4, WARNS: "rope_theta 5.0 is not used"}),
        (nested({"rope_scaling": YARN}, **rope()), "rope_scaling: found {'rope_type': 'yarn'"),
        (nested({"rope_scaling": None, "rope_parameters": {}}, **rope()), dict(rope_theta=1e6)),
        (nested({"rope_parameters": PLAIN}), "expected it in text_config, where it counts"),
        (nested({"eos_token_id": 3}, eos_token_id=4, **rope()),
         {WARNS: "eos_token_id 4 of text_config is not used: the top level counts"}),
        (nested({"text_config": []}), "text_config: found [], expected an object"),
    ),
}
ROWS["model_type"] = (
    (nested({}, **rope()), dict(family="qwen3_5")),
    (nested({"model_type": "qwen3"}, **rope()),
     {"family": "qwen3", WARNS: "model_type 'qwen3_5_text' of text_config is not used"}),
    (nested({"model_type": "llava"}, **rope()), dict(family="qwen3_5")),
    (nested({"model_type": None}, **rope()), dict(family="qwen3_5")),
    (nested({"model_type": "llava"}, model_type="llama", **rope()), "model_type: found 'llama'"),
    (config_of([]), "model_type: found []"),
)
# Rows that need tensors or other files have tests of their own below.
ELSEWHERE = ("tying", "dtype", "labels", "eos", "bos", "pad")


class TwoPlaces(Case):
    """The table in hf_config.py, row by row."""

    def test_the_table_is_walked(self):
        table = re.search(r"SETTING +PLACES.*\n((?:.+\n)+)", hf_config.__doc__).group(1)
        rows = [line[4:19].strip() for line in table.splitlines() if line[4:5].strip()]
        self.assertEqual(rows, [row for row in rows if row in ROWS or row in ELSEWHERE])
        self.assertEqual(sorted(rows), sorted(list(ROWS) + list(ELSEWHERE)))

    def test_rows(self):
        definitions = q3n_file.Definitions()
        for row, cases in ROWS.items():
            for config, expected in cases:
                with self.subTest(row, config=config):
                    self.check(json.loads(json.dumps(config)), expected, definitions)

    def check(self, config, expected, definitions):
        warnings = []
        if isinstance(expected, str):
            with self.assertRaises(ConvertError) as e:
                hf_config.read(config, "config.json", warnings)
            self.assertIn(expected, str(e.exception))
            self.assertNotIn("\n", str(e.exception))
            return
        got = hf_config.read(config, "config.json", warnings)
        definitions.check_config(got)    # whatever is accepted, the library takes
        for key, value in expected.items():
            if key == WARNS:
                self.assertTrue(any(value in w for w in warnings), warnings)
            elif isinstance(value, float):
                self.assertAlmostEqual(got[key], value, places=12, msg=key)
            else:
                self.assertEqual(got[key], value, key)
        if WARNS not in expected:
            self.assertEqual(warnings, [])

    def test_limits(self):
        definitions = q3n_file.Definitions()
        self.assertEqual(hf_config.MAX_LAYERS, definitions.fields["num_hidden_layers"].most)

    def test_dtype(self):
        """A tensor's own type counts, whatever dtype and torch_dtype say."""
        for keys in ({}, {"dtype": "float16"}, {"torch_dtype": "float32", "dtype": "float16"}):
            f = self.convert(self.checkpoint("model", synthetic.qwen3_config(**keys)))
            self.assertEqual(f.tensors["embed_tokens.weight"].type.name, "bf16")

    def test_tying(self):
        """[HF] The top level alone ties; without its key nothing is tied."""
        inner = load_json(golden("qwen3_5_moe_vl"), "config.json")
        shutil.copytree(golden("qwen3_5_moe_vl"), self.path("m"))
        for outer, within, tied in ((True, False, 1), (True, None, 1), (False, True, 0),
                                    (None, True, 0), (None, None, 0), (False, False, 0)):
            c = json.loads(json.dumps(inner))
            for place, value in ((c, outer), (c["text_config"], within)):
                place.pop("tie_word_embeddings", None)
                if value is not None:
                    place["tie_word_embeddings"] = value
            part = hf_config.text_part(c, "c")
            self.assertEqual(part.flag("tie_word_embeddings"), tied)
            warnings = []
            hf_config.read(c, "c", warnings)
            self.assertEqual(any("tie_word_embeddings" in w for w in warnings),
                             within is not None and bool(within) != bool(tied))

    def test_labels(self):
        """The rows of score.weight count, whatever num_labels and id2label say."""
        shutil.copytree(golden("qwen3_next_cls"), self.path("m"))
        config = load_json(golden("qwen3_next_cls"), "config.json")
        for keys in ({"num_labels": 7}, {"id2label": None}):
            synthetic.write_json(self.path("m"), "config.json", dict(config, **keys))
            self.assertEqual(self.convert(self.path("m")).config["num_labels"], 3)

    def ids(self, config=None, generation=None, tokenizer=None):
        folder = self.checkpoint("ids", config=config or synthetic.qwen3_config())
        for name, value in (("generation_config.json", generation),
                            ("tokenizer_config.json", tokenizer)):
            if os.path.exists(os.path.join(folder, name)):
                os.remove(os.path.join(folder, name))
            if value is not None:
                synthetic.write_json(folder, name, value)
        c = self.convert(folder).config
        return c.get("eos_ids"), c.get("bos_id"), c.get("pad_id")

    def test_special_ids(self):
        both = synthetic.qwen3_config(eos_token_id=3, bos_token_id=1, pad_token_id=2)
        self.assertEqual(self.ids(both), ([3], 1, 2))
        self.assertEqual(self.ids(both, {"eos_token_id": [4, 5]}), ([4, 5], 1, 2))
        self.assertIn("warning", self.messages)
        self.assertIn("eos_token_id 3 is not used: generation_config.json has another",
                      self.messages)
        self.assertEqual(self.ids(both, {"eos_token_id": [4, 3]})[0], [4, 3])
        self.assertNotIn("warning", self.messages)
        self.assertEqual(self.ids(both, {}), ([3], 1, 2))
        self.assertEqual(self.ids(synthetic.qwen3_config(), {"pad_token_id": 6, "bos_token_id": 5}),
                         (None, 5, 6))
        self.assertEqual(self.ids(synthetic.qwen3_config(eos_token_id=[3, 64, 3]))[0], [3])
        self.assertIn("eos_token_id 64 is not used: vocab_size is 64", self.messages)
        # [HF] of a nested config the top level counts, then text_config
        for outer, inner, want in ((3, 4, [3]), (None, 4, [4]), (3, None, [3])):
            c = nested({"eos_token_id": outer}, eos_token_id=inner)
            self.assertEqual(hf_config.text_part(c, "c").values.get("eos_token_id"), want[0])


class Set(Case):
    """--set K=V: what counts is overridden, or it is an error."""

    def plan(self, config, *items, **files):
        folder = self.checkpoint("set", config, synthetic.qwen3_tensors(synthetic.qwen3_config()))
        for name, value in files.items():
            synthetic.write_json(folder, name + ".json", value)
        args = [a for item in items for a in ("--set", item)]
        return folder, args

    def used(self, key, value, config, *items, **files):
        folder, args = self.plan(config, *items, **files)
        self.assertEqual(self.convert(folder, *args).config[key], value)
        for name in files:
            os.remove(os.path.join(folder, name + ".json"))

    def test_each_place(self):
        flat = synthetic.qwen3_config
        deep = {"model_type": "qwen3", "text_config": flat(), "tie_word_embeddings": True}
        cases = (
            ("rope_theta", 5.0, flat(), "rope_theta=5"),
            ("rope_theta", 5.0, flat(rope_theta=GONE), "rope_theta=5"),
            ("rope_theta", 5.0, flat(rope_parameters=PLAIN), "rope_theta=5"),
            ("rope_theta", 5.0, flat(rope_scaling=dict(YARN, rope_theta=1e6)), "rope_theta=5"),
            ("rope_factor", 8.0, flat(rope_scaling=YARN), "factor=8"),
            ("rope_original_max_position", 32, flat(rope_scaling=YARN),
             "original_max_position_embeddings=32"),
            ("rope_type", "linear", flat(rope_parameters=PLAIN),
             'rope_scaling={"type":"linear","factor":2,"rope_theta":5}'),
            ("rope_type", "default", flat(rope_scaling=YARN), 'rope_parameters={"rope_theta":5}'),
            ("rms_norm_eps", 0.5, deep, "rms_norm_eps=0.5"),
            ("rope_theta", 7.0, deep, "rope_theta=7"),
            ("max_position_embeddings", 99, deep, "max_position_embeddings=99"),
        )
        for key, value, config, item in cases:
            with self.subTest(item, config=config):
                self.used(key, value, {k: v for k, v in config.items() if v is not GONE}, item)

    def test_generation_config(self):
        for key, item, value in (("eos_ids", "eos_token_id=[8,9]", [8, 9]),
                                 ("bos_id", "bos_token_id=8", 8), ("pad_id", "pad_token_id=8", 8)):
            self.used(key, value, synthetic.qwen3_config(), item, generation_config={
                "eos_token_id": 3, "bos_token_id": 3, "pad_token_id": 3})
        folder, args = self.plan(synthetic.qwen3_config(), "eos_token_id=null",
                                 generation_config={"eos_token_id": 3})
        self.assertNotIn("eos_ids", self.convert(folder, *args).config)
        self.fails(("eos_token_id", "expected ids below vocab_size, 64"), folder,
                   self.path("o.q3n"), "--set", "eos_token_id=64")

    def test_what_is_not_used_is_an_error(self):
        deep = {"model_type": "qwen3", "text_config": synthetic.qwen3_config(),
                "tie_word_embeddings": True}
        for config in (synthetic.qwen3_config(), deep):
            for item in ("rope_tehta=5", "linear_num_key_heads=4", "factor=2", "num_experts=8",
                         "num_mtp_layers=0", "norm_topk_prob=true", "dtype=float16",
                         "text_config.rope_theta=5"):
                folder, args = self.plan(config, item)
                key = item.split("=")[0]
                self.fails("--set %s: found a key that qwen3 does not use" % key, folder,
                           self.path("o.q3n"), *args)
        folder, args = self.plan(synthetic.qwen3_config(layer_types=["full_attention"]),
                                 "full_attention_interval=1")
        self.fails("--set full_attention_interval", folder, self.path("o.q3n"), *args)
        folder, args = self.plan(synthetic.qwen3_config(), "rms_norm_epsilon=1e-5")
        self.fails("such as rms_norm_eps", folder, self.path("o.q3n"), *args)
        text = json.dumps(synthetic.qwen3_config())
        folder, args = self.plan(deep, "rope_theta=9", "text_config=" + text)
        self.assertEqual(self.convert(folder, *args).config["rope_theta"], 9.0)
        folder, args = self.plan(synthetic.qwen3_config(), "partial_rotary_factor=0.5")
        self.fails("partial_rotary_factor: found 0.5", folder, self.path("o.q3n"), *args)

    def test_moe(self):
        """[HF] num_local_experts counts, so this is what num_experts overrides."""
        config = load_json(golden("qwen3_moe"), "config.json")
        self.assertIn("num_local_experts", config)
        for key in ("num_experts", "num_local_experts"):
            c = hf_config.override(config, {key: 2, "num_experts_per_tok": 1}, "c")
            self.assertEqual(hf_config.read(c, "c", [])["num_experts"], 2)

    def test_keras(self):
        path = golden(os.path.join("keras", "seed_patched_real_rope.keras"))
        self.assertEqual(self.convert(path, "--set", "norm_eps=0.5").config["rms_norm_eps"], 0.5)
        self.assertEqual(self.convert(path, "--set", "eos_token_id=5").config["eos_ids"], [5])
        self.fails("--set norm_epsilon", path, self.path("o.q3n"), "--set", "norm_epsilon=0.5")


class Prefixes(Case):
    """Names under any prefix, and refusals that can be read."""

    PREFIXES = ("model.language_model.", "model.language_model.language_model.",
                "language_model.model.", "_orig_mod.model.", "module.model.", "model._orig_mod.",
                "base_model.model.model.", "0.auto_model.", "module._orig_mod.module.", "x.y.z.",
                "_fsdp_wrapped_module.model._fsdp_wrapped_module.", "transformer.", "")

    def test_trunk(self):
        config = synthetic.qwen3_config()
        tensors = synthetic.qwen3_tensors(config)
        f = self.convert(self.checkpoint("model", config, tensors))
        want = {name: f.data(name) for name in f.tensors}
        self.assertNotIn("tensor names", self.messages)
        for prefix in self.PREFIXES:
            with self.subTest(prefix):
                f = self.convert(self.checkpoint("model", config, {
                    n.replace("model.", prefix, 1): t for n, t in tensors.items()}))
                self.assertEqual({name: f.data(name) for name in f.tensors}, want)
                self.assertIn("the prefix " + prefix if prefix else "no prefix", self.messages)
                self.assertNotIn("warning", self.messages)

    def test_every_tensor(self):
        """Heads and the MTP module, wherever a wrapper puts them."""
        for name in ("qwen3_next_mtp", "qwen3_next_cls"):
            shutil.copytree(golden(name), self.path(name))
            folder = self.path(name)
            f = self.convert(folder)
            want = {n: f.data(n) for n in f.tensors}
            entries = {}
            for file in [n for n in os.listdir(folder) if ".safetensors" in n]:
                if file.endswith(".safetensors"):
                    entries.update(q3n_entries(os.path.join(folder, file)))
                os.remove(os.path.join(folder, file))
            for wrap in (lambda n: "_orig_mod." + n, lambda n: "module." + n,
                         lambda n: "model." + n if n.startswith(("mtp.", "score.")) else n,
                         lambda n: "language_model." + n,
                         lambda n: n.replace(".layers.", ".layers._orig_mod.", 1).replace(
                             ".mlp.", "._checkpoint_wrapped_module.mlp.")):
                synthetic.write_safetensors(os.path.join(folder, "model.safetensors"),
                                            {wrap(n): t for n, t in entries.items()})
                f = self.convert(folder)
                self.assertEqual({n: f.data(n) for n in f.tensors}, want)
                self.assertNotIn("warning", self.messages)

    def test_which_of_several(self):
        def prefix(*names):
            return hf_names.Names(names, "w").prefix

        layers = ["layers.%d.mlp.up_proj.weight" % i for i in range(9)]
        self.assertEqual(prefix(*["ema." + n for n in layers] + ["model." + n for n in layers]),
                         "model.")
        self.assertEqual(prefix("embed_tokens.weight", *["a.b." + n for n in layers]), "a.b.")
        self.assertEqual(prefix("visual.layers.0.x", "mtp.layers.0.mlp.up_proj.weight"), "model.")
        with self.assertRaisesRegex(ConvertError, "w: found the tensors of two models, a.* b"):
            prefix(*["a." + n for n in layers] + ["b." + n for n in layers])
        names = hf_names.Names(["a.model." + n for n in layers], "w")
        for name, plain in (("a.model.norm.weight", "model.norm.weight"),
                            ("a.lm_head.weight", "lm_head.weight"),
                            ("lm_head.weight_scale_inv", "lm_head.weight_scale_inv"),
                            ("a.model.mtp.fc.weight", "mtp.fc.weight"),
                            ("a.visual.blocks.0.weight", None), ("other.weight", "other.weight"),
                            ("a.model.layers.0.score.weight", "model.layers.0.score.weight")):
            self.assertEqual(names.plain(name), plain)

    def test_refusal(self):
        """Counts, examples of what was expected and of what is there, in 20 lines at most."""
        config = synthetic.qwen3_config(num_hidden_layers=200)
        tensors = {"transformer.h.%d.attn.c_attn.weight" % i: ("BF16", (1,), b"12")
                   for i in range(300)}
        status, _, err = self.run_main(self.checkpoint("model", config, tensors),
                                       self.path("o.q3n"))
        self.assertEqual(status, 1)
        self.assertLessEqual(len(err.splitlines()), 20)
        for text in ("found 2202 of the model's tensors missing and 0 of another shape or type",
                     "model.embed_tokens.weight: found nothing, expected [64, 32]",
                     "found 300 tensors that have no place in the model",
                     "transformer.h.0.attn.c_attn.weight"):
            self.assertIn(text, err)


def q3n_entries(path):
    """{name: (dtype, shape, bytes)} of a safetensors file, parsed here."""
    with open(path, "rb") as f:
        (n,) = struct.unpack("<Q", f.read(8))
        header, data = json.loads(f.read(n)), f.read()
    header.pop("__metadata__", None)
    return {k: (v["dtype"], tuple(v["shape"]), data[slice(*v["data_offsets"])])
            for k, v in header.items()}


class Files(Case):
    """Which files of a folder count."""

    def mtp(self):
        """(folder, trunk's tensors, the module's) of a model with an MTP module."""
        shutil.copytree(golden("qwen3_next_mtp"), self.path("m"))
        tensors = {}
        for name in sorted(os.listdir(self.path("m"))):
            if name.endswith(".safetensors"):
                tensors.update(q3n_entries(self.path("m", name)))
            if ".safetensors" in name:
                os.remove(self.path("m", name))
        mtp = {n: t for n, t in tensors.items() if n.startswith("mtp.")}
        return self.path("m"), {n: t for n, t in tensors.items() if n not in mtp}, mtp

    def write(self, folder, name, tensors):
        synthetic.write_safetensors(os.path.join(folder, name), tensors)

    def test_stale_index(self):
        """[HF] model.safetensors comes before an index beside it."""
        folder = self.checkpoint()
        f = self.convert(folder)
        want = {n: f.data(n) for n in f.tensors}
        index = {"metadata": {}, "weight_map": {"model.norm.weight": "gone.safetensors"}}
        synthetic.write_json(folder, "model.safetensors.index.json", index)
        f = self.convert(folder)
        self.assertEqual({n: f.data(n) for n in f.tensors}, want)
        self.assertIn("found model.safetensors.index.json beside model.safetensors: not used",
                      self.messages)

    def test_mtp_outside_the_index(self):
        folder, trunk, mtp = self.mtp()
        want = self.convert(golden("qwen3_next_mtp"))
        for index in (True, False):
            shard = "model-00001-of-00001.safetensors" if index else "model.safetensors"
            self.write(folder, shard, trunk)
            self.write(folder, "model_mtp.safetensors", mtp)
            with open(os.path.join(folder, "other.safetensors"), "wb") as f:
                f.write(b"a download that stopped")
            if index:
                synthetic.write_json(folder, "model.safetensors.index.json", {
                    "metadata": {}, "weight_map": {n: shard for n in trunk}})
            f = self.convert(folder)
            self.assertEqual({n: f.data(n) for n in f.tensors},
                             {n: want.data(n) for n in want.tensors})
            self.assertIn("model_mtp.safetensors: an MTP module", self.messages)
            self.assertIn("passed over: other.safetensors", self.messages)
            self.assertEqual(self.convert(folder, "--no-mtp").config["num_mtp_layers"], 0)
            os.remove(os.path.join(folder, shard))

    def test_partial_mtp(self):
        folder, trunk, mtp = self.mtp()
        del mtp["mtp.fc.weight"], mtp["mtp.norm.weight"]
        self.write(folder, "model.safetensors", dict(trunk, **mtp))
        status, _, err = self.run_main(folder, self.path("o.q3n"))
        self.assertEqual((status, len(err.splitlines()), err.count("--no-mtp")), (1, 2, 1), err)
        self.assertIn("mtp.fc.weight: found nothing", err)
        f = self.convert(folder, "--no-mtp")
        self.assertEqual(f.config["num_mtp_layers"], 0)
        self.assertEqual([n for n in f.tensors if n.startswith("mtp")], [])
        self.assertIn("skipped %d tensors (--no-mtp)" % len(mtp), self.messages)


class Heads(Case):
    """Models without lm_head."""

    def test_headless(self):
        config = synthetic.qwen3_config(tie_word_embeddings=False)
        tensors = {n[len("model."):]: t for n, t in synthetic.qwen3_tensors(config).items()
                   if n != "lm_head.weight"}
        folder = self.checkpoint("model", config, tensors)
        self.fails(("lm_head.weight: found nothing, expected [64, 32]",
                    "--set tie_word_embeddings=true"), folder, self.path("o.q3n"))
        f = self.convert(folder, "--set", "tie_word_embeddings=true")
        self.assertEqual(f.config["tie_word_embeddings"], 1)
        self.assertNotIn("lm_head.weight", f.tensors)

    def test_always_gated(self):
        c = dict(load_json(golden("qwen3_5"), "config.json"), attn_output_gate=False)
        with self.assertRaisesRegex(ConvertError, "attn_output_gate: found False, expected true"):
            hf_config.read(c, "c", [])

    def test_settings_that_change_the_model(self):
        for key, value in (("per_layer_config", {"0": {"head_dim": 8}}),
                           ("transformers_weights", "other.safetensors")):
            with self.assertRaisesRegex(ConvertError, key):
                hf_config.read(config_of("qwen3", **{key: value}), "c", [])


class Adapters(Case):
    """What an adapter may hold beside pairs for the trunk's matrices.  [PEFT]"""

    def setUp(self):
        Case.setUp(self)
        self.rng = np.random.default_rng(6)

    def random(self, *shape):
        return self.rng.normal(0, 0.1, shape).astype("<f4")

    def base(self, **changes):
        self.settings = synthetic.qwen3_config(**changes)
        self.tensors = {n: np.frombuffer(bytes(matrix.convert(d, "bf16", "f32")), "<f4").reshape(s)
                        for n, (_, s, d) in synthetic.qwen3_tensors(self.settings).items()}
        return self.checkpoint("model", self.settings)

    def adapter(self, tensors, **config):
        os.makedirs(self.path("lora"), exist_ok=True)
        synthetic.write_json(self.path("lora"), "adapter_config.json", dict(
            {"peft_type": "LORA", "r": 4, "lora_alpha": 8}, **config))
        synthetic.write_safetensors(self.path("lora", "adapter_model.safetensors"), {
            "base_model.model." + n: ("F32", x.shape, x.tobytes()) for n, x in tensors.items()})
        return self.path("lora")

    def merged(self, tensors, **config):
        return self.convert(self.path("model"), "--type", "f32", "--lora",
                            self.adapter(tensors, **config))

    def near(self, f, name, want):
        got = np.frombuffer(f.data(name), "<f4").reshape(want.shape)
        self.assertLess(np.abs(got - want).max(), 1e-6)

    def test_score_on_a_causal_base(self):
        """task_type SEQ_CLS: the adapter brings the head, saved in full."""
        score = self.random(3, 32)
        for tied in (True, False):
            self.base(tie_word_embeddings=tied)
            for name in ("score.weight", "score.modules_to_save.default.weight"):
                f = self.merged({name: score}, task_type="SEQ_CLS",
                                modules_to_save=["classifier", "score"])
                self.assertEqual((f.config["num_labels"], f.config["pooling"]), (3, "last"))
                self.near(f, "score.weight", score)

    def test_tied(self):
        """Of a tied model an adapter changes the head or the embedding, not both."""
        self.base(tie_word_embeddings=True)
        e = self.tensors["model.embed_tokens.weight"]
        a, b = self.random(4, 32), self.random(64, 4)
        whole = self.random(64, 32)
        embed_a, embed_b = self.random(4, 64), self.random(32, 4)
        lifted = e + 2 * (embed_b @ embed_a).T
        cases = (
            ({"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b}, {}, e, e + 2 * b @ a),
            ({"model.embed_tokens.lora_embedding_A": embed_a,
              "model.embed_tokens.lora_embedding_B": embed_b}, {}, lifted, e),
            ({"lm_head.weight": whole}, {"modules_to_save": ["lm_head"]}, e, whole),
            ({"model.embed_tokens.weight": whole}, {"modules_to_save": ["embed_tokens"]}, whole, e),
            ({"model.embed_tokens.weight": whole}, {}, whole, None),
            ({"model.embed_tokens.weight": whole, "lm_head.weight": whole}, {}, whole, None),
            ({"model.embed_tokens.weight": whole, "lm_head.weight": b @ a},
             {"modules_to_save": ["embed_tokens", "lm_head"]}, whole, b @ a),
        )
        for tensors, config, embed, head in cases:
            with self.subTest(sorted(tensors)):
                f = self.merged(tensors, **config)
                self.near(f, "embed_tokens.weight", embed)
                self.assertEqual(f.config["tie_word_embeddings"], int(head is None))
                if head is not None:
                    self.near(f, "lm_head.weight", head)
                    self.assertRegex(self.messages, "no longer tied|differs from embed_tokens")
        self.adapter(cases[0][0], ensure_weight_tying=True)
        self.fails("ensure_weight_tying", self.path("model"), self.path("o.q3n"), "--lora",
                   self.path("lora"))

    def test_tied_with_a_head_in_the_file(self):
        """The checkpoint holds the tied head once more: the adapter still changes one of them."""
        self.base(tie_word_embeddings=True)
        bf16 = synthetic.qwen3_tensors(self.settings)
        bf16["lm_head.weight"] = bf16["model.embed_tokens.weight"]
        self.checkpoint("model", self.settings, bf16)
        a, b = self.random(4, 64), self.random(32, 4)
        e = self.tensors["model.embed_tokens.weight"]
        f = self.merged({"model.embed_tokens.lora_embedding_A": a,
                         "model.embed_tokens.lora_embedding_B": b})
        self.near(f, "embed_tokens.weight", e + 2 * (b @ a).T)
        self.near(f, "lm_head.weight", e)

    def test_names(self):
        self.base()
        p = "model.layers.0.self_attn.k_proj.lora_"
        a, b = self.random(4, 32), self.random(16, 4)
        pair = {p + "A.weight": a, p + "B.weight": b}
        self.adapter(dict(pair, **{p + "A.default.weight": a}))
        self.fails("found it under two names", self.path("model"), self.path("o.q3n"), "--lora",
                   self.path("lora"))
        self.adapter(pair)
        for pattern in ("(a+)+b", "(x|y)*", "x" * 300, ".*.*.*.*q", "["):
            self.adapter(pair, rank_pattern={pattern: 8})
            self.fails("rank_pattern", self.path("model"), self.path("o.q3n"), "--lora",
                       self.path("lora"))
        self.merged(pair, rank_pattern={r"layers\.\d+\.mlp": 8, "k_proj": 4})

    def test_base_layer(self):
        """PEFT saves the matrix under a pair of the embedding too when the vocabulary grew."""
        self.base(tie_word_embeddings=False)
        whole = self.random(64, 32)
        a, b = self.random(4, 64), self.random(32, 4)
        f = self.merged({"model.embed_tokens.base_layer.weight": whole,
                         "model.embed_tokens.lora_embedding_A": a,
                         "model.embed_tokens.lora_embedding_B": b})
        self.near(f, "embed_tokens.weight", whole + 2 * (b @ a).T)

    def test_prefixes(self):
        self.base()
        a, b = self.random(4, 32), self.random(16, 4)
        want = self.tensors["model.layers.0.self_attn.k_proj.weight"] + 2 * b @ a
        for prefix in ("model.", "model.language_model.", "", "_orig_mod.model."):
            p = prefix + "layers.0.self_attn.k_proj.lora_"
            f = self.merged({p + "A.weight": a, p + "B.weight": b,
                             "model.visual.blocks.0.attn.qkv.lora_A.weight": a})
            self.near(f, "layers.0.self_attn.k_proj.weight", want)
            self.assertIn("skipped 1 tensor (vision)", self.messages)

    def test_keys(self):
        """Every key of adapter_config.json is honoured, harmless or refused."""
        self.base()
        p = "model.layers.0.self_attn.k_proj.lora_"
        pair = {p + "A.weight": self.random(4, 32), p + "B.weight": self.random(16, 4)}
        refused = dict(
            layer_replication=[[0, 1], [0, 1]], use_dora=True, use_qalora=True, lora_bias=True,
            fan_in_fan_out=True, target_parameters=["mlp.experts.gate_up_proj"],
            trainable_token_indices=[1], alora_invocation_tokens=[1], use_bdlora={"a": 1},
            arrow_config={"a": 1}, kasa_config={"a": 1}, monteclora_config={"a": 1}, bias="all",
            task_type="TOKEN_CLS", init_lora_weights="pissa_niter_4", peft_type="LOHA",
            a_key_of_tomorrow=1)
        for key, value in refused.items():
            with self.subTest(key):
                self.adapter(pair, **{key: value})
                self.fails(("adapter_config.json: %s: found" % key), self.path("model"),
                           self.path("o.q3n"), "--lora", self.path("lora"))
        self.merged(pair, layer_replication=None, use_dora=False, lora_bias=False, r=4,
                    init_lora_weights="gaussian", task_type="CAUSAL_LM", target_parameters=None,
                    target_modules=["k_proj"], lora_dropout=0.1, inference_mode=True, revision=None,
                    base_model_name_or_path="x", megatron_core="megatron.core", loftq_config={},
                    layers_pattern=None, layers_to_transform=None, exclude_modules=None,
                    eva_config=None, corda_config=None, auto_mapping=None, qalora_group_size=16,
                    a_key_of_tomorrow=None)


class Hostile(Case):
    """Any JSON gives one clear line."""

    def header(self, **entry):
        good = {"dtype": "BF16", "shape": [32], "data_offsets": [0, 64]}
        text = json.dumps({"model.norm.weight": dict(good, **entry)}).encode()
        return struct.pack("<Q", len(text)) + text + bytes(64)

    def test_shapes(self):
        folder = self.checkpoint()
        long = "1" * 5000
        plain = self.header()
        (n,) = struct.unpack("<Q", plain[:8])
        digits = plain[8:8 + n].replace(b"[32]", b"[" + long.encode() + b"]")
        cases = (
            (struct.pack("<Q", len(digits)) + digits + bytes(64), "header"),
            (self.header(shape=[1] * 100000), "found 100000 dimensions, expected at most 8"),
            (self.header(shape=[(1 << 63) - 1] * 8), "found 64 bytes, expected"),
            (self.header(shape=[0] + [(1 << 63) - 1] * 7), "found 64 bytes, expected 0"),
            (self.header(dtype="X" * 100000), "model.norm.weight"),
            (self.header(shape=["x" * 100000]), "expected dtype, shape and data_offsets"),
        )
        for data, expected in cases:
            with open(os.path.join(folder, "model.safetensors"), "wb") as f:
                f.write(data)
            status, _, err = self.run_main(folder, self.path("o.q3n"))
            self.assertEqual(status, 1)
            self.assertIn(expected, err)
            self.assertNotIn("Traceback", err)
            self.assertLessEqual(len(err.splitlines()), 20)
            self.assertLess(max(map(len, err.splitlines())), 1000)

    VALUES = (None, True, False, 0, 1, -1, 2, 3, 0.5, 1e308, -1e-308, float("nan"), float("inf"),
              10 ** 400, 1 << 31, (1 << 63) - 1, "", "x", "4", "default", "yarn", "\ud800",
              "\x1b[2J", "a\nb", [], [0], ["x"], [[]], {},
              {"x": 1}, "x" * 100000, [1] * 300, 256, 64, 65536,
              1 << 30, {"rope_type": "yarn", "factor": 1e300, "rope_theta": 10.0})

    def spoil(self, rng, value):
        """The same JSON with a value somewhere replaced, renamed or removed."""
        if isinstance(value, dict) and value and rng.random() < 0.9:
            key = rng.choice(sorted(value))
            out = {k: v for k, v in value.items() if k != key}
            if rng.random() < 0.85:
                out[key] = self.spoil(rng, value[key])
            elif rng.random() < 0.5:
                new = rng.choice(("rope_scaling", "text_config", "layer_types", "x\n\x1by"))
                out[new] = value[key]
            return out
        if isinstance(value, list) and value and rng.random() < 0.5:
            at = rng.randrange(len(value))
            return value[:at] + [self.spoil(rng, value[at])] + value[at + 1:]
        return rng.choice(self.VALUES)

    def test_random_json(self):
        """Spoilt JSON of every kind: one clear line or a few, no traceback; what is written opens.
        """
        rng = random.Random(20)
        folders = [golden(n) for n in ("qwen3_dense_yarn", "qwen3_moe", "qwen3_5_moe_vl",
                                       "qwen3_next_mtp", "qwen3_next_fp8", "qwen3_next_cls")]
        for folder in folders:
            shutil.copytree(folder, self.path(os.path.basename(folder)))
        opened = 0
        for n in range(300):
            folder = self.path(os.path.basename(rng.choice(folders)))
            kind = rng.choice(3 * ("config.json",) + ("generation_config.json", "header",
                                                      "model.safetensors.index.json"))
            if kind == "header":
                path = os.path.join(folder, rng.choice(sorted(
                    f for f in os.listdir(folder) if f.endswith(".safetensors"))))
            else:
                path = os.path.join(folder, kind)
            old = self.replace(rng, path, kind == "header")
            opened += self.told(n, folder)
            self.put(path, old)
        self.assertTrue(20 < opened < 280, opened)

    def test_random_adapters(self):
        """The same of adapters: their configuration and the header of their tensors."""
        rng = random.Random(21)
        folder = self.checkpoint()
        p = "base_model.model.model.layers.0.self_attn.%s_proj.lora_%s.weight"
        shapes = {p % ("k", "A"): (4, 32), p % ("k", "B"): (16, 4), p % ("q", "A"): (4, 32),
                  p % ("q", "B"): (32, 4), "base_model.model.model.norm.weight": (32,)}
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none",
                  "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 2.5},
                  "modules_to_save": ["norm"], "init_lora_weights": True, "use_rslora": False}
        os.mkdir(self.path("lora"))
        synthetic.write_json(self.path("lora"), "adapter_config.json", config)
        synthetic.write_safetensors(self.path("lora", "adapter_model.safetensors"), {
            name: synthetic.bf16_noise(rng, shape) for name, shape in shapes.items()})
        opened = 0
        for n in range(150):
            header = rng.random() < 0.5
            path = self.path("lora", "adapter_model.safetensors" if header
                             else "adapter_config.json")
            old = self.replace(rng, path, header)
            opened += self.told(n, folder, "--lora", self.path("lora"))
            self.put(path, old)
        self.assertTrue(5 < opened < 140, opened)

    def told(self, n, folder, *args):
        """Convert: a file that opens (1), or one clear line or a few (0)."""
        status, _, err = self.run_main(folder, self.path("o.q3n"), *args)
        self.assertIn(status, (0, 1))
        self.assertEqual(err, "".join(c for c in err if c.isprintable() or c == "\n"))
        self.assertLess(max(map(len, err.splitlines())), 800)
        lines = [text for text in err.splitlines() if "error:" in text]
        self.assertLessEqual(len(lines), 20)
        self.assertEqual(bool(lines), status == 1, err)
        if status == 0:
            self.opens(self.path("o.q3n"), n)
        return 1 - status

    def replace(self, rng, path, header):
        """Spoil the JSON of a file; its bytes, None if it is new."""
        old = None
        if os.path.exists(path):
            with open(path, "rb") as f:
                old = f.read()
        if header:
            (n,) = struct.unpack("<Q", old[:8])
            value, rest = json.loads(old[8:8 + n]), old[8 + n:]
        else:
            value = json.loads(old) if old else {"eos_token_id": [1, 2], "pad_token_id": 3}
        for _ in range(rng.choice((1, 1, 2, 4))):
            value = self.spoil(rng, value)
        text = json.dumps(value).encode()
        self.put(path, struct.pack("<Q", len(text)) + text + rest if header else text)
        return old

    @staticmethod
    def put(path, data):
        if data is None:
            os.remove(path)
            return
        with open(path, "wb") as f:
            f.write(data)

    def opens(self, path, n):
        command = shlex.split(os.environ.get("Q3N", os.path.join(os.path.dirname(
            os.path.abspath(__file__)), os.pardir, "build", "q3n")))
        run = subprocess.run(command + ["info", path], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
        self.assertEqual(run.returncode, 0, (n, run.stderr))


if __name__ == "__main__":
    unittest.main()
