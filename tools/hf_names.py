"""Which tensor of a checkpoint is which, under any prefix that its writer put before the names."""
import collections
import re

from files import ConvertError

VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|multi_modal_projector|audio_tower)\.")
# Segments that wrappers of torch put before and into names.
WRAPPERS = re.compile(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
# re.S: what begins as the name of a module is one, whatever bytes follow; trying every beginning of
# a hostile name to its end would take the square of its length.
MTP = re.compile(r"(?:|.*?\.)(mtp\.(?:fc|pre_fc_norm_embedding|pre_fc_norm_hidden|norm|layers\.\d+|"
                 r"embed_tokens|shared_head)\..*)", re.S)
HEAD = re.compile(r"(?:|(?!.*\blayers\.).*\.)((?:lm_head|score)\.(?:weight|bias)\w*)", re.S)
TRUNK = re.compile(r"(|.*?\.)(?:embed_tokens|layers\.\d+)\.", re.S)
# What transformers writes: taken where a file has one of these and another prefix.
KNOWN = ("model.", "model.language_model.", "language_model.model.", "")


def unwrapped(name):
    return WRAPPERS.sub(r"\1", name)


class Names:
    """The prefix of the text model's tensors, found from all names of a checkpoint."""

    def __init__(self, names, where):
        counts, self.found = collections.Counter(), {}
        for name in names:
            bare = unwrapped(name)
            trunk = None if VISION.search(bare) or MTP.fullmatch(bare) else TRUNK.match(bare)
            if trunk:
                counts[trunk.group(1)] += 1
                # as it stands there, unless a wrapper stands inside "layers.0"
                self.found.setdefault(trunk.group(1), (TRUNK.match(name) or trunk).group(1))
        self.prefix = self._choose(counts, where)

    @staticmethod
    def _choose(counts, where):
        if not counts:
            return "model."
        most = max(counts.values())
        likely = [prefix for prefix, n in counts.items() if 2 * n > most]
        known = [prefix for prefix in KNOWN if prefix in likely]
        if not known and len(likely) > 1:
            raise ConvertError("%s: found the tensors of two models, %s and %s, expected one"
                               % (where, likely[0], likely[1]))
        return (known or likely)[0]

    def plain(self, name):
        """The name that the text-only model of transformers gives a tensor; None for one of the
        vision tower; as it is for one that has no place in the model."""
        bare = unwrapped(name)
        if VISION.search(bare):
            return None
        special = MTP.fullmatch(bare) or HEAD.fullmatch(bare)
        if special:
            return special.group(1)
        return "model." + bare[len(self.prefix):] if bare.startswith(self.prefix) else bare

    def note(self):
        """What a person should know of the names; None if they are the usual ones."""
        found = self.found.get(self.prefix, "model.")
        if found == "model.":
            return None
        return "tensor names: found %s" % ("the prefix " + found if found else "no prefix")
