"""LoRA adapters as PEFT saves them, merged into the checkpoint's matrices while they are read."""
import os
import re

import hf_checkpoint
import matrix
from hf_config import Json
from q3n_file import ConvertError
from safetensors_file import load_json, read_header

PREFIX = "base_model.model."


class Pair:
    """lora_A [r, in] and lora_B [out, r] of one module (of an embedding [r, V] and [d, r])."""

    def __init__(self, name):
        self.name, self.a, self.b, self.embedding = name, None, None, False


class Adapter:
    """pairs by the plain name of the module's weight; whole: tensors saved in full."""

    def __init__(self, folder):
        self.np = matrix.need_numpy("--lora")
        config_path = os.path.join(folder, "adapter_config.json")
        self.path = os.path.join(folder, "adapter_model.safetensors")
        c = self.config = Json(load_json(config_path), config_path)
        if c.word("peft_type", "LORA") != "LORA":
            c.bad("peft_type", '"LORA"')
        for key in ("use_dora", "use_qalora", "fan_in_fan_out"):
            if c.flag(key):
                c.bad(key, "false")
        if c.word("bias", "none") != "none":
            c.bad("bias", '"none"')
        if c.values.get("target_parameters"):
            c.bad("target_parameters", "none (adapters of modules only)")
        c.whole("r", least=1)
        self.pairs, self.whole, self.used, self.loaded = {}, {}, set(), (None, None)
        for name, entry in read_header(self.path).items():
            self._add(name, entry)
        for pair in self.pairs.values():
            if pair.a is None or pair.b is None:
                raise ConvertError("%s: %s: found lora_%s, expected lora_A and lora_B"
                                   % (self.path, pair.name, "A" if pair.b is None else "B"))

    def _add(self, name, entry):
        if not name.startswith(PREFIX):
            raise ConvertError("%s: %s: found another prefix, expected %s"
                               % (self.path, name, PREFIX))
        bare = name[len(PREFIX):]
        m = re.match(r"(.*)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?$", bare)
        if m is None:
            if ".lora_" in bare:
                raise ConvertError("%s: %s: found an adapter tensor, expected lora_A or lora_B"
                                   % (self.path, name))
            bare = bare.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
            self.whole[hf_checkpoint.plain_name(bare) or bare] = (name, entry)
            return
        module = hf_checkpoint.plain_name(m.group(1) + ".weight") or m.group(1) + ".weight"
        pair = self.pairs.setdefault(module, Pair(m.group(1)))
        pair.embedding = bool(m.group(2))
        setattr(pair, m.group(3).lower(), entry)

    def attach(self, tensors):
        """Full tensors take the place of the checkpoint's; the others wait for merge."""
        tensors.adapter = self
        for name, (original, entry) in self.whole.items():
            if name not in tensors:
                raise ConvertError("%s: %s: found a tensor that the checkpoint has not, expected "
                                   "one of its own" % (self.path, original))
            tensors.entries[name] = entry
            tensors.original[name] = original

    def merge(self, name, matrices):
        """The matrices of a tensor of the checkpoint, with the adapter if it has one."""
        pair = self.pairs.get(name)
        if pair is None:
            return matrices
        self.used.add(name)
        if len(matrices) != 1:
            raise ConvertError("%s: %s: found an adapter of a stack, expected one of a matrix"
                               % (self.path, pair.name))
        base, (rank, (cols, rows)) = matrices[0], self._shape(pair)
        if (rows, cols) != (base.rows, base.cols):
            raise ConvertError("%s: %s: found lora_A %s and lora_B %s, expected them for %s" % (
                self.path, pair.name, list(pair.a.shape), list(pair.b.shape),
                [base.rows, base.cols]))
        return [matrix.Lora(base, lambda: self._load(pair), self._scale(pair.name, rank))]

    def _shape(self, pair):
        """rank, (columns, rows) of b a."""
        for entry in (pair.a, pair.b):
            if entry.dtype not in hf_checkpoint.FLOATS or len(entry.shape) != 2:
                raise ConvertError("%s: %s: found %s %s, expected a float matrix"
                                   % (self.path, pair.name, entry.dtype, list(entry.shape)))
        (rank, n_in), (n_out, rank_b) = pair.a.shape, pair.b.shape
        if rank != rank_b:
            raise ConvertError("%s: %s: found lora_A %s and lora_B %s, expected one rank"
                               % (self.path, pair.name, list(pair.a.shape), list(pair.b.shape)))
        return rank, (n_out, n_in) if pair.embedding else (n_in, n_out)

    def _load(self, pair):
        """(a, b) in f32; those of the pair used last are kept."""
        if self.loaded[0] is not pair:
            a, b = (self.np.frombuffer(
                matrix.convert(e.store.read(e.offset, e.bytes), hf_checkpoint.FLOATS[e.dtype],
                               "f32"), "<f4").reshape(e.shape) for e in (pair.a, pair.b))
            # an embedding's weight is [V, d]: b a transposed
            self.loaded = (pair, (b.T, a.T) if pair.embedding else (a, b))
        return self.loaded[1]

    def _pattern(self, key, module, default):
        """PEFT's rank_pattern and alpha_pattern: the first key that matches the name's end."""
        values = self.config.object(key)
        for pattern in values.values:
            try:
                if re.match(r"(.*\.)?(%s)$" % pattern, module):
                    return values.real(pattern)
            except re.error:
                values.bad(pattern, "a regular expression as key")
        return default

    def _scale(self, module, rank):
        c = self.config
        expected = self._pattern("rank_pattern", module, c.whole("r"))
        if rank != expected:
            raise ConvertError("%s: %s: found rank %d, expected %d from adapter_config.json"
                               % (self.path, module, rank, expected))
        alpha = self._pattern("alpha_pattern", module, c.real("lora_alpha", 8.0))
        return alpha / (rank ** 0.5 if c.flag("use_rslora") else rank)

    def check_all_used(self):
        left = [p.name for name, p in self.pairs.items() if name not in self.used]
        if left:
            raise ConvertError("%s: %s: found an adapter for it, expected a matrix of the model%s"
                               % (self.path, left[0],
                                  "" if len(left) == 1 else " (and %d more)" % (len(left) - 1)))
