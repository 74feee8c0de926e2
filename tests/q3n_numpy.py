"""The models in numpy, from a .q3n file: reads its configuration and tensors and nothing else.

An independent reading of the FILE FORMAT comment and of the equations, for checking the converter.
"""
import numpy as np


Q4_LEVEL = np.array([-70, -54, -42, -33, -25, -18, -11, -5, 1, 7, 13, 19, 26, 34, 44, 57])
Q3_LEVEL = np.array([-73, -46, -27, -11, 2, 16, 32, 54])


def levels(name, lines):
    """Levels [.., 16, 32] of groups whose codes are lines [.., n, 16, 4] of 64 bytes; s is the
    second last axis of what is put together, row and j the others."""
    def bits(line, low, n):
        return lines[..., line, :, :] >> low & (1 << n) - 1
    steps = []
    for s in range(8):
        if name == "q8":
            steps.append(bits(s, 0, 8) - 128)
        elif name == "q6":
            steps.append(bits(s % 4, 4 * (s // 4), 4)
                         + 16 * bits(4 + s // 4, 2 * (s % 4), 2) - 32)
        elif name == "q4":
            steps.append(Q4_LEVEL[bits(s % 4, 4 * (s // 4), 4)])
        else:
            steps.append(Q3_LEVEL[bits(s // 4, 2 * (s % 4), 2) + 4 * bits(2, s, 1)])
    x = np.stack(steps, -2)                               # [.., 16, 8, 4]
    return x.reshape(x.shape[:-2] + (32,))


def dequantise(t, data):
    """A quantised matrix, or several, in f64."""
    rows, cols = t.dims[-2], t.dims[-1]
    n_tiles, n_blocks = -(-rows // 16), -(-cols // 64)
    raw = np.frombuffer(data, np.uint8).reshape(-1, n_tiles, n_blocks, 16 * t.type.block_bytes)
    scale = np.ascontiguousarray(raw[..., :64]).view("<f2").reshape(raw.shape[:3] + (2, 16, 1))
    lines = raw[..., 64:].reshape(raw.shape[:3] + (2, -1, 16, 4)).astype(np.int64)
    x = scale.astype(np.float64) * levels(t.type.name, lines)    # [e, tile, block, 2, 16, 32]
    x = x.transpose(0, 1, 4, 2, 3, 5).reshape(-1, n_tiles * 16, n_blocks * 64)
    return x[:, :rows, :cols].reshape(t.dims)


def array(f, name):
    """A tensor of a q3n_file.File in f64."""
    t, data = f.tensors[name], f.data(name)
    if t.type.name.startswith("q"):
        return dequantise(t, data)
    if t.type.name == "bf16":
        x = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        x = np.frombuffer(data, {"f32": "<f4", "f16": "<f2"}[t.type.name])
    return x.astype(np.float64).reshape(t.dims)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Model:
    def __init__(self, f):
        self.c = f.config
        self.t = {name: array(f, name) for name in f.tensors}

    def norm(self, x, name):
        eps = self.c["rms_norm_eps"]
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.t[name]

    def linear(self, x, name):
        y = x @ self.t[name + ".weight"].T
        return y + self.t[name + ".bias"] if name + ".bias" in self.t else y

    def tables(self, n):
        """cos and sin [n, 1, rotary_dim / 2]."""
        c = self.c
        if c["rope_type"] == "table":
            return self.t["rope.cos"][:n, None], self.t["rope.sin"][:n, None]
        R, factor = c["rotary_dim"], c["rope_factor"]
        j = np.arange(R // 2)
        inverse, scale = c["rope_theta"] ** (-2 * j / R), 1.0
        if c["rope_type"] == "linear":
            inverse = inverse / factor
        if c["rope_type"] == "yarn":
            def turn(rotations):
                length = c["rope_original_max_position"]
                return R * np.log(length / (rotations * 2 * np.pi)) / (2 * np.log(c["rope_theta"]))
            low = max(np.floor(turn(c["rope_beta_fast"])), 0)
            high = min(np.ceil(turn(c["rope_beta_slow"])), R - 1)
            ramp = np.clip((j - low) / max(high - low, 0.001), 0, 1)
            inverse = inverse / factor * ramp + inverse * (1 - ramp)
            scale = c["rope_attention_factor"] or 0.1 * np.log(factor) + 1
        angle = np.arange(n)[:, None, None] * inverse
        return np.cos(angle) * scale, np.sin(angle) * scale

    def rope(self, x):
        """x [n, heads, D]: the first rotary_dim turn, in halves."""
        cos, sin = self.tables(len(x))
        h = self.c["rotary_dim"] // 2
        a, b = x[..., :h], x[..., h:2 * h]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * h:]], -1)

    def attention(self, x, p):
        c, n = self.c, len(x)
        H, K, D = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        q, gate = self.linear(x, p + "q_proj").reshape(n, H, -1), None
        if c["attn_output_gate"]:
            q, gate = q[..., :D], q[..., D:]
        k = self.linear(x, p + "k_proj").reshape(n, K, D)
        v = self.linear(x, p + "v_proj").reshape(n, K, D)
        if c["qk_norm"]:
            q, k = self.norm(q, p + "q_norm.weight"), self.norm(k, p + "k_norm.weight")
        q, k = self.rope(q), self.rope(k)
        mask = np.triu(np.full((n, n), -1e30), 1) if c["causal"] else 0
        o = np.empty((n, H, D))
        for h in range(H):
            kv = h // (H // K)
            o[:, h] = softmax(q[:, h] @ k[:, kv].T / np.sqrt(D) + mask) @ v[:, kv]
        if gate is not None:
            o = o * sigmoid(gate)
        return self.linear(o.reshape(n, -1), p + "o_proj")

    def deltanet(self, x, p):
        c, n = self.c, len(x)
        Hk, Hv = c["linear_num_key_heads"], c["linear_num_value_heads"]
        dk, dv, width = (c["linear_" + k] for k in ("key_head_dim", "value_head_dim",
                                                    "conv_kernel_dim"))
        C = 2 * Hk * dk + Hv * dv
        y = self.linear(x, p + "in_proj_qkvz")
        z = y[:, C:].reshape(n, Hv, dv)
        ba = self.linear(x, p + "in_proj_ba")
        u = np.concatenate([np.zeros((width - 1, C)), y[:, :C]])
        w = self.t[p + "conv1d.weight"]
        u = silu(sum(w[j] * u[j:j + n] for j in range(width)))
        q, k, v = np.split(u, [Hk * dk, 2 * Hk * dk], 1)
        q, k = (a.reshape(n, Hk, dk) for a in (q, k))
        q, k = (a / np.sqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
        q, k = (np.repeat(a, Hv // Hk, 1) for a in (q / np.sqrt(dk), k))
        v, beta = v.reshape(n, Hv, dv), sigmoid(ba[:, :Hv])
        g = -np.exp(self.t[p + "A_log"]) * np.log1p(np.exp(ba[:, Hv:] + self.t[p + "dt_bias"]))
        S, o = np.zeros((Hv, dk, dv)), np.empty((n, Hv, dv))
        for t in range(n):
            S *= np.exp(g[t])[:, None, None]
            d = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", S, k[t]))
            S += np.einsum("hk,hv->hkv", k[t], d)
            o[t] = np.einsum("hkv,hk->hv", S, q[t])
        o = self.norm(o, p + "norm.weight") * silu(z)
        return self.linear(o.reshape(n, -1), p + "out_proj")

    def mlp(self, x, p):
        return self.linear(silu(self.linear(x, p + "gate_proj")) * self.linear(x, p + "up_proj"),
                           p + "down_proj")

    def expert(self, x, p, e):
        def linear(x, part):
            name = "%sexperts.%s_proj" % (p, part)
            y = x @ self.t[name + ".weight"][e].T
            return y + self.t[name + ".bias"][e] if name + ".bias" in self.t else y
        return linear(silu(linear(x, "gate")) * linear(x, "up"), "down")

    def moe(self, x, p):
        probability, y = softmax(self.linear(x, p + "gate")), np.zeros_like(x)
        for t, row in enumerate(probability):
            top = np.argsort(-row, kind="stable")[:self.c["num_experts_per_tok"]]
            weight = row[top] / (row[top].sum() if self.c["norm_topk_prob"] else 1)
            for e, pe in zip(top, weight):
                y[t] += pe * self.expert(x[t], p, e)
        if self.c["shared_expert_intermediate_size"]:
            y += sigmoid(self.linear(x, p + "shared_expert_gate")) \
                * self.mlp(x, p + "shared_expert.")
        return y

    def layer(self, x, p, delta, experts):
        a = self.norm(x, p + "input_layernorm.weight")
        x = x + (self.deltanet(a, p + "linear_attn.") if delta
                 else self.attention(a, p + "self_attn."))
        a = self.norm(x, p + "post_attention_layernorm.weight")
        return x + (self.moe(a, p + "mlp.") if experts else self.mlp(a, p + "mlp."))

    def hidden(self, ids):
        """[n, d], after the final norm."""
        x = self.t["embed_tokens.weight"][ids]
        for l in range(self.c["num_hidden_layers"]):
            x = self.layer(x, "layers.%d." % l, self.c["layer_types"][l],
                           self.c["layer_experts"][l])
        return self.norm(x, "norm.weight")

    def logits(self, ids):
        """[n, V]."""
        head = "embed_tokens" if self.c["tie_word_embeddings"] else "lm_head"
        return self.hidden(ids) @ self.t[head + ".weight"].T

    def classify(self, ids):
        c = self.c
        x = self.logits(ids) if c["classifier_input"] == "logits" else self.hidden(ids)
        x = {"last": x[-1], "first": x[0], "mean": x.mean(0)}[c["pooling"]]
        return self.linear(x, "score")

    def drafts(self, ids):
        """MTP: logits [n - 1, V] of token i + 2 from the trunk's state at i and token i + 1.
        Rotary positions count from 1, which attention, seeing differences only, cannot tell."""
        t, x = self.t, self.hidden(ids)[:-1]
        e = self.norm(t["embed_tokens.weight"][ids[1:]], "mtp.pre_fc_norm_embedding.weight")
        h = self.norm(x, "mtp.pre_fc_norm_hidden.weight")
        x = np.concatenate([e, h], 1) @ t["mtp.fc.weight"].T
        x = self.layer(x, "mtp.layers.0.", 0, self.c["num_experts"] > 0)
        head = "embed_tokens" if self.c["tie_word_embeddings"] else "lm_head"
        return self.norm(x, "mtp.norm.weight") @ t[head + ".weight"].T
