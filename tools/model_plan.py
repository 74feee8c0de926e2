"""What a converter hands to the writer: configuration, output tensors, what was passed over."""
import struct

from files import ConvertError, line
from matrix import Bytes, Rows


MAX_PROBLEMS = 12                # that are told line by line
MAX_EXAMPLES = 6


class Output:
    """One tensor of the .q3n file: dims and the matrices of its slices (one, or one an expert).
    vec: always f32; otherwise the type is the one asked for, or the checkpoint's own."""

    __slots__ = ("name", "dims", "slices", "vec")

    def __init__(self, name, dims, slices, vec=False):
        self.name, self.dims, self.slices, self.vec = name, tuple(dims), slices, vec

    @property
    def source(self):
        first = self.slices[0].source
        if len(self.slices) == 1:
            return first
        return "%s (and %d more)" % (first, len(self.slices) - 1)


class Plan:
    """config {key: value}, groups [[Output, ..], ..] in the order of the file (a group of three are
    the experts of a layer), skipped [(tensor, reason)], notes and warnings [text]."""

    def __init__(self, where):
        self.where = where               # the checkpoint, for messages
        self.config, self.groups, self.skipped = {}, [], []
        self.raw = {}                    # config.json, for the special ids it names
        self.notes, self.warnings, self.problems = [], [], []
        self.hints, self.n_problems, self.n_missing = {}, 0, 0
        self.no_mtp = False              # --no-mtp
        self.tokenizer = b""             # the TOKENIZER section, empty if there is none

    def close(self):
        """Let go of the checkpoint's files."""

    def mat(self, name, matrix):
        self.groups.append([Output(name, (matrix.rows, matrix.cols), [matrix])])

    def vec(self, name, matrix, dims=None):
        self.groups.append([Output(name, dims or (matrix.cols,), [matrix], vec=True)])

    def experts(self, prefix, gate, up, down):
        """gate, up, down: a list of matrices each, by expert."""
        self.groups.append([
            Output("%s%s_proj.weight" % (prefix, part), (len(m), m[0].rows, m[0].cols), m)
            for part, m in (("gate", gate), ("up", up), ("down", down))])

    def problem(self, name, found, expected):
        self.n_problems += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(line("%s: found %s, expected %s" % (name, found, expected)))

    def hint(self, prefix, text):
        """What to do if tensors whose names start like this are missing."""
        self.hints[prefix] = text

    def missing(self, name, shape):
        self.n_missing += 1
        expected = str(list(shape))
        for prefix in [prefix for prefix in self.hints if name.startswith(prefix)]:
            expected += ", " + self.hints.pop(prefix)    # said once
        self.problem(name, "nothing", expected)

    def finish(self, unknown=()):
        """Raise the problems together: all of a few, of many how many and some of them, and what
        the checkpoint has that the model does not know."""
        if not self.problems:
            return
        lines = self.problems
        if self.n_problems > len(lines):
            lines = ["found %d of the model's tensors missing and %d of another shape or type, "
                     "such as" % (self.n_missing, self.n_problems - self.n_missing)] + lines
        if unknown:
            lines = lines + ["found %d tensors that have no place in the model: %s%s" % (
                len(unknown), line(", ".join(unknown[:MAX_EXAMPLES])),
                ", ..." if len(unknown) > MAX_EXAMPLES else "")]
        raise ConvertError("\n".join("%s: %s" % (self.where, text) for text in lines))


def f32_vector(values, source, cols=None):
    """[1, n] or [n / cols, cols] in memory, rounded to f32."""
    cols = cols or len(values)
    data = struct.pack("<%df" % len(values), *values)
    return Bytes(len(values) // cols, cols, "f32", source, data)


def one_plus(matrix):
    """1 + w as f32.  Python's sum in doubles, rounded once more, is the f32 sum: it is inexact only
    where |w| < 2^-28 or |w| > 2^53, far from the midpoint of two f32 neighbours."""
    return f32_vector([1.0 + w for w in matrix.floats()], "1 + " + matrix.source)


def ranges(matrix, parts, source):
    """Rows of one matrix in another order: parts are (start, count)."""
    return Rows([(matrix, start, count) for start, count in parts], source)


def below(matrices):
    return Rows([(m, 0, m.rows) for m in matrices], " | ".join(m.source for m in matrices))
