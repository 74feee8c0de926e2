"""Reading safetensors checkpoints, one file or many, with every number in them checked.

A file is: u64 header length, JSON header {name: {dtype, shape, data_offsets}}, data.
"""
import collections
import json
import os
import struct

import files
from files import ConvertError
from hf_names import MTP

MAX_HEADER = 100000000           # bytes; the format's own limit
MAX_TEXT = 1 << 28               # bytes of JSON and other texts: published tokenizers have 11 MB
OPEN_FILES = 16                  # at once
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}
# All that the format knows; those without a size here are smaller than a byte or newer.
DTYPES = tuple(DTYPE_BYTES) + ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
                               "C64")
MAX_DIMS = 8
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Entry = collections.namedtuple("Entry", "dtype shape offset bytes store")


def load_json(path, what="an object"):
    """A JSON file whose top is an object."""
    data = files.read_input(path, MAX_TEXT)
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise ConvertError("%s: not valid JSON: %s" % (path, e))
    if not isinstance(value, dict):
        raise ConvertError("%s: found a JSON %s, expected %s" % (path, type(value).__name__, what))
    return value


class Store:
    """One file, opened when it is read; the least recently read ones are closed again."""

    opened = collections.OrderedDict()

    def __init__(self, path):
        self.path = path

    def read(self, offset, n):
        f = Store.opened.pop(self.path, None)
        if f is None:
            while len(Store.opened) >= OPEN_FILES:
                Store.opened.popitem(last=False)[1].close()
            f = files.open_input(self.path)
        Store.opened[self.path] = f
        try:
            f.seek(offset)
            data = f.read(n)
        except OSError as e:
            raise ConvertError("%s: cannot read: %s" % (self.path, e.strerror))
        if len(data) != n:
            raise ConvertError("%s: found the end of the file at byte %d, expected %d more bytes"
                               % (self.path, offset + len(data), n - len(data)))
        return data

    @staticmethod
    def close_all():
        while Store.opened:
            Store.opened.popitem()[1].close()


def _unique(pairs):
    out = {}
    for key, value in pairs:
        if key in out:
            raise ValueError("%s stands twice" % key)
        out[key] = value
    return out


