#!/usr/bin/env python3
"""Small model files in which every kind of tensor, setting and section occurs, and chat templates
with what they are rendered with: where the fuzzers start.

usage: make_fuzz_corpus.py OUT_DIR      templates in OUT_DIR-chat
"""
import json
import os
import random
import subprocess
import sys
import tempfile

import synthetic

CONVERT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "tools", "convert.py")

HYBRID = {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "vocab_size": 270,
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 4, "linear_num_key_heads": 1,
    "linear_num_value_heads": 2, "linear_value_head_dim": 4, "num_experts": 2,
    "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
    "intermediate_size": 16, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "norm_topk_prob": True, "partial_rotary_factor": 0.5, "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "attention_bias": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 266,
}


def expert_shapes(prefix, c):
    d, width, shared = (c[k] for k in ("hidden_size", "moe_intermediate_size",
                                       "shared_expert_intermediate_size"))
    shapes = {prefix + "gate.weight": (c["num_experts"], d),
              prefix + "shared_expert_gate.weight": (1, d),
              prefix + "shared_expert.gate_proj.weight": (shared, d),
              prefix + "shared_expert.up_proj.weight": (shared, d),
              prefix + "shared_expert.down_proj.weight": (d, shared)}
    for e in range(c["num_experts"]):
        p = prefix + "experts.%d." % e
        shapes.update({p + "gate_proj.weight": (width, d), p + "up_proj.weight": (width, d),
                       p + "down_proj.weight": (d, width)})
    return shapes


def attention_shapes(prefix, c):
    d, D, H, K = (c[k] for k in ("hidden_size", "head_dim", "num_attention_heads",
                                 "num_key_value_heads"))
    return {prefix + "q_proj.weight": (2 * H * D, d), prefix + "k_proj.weight": (K * D, d),
            prefix + "v_proj.weight": (K * D, d), prefix + "o_proj.weight": (d, H * D),
            prefix + "q_norm.weight": (D,), prefix + "k_norm.weight": (D,)}


def delta_shapes(prefix, c):
    d, Hk, Hv, dk, dv = (c[k] for k in (
        "hidden_size", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
        "linear_value_head_dim"))
    return {prefix + "in_proj_qkvz.weight": (2 * Hk * dk + 2 * Hv * dv, d),
            prefix + "in_proj_ba.weight": (2 * Hv, d), prefix + "A_log": (Hv,),
            prefix + "conv1d.weight": (2 * Hk * dk + Hv * dv, 1, c["linear_conv_kernel_dim"]),
            prefix + "dt_bias": (Hv,), prefix + "norm.weight": (dv,),
            prefix + "out_proj.weight": (d, Hv * dv)}


def hybrid_shapes(c):
    d = c["hidden_size"]
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,),
              "lm_head.weight": (c["vocab_size"], d), "mtp.fc.weight": (d, 2 * d),
              "mtp.norm.weight": (d,), "mtp.pre_fc_norm_embedding.weight": (d,),
              "mtp.pre_fc_norm_hidden.weight": (d,)}
    layers = [("model.layers.%d." % l, kind) for l, kind in enumerate(c["layer_types"])]
    for p, kind in layers + [("mtp.layers.0.", "full_attention")]:
        shapes.update({p + "input_layernorm.weight": (d,),
                       p + "post_attention_layernorm.weight": (d,)})
        shapes.update(attention_shapes(p + "self_attn.", c) if kind == "full_attention"
                      else delta_shapes(p + "linear_attn.", c))
        shapes.update(expert_shapes(p + "mlp.", c))
    return shapes


def byte_characters():
    """The character that stands for each byte in a vocabulary of byte-level BPE."""
    plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    others = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + n) for n, b in enumerate(others)}}


def tokenizer():
    characters = byte_characters()
    vocab = {characters[b]: b for b in range(256)}
    merges = [["h", "e"], ["he", "l"], ["l", "o"], [characters[32], "t"], ["hel", "lo"],
              [characters[32], "a"]]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    added = [{"id": len(vocab) + n, "content": content, "special": special, "single_word": False,
              "lstrip": False, "rstrip": False, "normalized": False}
             for n, (content, special) in enumerate([("<think>", False), ("<|end|>", True)])]
    pattern = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}"
               "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                  "use_regex": False}
    return {"version": "1.0", "added_tokens": added, "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                split, byte_level]},
            "post_processor": byte_level, "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}}


def convert(folder, out, *options):
    subprocess.check_call([sys.executable, CONVERT, folder, out, "--quiet"] + list(options))


def make(out_dir):
    rng = random.Random(1)
    dense = synthetic.qwen3_config(
        vocab_size=270, hidden_size=16, head_dim=8, intermediate_size=16,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        attention_bias=True)
    dense_tensors = synthetic.qwen3_tensors(dense)
    for name, n in (("q", 16), ("k", 8), ("v", 8), ("o", 16)):
        bias = "model.layers.0.self_attn.%s_proj.bias" % name
        dense_tensors[bias] = synthetic.bf16_noise(rng, (n,))
    hybrid = {name: synthetic.bf16_noise(rng, shape) for name, shape in
              hybrid_shapes(HYBRID).items()}
    labels = dict(HYBRID, architectures=["Qwen3NextForSequenceClassification"], pad_token_id=0,
                  problem_type="multi_label_classification",
                  id2label={"0": "no", "1": "", "2": "caf\u00e9"})
    classifier = {name: t for name, t in hybrid.items() if not name.startswith(("mtp.", "lm_head"))}
    classifier["score.weight"] = synthetic.bf16_noise(rng, (3, labels["hidden_size"]))
    with tempfile.TemporaryDirectory() as top:
        for name, config, tensors, options in (
                ("hybrid", HYBRID, hybrid, ()), ("dense", dense, dense_tensors, ("--type", "f16")),
                ("classifier", labels, classifier, ("--type", "f32"))):
            folder = synthetic.write_checkpoint(os.path.join(top, name), config, tensors)
            around = {"type": "BertProcessing", "cls": ["<think>", 262], "sep": ["<|end|>", 263]}
            synthetic.write_json(folder, "tokenizer.json", dict(
                tokenizer(), **({"post_processor": around} if name == "classifier" else {})))
            convert(folder, os.path.join(out_dir, name + ".q3n"), *options)
        convert(os.path.join(top, "dense"), os.path.join(out_dir, "ids_only.q3n"), "--no-tokenizer")


def make_templates(out_dir):
    """The golden templates: text, a byte 0, the request."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden", "chat", "golden.json")
    with open(path, encoding="utf-8") as f:
        golden = json.load(f)
    options = dict(golden["context"])
    request = json.dumps({"messages": options.pop("messages"), "options": options})
    os.makedirs(out_dir, exist_ok=True)
    texts = [case["template"] for case in golden["cases"]]
    for i, text in enumerate(texts):
        with open(os.path.join(out_dir, "%03d" % i), "wb") as f:
            f.write(text.encode() + b"\0" + request.encode())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_fuzz_corpus.py OUT_DIR")
    make(sys.argv[1])
    make_templates(sys.argv[1] + "-chat")
