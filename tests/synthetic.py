"""Checkpoints made up for the tests: safetensors files of any content, small random models."""
import json
import os
import random
import struct


def write_safetensors(path, tensors, header_patch=None):
    """tensors {name: (dtype, shape, bytes)}.  header_patch(header) may spoil the header."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    if header_patch:
        header_patch(header)
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors.values():
            f.write(data)


def bf16_noise(rng, shape):
    """A tensor of +-0.0078 .. 0.031 as (dtype, shape, bytes)."""
    n = 1
    for dim in shape:
        n *= dim
    data = bytearray(2 * n)
    data[0::2] = rng.getrandbits(8 * n).to_bytes(n, "little")
    signs = rng.getrandbits(8 * n).to_bytes(n, "little")
    data[1::2] = signs.translate(bytes(0x3C if b < 128 else 0xBC for b in range(256)))
    return "BF16", shape, bytes(data)


def qwen3_config(**changes):
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 64,
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096, "rope_theta": 1000000.0, "tie_word_embeddings": True,
        "attention_bias": False, "hidden_act": "silu",
    }
    config.update(changes)
    return config


def qwen3_shapes(c):
    d, D, H, K, I = (c[k] for k in ("hidden_size", "head_dim", "num_attention_heads",
                                    "num_key_value_heads", "intermediate_size"))
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], d)
    for l in range(c["num_hidden_layers"]):
        p = "model.layers.%d." % l
        shapes.update({
            p + "input_layernorm.weight": (d,), p + "post_attention_layernorm.weight": (d,),
            p + "self_attn.q_proj.weight": (H * D, d), p + "self_attn.k_proj.weight": (K * D, d),
            p + "self_attn.v_proj.weight": (K * D, d), p + "self_attn.o_proj.weight": (d, H * D),
            p + "self_attn.q_norm.weight": (D,), p + "self_attn.k_norm.weight": (D,),
            p + "mlp.gate_proj.weight": (I, d), p + "mlp.up_proj.weight": (I, d),
            p + "mlp.down_proj.weight": (d, I)})
    return shapes


def qwen3_tensors(config, seed=1):
    rng = random.Random(seed)
    return {name: bf16_noise(rng, shape) for name, shape in qwen3_shapes(config).items()}


def write_checkpoint(folder, config, tensors, header_patch=None):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f)
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors, header_patch)
    return folder


def write_json(folder, name, value):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(value, f)
