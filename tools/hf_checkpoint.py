"""The plan for a safetensors checkpoint of the qwen3 families, with or without a LoRA adapter."""
import hf_config
import matrix
from files import ConvertError
from hf_names import MTP, Names
from model_plan import Plan, below, f32_vector, one_plus, ranges

FLOATS = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
SCALE = "_scale_inv"             # appended to an FP8 tensor's name: its scales by block
COMPARE_BYTES = 1 << 20
MAX_PROBLEMS = 1 << 17           # after which the layers that remain are not looked for


class Tensors:
    """The checkpoint's tensors by plain name: taken with the expected shape, each at most once."""

    def __init__(self, entries, plan, block):
        self.entries, self.original, self.plan, self.block = {}, {}, plan, block
        self.used, self.adapter = set(), None
        self.untied = False              # by an adapter
        names = Names(entries, plan.where)
        if names.note():
            plan.notes.append(names.note())
        for name, entry in entries.items():
            plain = names.plain(name)
            if plain is None or plan.no_mtp and plain.startswith("mtp."):
                plan.skipped.append((name, "--no-mtp" if plain else "vision"))
                continue
            if plain in self.entries:
                raise ConvertError("%s: %s: found also as %s, expected it once"
                                   % (plan.where, name, self.original[plain]))
            self.entries[plain], self.original[plain] = entry, name

    def __contains__(self, name):
        return name in self.entries

    def _entry(self, name, shape):
        """The entry, or None after noting the problem."""
        entry = self.entries.get(name)
        if entry is None:
            self.plan.missing(name, shape)
            return None
        self.used.add(name)
        if entry.shape != tuple(shape):
            self.plan.problem(self.original[name], list(entry.shape), list(shape))
            return None
        if entry.dtype not in FLOATS and entry.dtype != "F8_E4M3":
            self.plan.problem(self.original[name], "type " + entry.dtype,
                              "BF16, F16, F32 or F8_E4M3")
            return None
        return entry

    def stack(self, name, n, rows, cols):
        """n matrices [rows, cols] of a tensor [n, rows, cols]; for n = None, of [rows, cols]."""
        shape = (rows, cols) if n is None else (n, rows, cols)
        return self.cut(name, shape, n or 1, rows, cols)

    def cut(self, name, shape, n, rows, cols):
        """A tensor of the given shape as n matrices [rows, cols]."""
        entry = self._entry(name, shape)
        if entry is None:
            return [matrix.Bytes(rows, cols, "f32", name, b"")] * n
        source = self.original[name]
        if entry.dtype == "F8_E4M3":
            out = self._fp8(name, entry, shape, n, rows, cols)
        else:
            type_ = FLOATS[entry.dtype]
            size = rows * cols * matrix.ELEMENT_BYTES[type_]
            out = [matrix.Stored(rows, cols, type_, source, entry.store, entry.offset + e * size)
                   for e in range(n)]
        if self.adapter:
            out = self.adapter.merge(name, out)
        return out

    def _fp8(self, name, entry, shape, n, rows, cols):
        matrix.need_numpy("an FP8 checkpoint")
        high, wide = self.block
        r, c = -(-rows // high), -(-cols // wide)
        lead = tuple(shape[:-2])
        scale = self._entry(name + SCALE, lead + (r, c))
        if scale is None:
            return [matrix.Bytes(rows, cols, "f32", name, b"")] * n
        if scale.dtype not in FLOATS:
            self.plan.problem(name + SCALE, "type " + scale.dtype, "BF16, F16 or F32")
            return [matrix.Bytes(rows, cols, "f32", name, b"")] * n
        type_ = FLOATS[scale.dtype]
        step = r * c * matrix.ELEMENT_BYTES[type_]
        scales = [matrix.Stored(r, c, type_, name + SCALE, scale.store, scale.offset + e * step)
                  for e in range(n)]
        return [matrix.Fp8(rows, cols, self.original[name], entry.store,
                           entry.offset + e * rows * cols, scales[e], self.block)
                for e in range(n)]

    def mat(self, name, rows, cols):
        return self.stack(name, None, rows, cols)[0]

    def vec(self, name, n):
        return self.cut(name, (n,), 1, 1, n)[0]

    def leftovers(self):
        """What the model did not use, by its original name."""
        return [self.original[n] for n in self.entries if n not in self.used]


class Builder:
    """Walks the model in the order of the file and adds each tensor to the plan."""

    def __init__(self, tensors, plan, config):
        self.t, self.plan, self.c = tensors, plan, config
        self.d = config["hidden_size"]
        self.hybrid = config["family"] in hf_config.HYBRID

    # -- one tensor --

    def mat(self, out, name, rows, cols):
        self.plan.mat(out + ".weight", self.t.mat(name + ".weight", rows, cols))

    def vec(self, out, name, n):
        self.plan.vec(out, self.t.vec(name, n))

    def norm(self, out, name, n):
        """A norm's scale.  The hybrid families store w and scale by 1 + w."""
        w = self.t.vec(name + ".weight", n)
        complete = not self.plan.problems
        self.plan.vec(out + ".weight", one_plus(w) if self.hybrid and complete else w)

    # -- layers --

    def model(self):
        c, V, d = self.c, self.c["vocab_size"], self.d
        self.mat("embed_tokens", "model.embed_tokens", V, d)
        self.norm("norm", "model.norm", d)
        if not c["tie_word_embeddings"]:
            self.mat("lm_head", "lm_head", V, d)
        if c["num_labels"]:
            self.mat("score", "score", c["num_labels"], d)
            if "score.bias" in self.t:
                self.vec("score.bias", "score.bias", c["num_labels"])
        for l in range(c["num_hidden_layers"]):
            if self.plan.n_problems > MAX_PROBLEMS:
                return
            self.layer("model.layers.%d." % l, "layers.%d." % l, c["layer_types"][l],
                       c["layer_experts"][l])
        if c["num_mtp_layers"]:
            self.mat("mtp.fc", "mtp.fc", d, 2 * d)
            for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
                self.norm("mtp." + name, "mtp." + name, d)
            self.layer("mtp.layers.0.", "mtp.layers.0.", 0, c["num_experts"] > 0)

    def layer(self, source, out, delta, experts):
        self.norm(out + "input_layernorm", source + "input_layernorm", self.d)
        self.norm(out + "post_attention_layernorm", source + "post_attention_layernorm", self.d)
        if delta:
            self.deltanet(source + "linear_attn.", out + "linear_attn.")
        else:
            self.attention(source + "self_attn.", out + "self_attn.")
        if experts:
            self.experts(source + "mlp.", out + "mlp.")
        else:
            self.mlp(source + "mlp.", out + "mlp.", self.c["intermediate_size"])

    def attention(self, source, out):
        c, d, D = self.c, self.d, self.c["head_dim"]
        q = c["num_attention_heads"] * D * (2 if c["attn_output_gate"] else 1)
        kv, o = c["num_key_value_heads"] * D, c["num_attention_heads"] * D
        for name, rows, cols in (("q_proj", q, d), ("k_proj", kv, d), ("v_proj", kv, d),
                                 ("o_proj", d, o)):
            self.mat(out + name, source + name, rows, cols)
        if c["attention_bias"]:
            for name, n in (("q_proj", q), ("k_proj", kv), ("v_proj", kv), ("o_proj", d)):
                self.vec(out + name + ".bias", source + name + ".bias", n)
        self.norm(out + "q_norm", source + "q_norm", D)
        self.norm(out + "k_norm", source + "k_norm", D)

    def deltanet(self, source, out):
        c, t, d = self.c, self.t, self.d
        Hk, Hv = c["linear_num_key_heads"], c["linear_num_value_heads"]
        dk, dv, width = c["linear_key_head_dim"], c["linear_value_head_dim"], \
            c["linear_conv_kernel_dim"]
        C = 2 * Hk * dk + Hv * dv
        grouped, separate = (source + "in_proj_%s.weight" % n in t for n in ("qkvz", "qkv"))
        if grouped or (c["family"] == "qwen3_next" and not separate):
            r = Hv // Hk
            qkvz = ungroup(t.mat(source + "in_proj_qkvz.weight", C + Hv * dv, d), Hk,
                           (dk, dk, r * dv, r * dv))
            ba = ungroup(t.mat(source + "in_proj_ba.weight", 2 * Hv, d), Hk, (r, r))
        else:
            qkvz = below([t.mat(source + "in_proj_qkv.weight", C, d),
                          t.mat(source + "in_proj_z.weight", Hv * dv, d)])
            ba = below([t.mat(source + "in_proj_b.weight", Hv, d),
                        t.mat(source + "in_proj_a.weight", Hv, d)])
        self.plan.mat(out + "in_proj_qkvz.weight", qkvz)
        self.plan.mat(out + "in_proj_ba.weight", ba)
        conv = t.cut(source + "conv1d.weight", (C, 1, width), 1, C, width)[0]
        if not self.plan.problems:
            w = conv.floats()
            conv = f32_vector([x for j in range(width) for x in w[j::width]],
                              conv.source + " transposed", C)
        self.plan.vec(out + "conv1d.weight", conv, (width, C))
        self.vec(out + "A_log", source + "A_log", Hv)
        self.vec(out + "dt_bias", source + "dt_bias", Hv)
        self.vec(out + "norm.weight", source + "norm.weight", dv)
        self.mat(out + "out_proj", source + "out_proj", d, Hv * dv)

    def mlp(self, source, out, width):
        for name in ("gate_proj", "up_proj"):
            self.mat(out + name, source + name, width, self.d)
        self.mat(out + "down_proj", source + "down_proj", self.d, width)

    def experts(self, source, out):
        c, t, d = self.c, self.t, self.d
        E, I = c["num_experts"], c["moe_intermediate_size"]
        self.mat(out + "gate", source + "gate", E, d)
        if source + "experts.gate_up_proj" in t:
            both = t.stack(source + "experts.gate_up_proj", E, 2 * I, d)
            gate = [ranges(m, [(0, I)], m.source + "[:, :I]") for m in both]
            up = [ranges(m, [(I, I)], m.source + "[:, I:]") for m in both]
            down = t.stack(source + "experts.down_proj", E, d, I)
        else:
            name = source + "experts.%d.%s_proj.weight"
            gate, up, down = ([t.mat(name % (e, part), rows, cols) for e in range(E)] for
                              part, rows, cols in (("gate", I, d), ("up", I, d), ("down", d, I)))
        self.plan.experts(out + "experts.", gate, up, down)
        if c["shared_expert_intermediate_size"]:
            self.mlp(source + "shared_expert.", out + "shared_expert.",
                     c["shared_expert_intermediate_size"])
            self.mat(out + "shared_expert_gate", source + "shared_expert_gate", 1, d)


def ungroup(m, groups, sizes):
    """Rows that lie [group][part][rows of the part] as [part][group][rows]."""
    total = sum(sizes)
    parts, at = [], 0
    for size in sizes:
        parts += [(g * total + at, size) for g in range(groups)]
        at += size
    return ranges(m, parts, m.source + " ungrouped")


# ---- Heads ----

def same_bytes(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    for at in range(0, a.bytes, COMPARE_BYTES):
        n = min(COMPARE_BYTES, a.bytes - at)
        if a.store.read(a.offset + at, n) != b.store.read(b.offset + at, n):
            return False
    return True


def set_heads(tensors, config, plan, raw):
    """MTP module, classification head, tying: what the tensors say."""
    c = hf_config.text_part(raw, plan.where)
    config["num_mtp_layers"] = int(any(name.startswith("mtp.") for name in tensors.entries))
    architecture = (c.items("architectures", str) or [""])[0]
    if architecture.endswith("ForSequenceClassification") or "score.weight" in tensors:
        shape = tensors.entries["score.weight"].shape if "score.weight" in tensors else ()
        config["num_labels"] = shape[0] if len(shape) == 2 else max(1, len(
            c.object("id2label").values))
    tied, head = c.flag("tie_word_embeddings"), tensors.entries.get("lm_head.weight")
    if tensors.untied:
        tied = 0
    if tied and head:
        # transformers: a head that differs from the embedding is kept although the config ties them
        embed = tensors.entries.get("model.embed_tokens.weight")
        if embed and not same_bytes(head, embed):
            plan.warnings.append("tie_word_embeddings is set but lm_head.weight differs from "
                                 "embed_tokens: kept as its own tensor")
            tied = 0
        else:
            tensors.used.add("lm_head.weight")
            plan.skipped.append((tensors.original["lm_head.weight"], "tied to embed_tokens"))
    if not tied and not head and config["num_labels"]:
        plan.notes.append("no lm_head.weight: the classifier does not need it, embed_tokens stands "
                          "in (tie_word_embeddings)")
        tied = 1
    elif not tied and not head:
        plan.hint("lm_head.weight", "or --set tie_word_embeddings=true, which takes embed_tokens "
                  "as the head: right for a model of hidden states alone, as of embeddings")
    if config["num_mtp_layers"]:
        plan.hint("mtp.", "or --no-mtp, which leaves the MTP module out")
    config["tie_word_embeddings"] = tied


def reason(name):
    """Why a tensor that the model does not use is passed over; None if nobody knows it."""
    if name.endswith("rotary_emb.inv_freq"):
        return "computed from the configuration"
    if name.endswith((".input_scale", ".activation_scale", ".k_scale", ".v_scale")):
        return "scale of activations"
    if MTP.fullmatch(name):
        return "beyond the first MTP layer"
    return None


def plan(entries, raw, where, check, adapter=None, no_mtp=False):
    """The plan for a checkpoint: entries by name, its config.json, an adapter (lora.Adapter).
    check(config, where) refuses numbers out of range before anything is built by them."""
    p = Plan(where)
    p.raw, p.no_mtp = hf_config.settings(raw), no_mtp
    p.config = hf_config.read(p.raw, where, p.warnings)
    tensors = Tensors(entries, p, hf_config.fp8_block(hf_config.text_part(p.raw, where)))
    if adapter:
        adapter.attach(tensors, hf_config.text_part(p.raw, where).flag("tie_word_embeddings"))
    set_heads(tensors, p.config, p, p.raw)
    check(p.config, where)
    Builder(tensors, p, p.config).model()
    unknown = []
    for name in tensors.leftovers():
        why = reason(name)
        p.skipped.append((name, why or "not known to %s" % p.config["family"]))
        if why is None:
            unknown.append(name)
    p.finish(unknown)
    if adapter:
        adapter.check_all_used()
    if unknown:
        p.warnings.append("%d tensors are not part of %s and were passed over: %s%s" % (
            len(unknown), p.config["family"], ", ".join(unknown[:3]),
            ", ..." if len(unknown) > 3 else ""))
    return p
