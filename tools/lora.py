"""LoRA adapters as PEFT saves them, merged into the checkpoint's matrices while they are read."""
import os
import re

import hf_checkpoint
import matrix
from files import ConvertError, shown
from hf_config import Json
from hf_names import Names
from safetensors_file import load_json, read_header

PREFIX = "base_model.model."
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Keys of adapter_config.json [PEFT 0.21, LoraConfig].  HONOURED: read here.  HARMLESS: they concern
# training, where the model was found, or which modules the tensors belong to, which their names
# say.  Any other key that is set is refused: it may change what is computed.
HONOURED = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
            "task_type", "init_lora_weights", "modules_to_save", "ensure_weight_tying")
HARMLESS = ("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
            "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform",
            "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
            "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
            "velora_config")
TASKS = ("", "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")
# What to do with an adapter that is refused.
MERGE = "; else merge the adapter with peft (merge_and_unload) and convert the result"
# Ways to begin that leave the base model's weights as they are.
BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


def check_config(c):
    if c.word("peft_type", "LORA") != "LORA":
        c.bad("peft_type", '"LORA"')
    if c.word("bias", "none") != "none":
        c.bad("bias", '"none"')
    if c.word("task_type") not in TASKS:
        c.bad("task_type", "one of %s" % ", ".join(TASKS[1:]))
    if c.values.get("init_lora_weights") not in BEGINNINGS:
        c.bad("init_lora_weights", "one that leaves the base model as it is" + MERGE)
    if c.values.get("target_parameters"):
        c.bad("target_parameters", "none: adapters of fused experts are not known here" + MERGE)
    for key, value in c.values.items():
        if value and key not in HONOURED + HARMLESS:
            c.bad(key, "none" + MERGE)
    c.whole("r", 8, least=1)