def read_header(path):
    """Entries by name of one file."""
    store = Store(path)
    with files.open_input(path) as f:
        size = os.fstat(f.fileno()).st_size
    if size < 8:
        raise ConvertError("%s: found %d bytes, expected at least 8: truncated" % (path, size))
    (n,) = struct.unpack("<Q", store.read(0, 8))
    if n > MAX_HEADER:
        raise ConvertError("%s: header: found a length of %d bytes, expected at most %d"
                           % (path, n, MAX_HEADER))
    if 8 + n > size:
        raise ConvertError("%s: header: found %d bytes, expected %d: truncated"
                           % (path, size - 8, n))
    try:
        header = json.loads(store.read(8, n).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise ConvertError("%s: header: not valid JSON: %s" % (path, e))
    if not isinstance(header, dict):
        raise ConvertError("%s: header: found a JSON %s, expected an object"
                           % (path, type(header).__name__))
    header.pop("__metadata__", None)
    return collections.OrderedDict(
        (name, _entry(path, store, name, value, 8 + n, size)) for name, value in header.items())


def _is_counts(value, n=None):
    return (isinstance(value, list) and (n is None or len(value) == n)
            and all(type(v) is int and 0 <= v < 1 << 63 for v in value))


def _entry(path, store, name, value, data_start, size):
    """One header entry, checked against the file."""
    def bad(found, expected):
        raise ConvertError("%s: %s: found %s, expected %s" % (path, name, found, expected))

    if not (isinstance(value, dict) and value.get("dtype") in DTYPES
            and _is_counts(value.get("shape")) and _is_counts(value.get("data_offsets"), 2)):
        bad(files.shown(value), "dtype, shape and data_offsets")
    begin, end = value["data_offsets"]
    if begin > end:
        bad("data_offsets %d > %d" % (begin, end), "begin <= end")
    if data_start + end > size:
        bad("data up to byte %d of a file of %d bytes" % (data_start + end, size),
            "data inside the file: truncated")
    if len(value["shape"]) > MAX_DIMS:
        bad("%d dimensions" % len(value["shape"]), "at most %d" % MAX_DIMS)
    if value["dtype"] in DTYPE_BYTES:
        expected = DTYPE_BYTES[value["dtype"]]
        for dim in value["shape"]:
            expected *= dim
        if end - begin != expected:
            bad("%d bytes" % (end - begin),
                "%d for %s %s" % (expected, value["dtype"], value["shape"]))
    return Entry(value["dtype"], tuple(value["shape"]), data_start + begin, end - begin, store)


def read_files(paths):
    """Entries by name of several files."""
    entries = collections.OrderedDict()
    for path in paths:
        for name, entry in read_header(path).items():
            if name in entries:
                raise ConvertError("%s: %s: found also in %s, expected it once"
                                   % (path, name, entries[name].store.path))
            entries[name] = entry
    return entries


def read_indexed(index_path):
    """Entries of the shards that the index names, and the shards' names."""
    index = load_json(index_path)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise ConvertError("%s: weight_map: found none, expected {tensor: file}" % index_path)
    folder = os.path.dirname(index_path)
    shards = sorted(set(places.values()))
    for shard in shards:
        if os.path.basename(shard) != shard or shard in ("", ".", ".."):
            raise ConvertError("%s: found the file name %r, expected one without a path"
                               % (index_path, shard))
    gone = [s for s in shards if not os.path.exists(os.path.join(folder, s))]
    if gone:
        raise ConvertError("%s: found no %s, expected %d shards beside it"
                           % (index_path, ", ".join(gone), len(shards)))
    entries = collections.OrderedDict()
    for shard in shards:
        for name, entry in read_header(os.path.join(folder, shard)).items():
            # as transformers: all that the shards hold, but what the index gives to another
            if places.get(name, shard) != shard:
                continue
            if name in entries:
                raise ConvertError("%s: %s: found in %s and %s and not in the index, expected it "
                                   "once" % (folder, name,
                                             os.path.basename(entries[name].store.path), shard))
            entries[name] = entry
    gone = [name for name in places if name not in entries]
    if gone:
        raise ConvertError("%s: %s: found in the index, expected in %s%s" % (
            index_path, gone[0], places[gone[0]],
            "" if len(gone) == 1 else " (and %d more)" % (len(gone) - 1)))
    return entries, shards


def open_checkpoint(path):
    """(entries, notes) of a folder, an index or a file.  As transformers: in a folder
    model.safetensors comes before an index."""
    if not os.path.isdir(path):
        if path.endswith(".index.json"):
            return read_indexed(path)[0], []
        return read_files([path]), []
    names = sorted(n for n in os.listdir(path)
                   if n.endswith(".safetensors") and not n.startswith("adapter_"))
    notes, index = [], os.path.join(path, INDEX)
    if WHOLE in names:
        if os.path.exists(index):
            notes.append("found %s beside %s: not used, as in transformers" % (INDEX, WHOLE))
        entries, used = read_files([os.path.join(path, WHOLE)]), [WHOLE]
    elif os.path.exists(index):
        entries, used = read_indexed(index)
    else:
        entries, used = read_files([os.path.join(path, n) for n in names]), names
    if not used:
        old = [n for n in os.listdir(path) if n.endswith((".bin", ".pt", ".pth"))]
        raise ConvertError("%s: found %s, expected *.safetensors%s" % (
            path, old[0] if old else "no weights",
            ": save the model with safe_serialization first" if old else ", .keras or .weights.h5"))
    _add_mtp(path, entries, [n for n in names if n not in used], notes)
    return entries, notes


def _add_mtp(folder, entries, names, notes):
    """Of files beside a checkpoint: that of a multi-token-prediction module, which an index may
    leave out.  It holds nothing else."""
    others = []
    for file in names:
        try:
            found = read_header(os.path.join(folder, file))
        except ConvertError:             # not needed: it is told below
            found = None
        if found and all(MTP.fullmatch(name) for name in found) \
                and not any(MTP.fullmatch(name) for name in entries):
            entries.update(found)
            notes.append("%s: an MTP module" % file)
        else:
            others.append(file)
    if others:
        notes.append("%d files that are not part of the checkpoint were passed over: %s%s" % (
            len(others), ", ".join(others[:3]), ", ..." if len(others) > 3 else ""))