class Patterns:
    """rank_pattern or alpha_pattern: the first key counts that is, as a regular expression, a
    module's name or its end after a dot.  PEFT writes a plain name for each of thousands of
    modules: these are looked up.  Others are followed as far as their time has a bound."""

    NAME = re.compile(r"\w+(?:\.\w+)*")
    MAX_LENGTH = 200                     # characters of a key, and of a name if there are patterns
    MAX_PATTERNS = 16                    # that are no plain names
    MAX_CHOICES = 3                      # repetitions in one, and groups

    def __init__(self, values):
        self.values, self.numbers = values, [values.real(key) for key in values.values]
        self.names, self.patterns = {}, []
        for place, key in enumerate(values.values):
            if len(key) <= self.MAX_LENGTH and self.NAME.fullmatch(key):
                self.names[key] = place
            elif len(self.patterns) < self.MAX_PATTERNS:
                self.patterns.append((place, self._compile(key)))
            else:
                raise ConvertError("%s: found %s, expected at most %d keys that are no plain "
                                   "names%s" % (values.where, shown(key), self.MAX_PATTERNS, MERGE))

    def _compile(self, key):
        # Repeated groups, and many choices one after the other, take a time that doubles with each.
        choices = re.sub(r"\(\?", "(", key)
        if len(key) > self.MAX_LENGTH or re.search(r"\)[*+?{]", key) \
                or len(re.findall(r"[*+?{]", choices)) > self.MAX_CHOICES \
                or choices.count("(") > self.MAX_CHOICES:
            self.values.bad(key, "a name or a short pattern of one as key" + MERGE)
        try:
            return re.compile(r"(.*\.)?(%s)$" % key)       # as PEFT
        except (re.error, OverflowError):
            self.values.bad(key, "a regular expression as key")

    def _place(self, module):
        """Of the first plain name that counts; their number if none does."""
        place, at = len(self.numbers), len(module)
        while at >= 0:
            at = module.rfind(".", 0, at)
            end = module[at + 1:]
            if len(end) > self.MAX_LENGTH:
                break
            place = min(place, self.names.get(end, place))
        return place

    def value(self, module, default):
        if self.patterns and len(module) > self.MAX_LENGTH:
            raise ConvertError("%s: found the module %s of %d characters, expected at most %d, or "
                               "plain names as keys%s" % (self.values.where, shown(module, 60),
                                                          len(module), self.MAX_LENGTH, MERGE))
        place = self._place(module)
        for earlier, pattern in self.patterns:
            if earlier < place and pattern.match(module):
                place = earlier
        return self.numbers[place] if place < len(self.numbers) else default


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
        check_config(c)
        self.ranks, self.alphas = (Patterns(c.object(k)) for k in ("rank_pattern", "alpha_pattern"))
        self.pairs, self.whole, self.used, self.loaded = {}, {}, set(), (None, None)
        self.vision = []
        if not os.path.exists(self.path) and os.path.exists(self.path[:-11] + "bin"):
            raise ConvertError("%s: found adapter_model.bin, expected this file: save the adapter "
                               "with peft's safe_serialization=True" % self.path)
        tensors = read_header(self.path)
        parts = {name: self._split(name) for name in tensors}
        names = Names([tensor for tensor, _, _ in parts.values()], self.path)
        for name, (tensor, module, letter) in parts.items():
            plain = names.plain(tensor)
            if plain is None:
                self.vision.append(name)
            elif letter is None:
                self._check_once(name, self.whole.get(plain))
                self.whole[plain] = (name, tensors[name])
            else:
                pair, part = self.pairs.setdefault(plain, Pair(module)), letter[-1].lower()
                self._check_once(name, getattr(pair, part))
                pair.embedding = pair.embedding or "embedding" in letter
                setattr(pair, part, tensors[name])
        for pair in self.pairs.values():
            if pair.a is None or pair.b is None:
                raise ConvertError("%s: %s: found lora_%s, expected lora_A and lora_B"
                                   % (self.path, pair.name, "A" if pair.b is None else "B"))

    def _check_once(self, name, other):
        if other is not None:
            raise ConvertError("%s: %s: found it under two names, expected it once"
                               % (self.path, name))

    def _split(self, name):
        """The base model's tensor, its module, and "A", "B", "embedding_A", "embedding_B", or None
        for a tensor saved in full."""
        if not name.startswith(PREFIX):
            raise ConvertError("%s: %s: found another prefix, expected %s"
                               % (self.path, name, PREFIX))
        bare = name[len(PREFIX):]
        m = re.match(r"(.*)\.lora_((?:embedding_)?[AB])(?:\.default)?(?:\.weight)?$", bare)
        if m:
            return m.group(1) + ".weight", m.group(1), m.group(2)
        if ".lora_" in bare:
            raise ConvertError("%s: %s: found an adapter tensor, expected lora_A or lora_B"
                               % (self.path, name))
        return re.sub(r"\.(?:modules_to_save(?:\.default)?|base_layer)\.", ".", bare), None, None

    def attach(self, tensors, tied):
        """Full tensors take the place of the checkpoint's; the others wait for merge.  tied: the
        checkpoint's head is its embedding, of which an adapter changes one and not the other."""
        tensors.adapter = self
        tensors.plan.skipped += [(name, "vision") for name in self.vision]
        if tied:
            self._untie(tensors)
        for name, (original, entry) in self.whole.items():
            if name not in tensors and name not in (HEAD, "score.weight", "score.bias"):
                raise ConvertError("%s: %s: found a tensor that the checkpoint has not, expected "
                                   "one of its own" % (self.path, original))
            tensors.entries[name] = entry
            tensors.original[name] = original

    def _untie(self, tensors):
        """As PEFT computes: an adapter of the embedding leaves the head as it is, one of the head
        leaves the embedding.  What modules_to_save does not name is loaded into both."""
        saved = self.config.items("modules_to_save", str)
        apart = HEAD in self.pairs or EMBED in self.pairs or HEAD in self.whole \
            or EMBED in self.whole and "embed_tokens" in saved
        if not apart or EMBED not in tensors:
            return
        if self.config.flag("ensure_weight_tying"):
            self.config.bad("ensure_weight_tying", "false: an adapter that ties head and embedding "
                            "is not known here" + MERGE)
        if HEAD not in tensors:
            tensors.entries[HEAD] = tensors.entries[EMBED]
            tensors.original[HEAD] = tensors.original[EMBED]
        # heads saved in full are compared with the embedding later
        tensors.untied = HEAD in self.pairs or EMBED in self.pairs or HEAD not in self.whole
        if tensors.untied:
            tensors.plan.notes.append("the adapter changes head or embedding alone: they are no "
                                      "longer tied")

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
            if entry.dtype not in hf_checkpoint.FLOATS or len(entry.shape) != 2 \
                    or 0 in entry.shape:
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

    def _scale(self, module, rank):
        c = self.config
        expected = self.ranks.value(module, c.whole("r", 8))
        if rank != expected:
            raise ConvertError("%s: %s: found rank %d, expected %d from adapter_config.json"
                               % (self.path, module, rank, expected))
        alpha = self.alphas.value(module, c.real("lora_alpha", 8.0))
        return alpha / (rank ** 0.5 if c.flag("use_rslora") else rank)

    def check_all_used(self):
        left = [p.name for name, p in self.pairs.items() if name not in self.used]
        if left:
            raise ConvertError("%s: %s: found an adapter for it, expected a matrix of the model%s"
                               % (self.path, left[0],
                                  "" if len(left) == 1 else " (and %d more)" % (len(left) - 1)))
