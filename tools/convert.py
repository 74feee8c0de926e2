#!/usr/bin/env python3
"""Convert a published checkpoint into a .q3n model file.

CHECKPOINT is a folder with config.json and *.safetensors, one .safetensors file or index, or a
Keras file (.keras, .weights.h5).  Python 3.8 and the standard library are enough for safetensors;
FP8 and LoRA need numpy, Keras files need h5py, quantised types the library that `make` builds.
"""
import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
import zlib

import files
import hf_checkpoint
import hf_config
import matrix
import q3n_file
import quantize
import safetensors_file
import tokenizer_file
from hf_config import Json, text_part
from q3n_file import ConvertError

BLOCK_BYTES = 8 << 20            # of a matrix as f32, in memory at once
VERSION = "convert.py 1"
NAME = "convert.py"              # of the command


# ---- Arguments ----

def parse_arguments(argv, recipes):
    p = argparse.ArgumentParser(prog=NAME, description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", metavar="CHECKPOINT")
    p.add_argument("out", metavar="OUT.q3n")
    p.add_argument("--type", choices=recipes,
                   help="of matrices (default: as in the checkpoint); a recipe names the type of "
                   "the experts")
    p.add_argument("--lora", metavar="DIR", help="merge this PEFT adapter")
    p.add_argument("--name", help="of the model (default: the checkpoint's)")
    p.add_argument("--tokenizer", metavar="DIR", help="take the tokenizer from this folder")
    p.add_argument("--no-tokenizer", action="store_true", help="write a file that works on ids")
    p.add_argument("--config", metavar="JSON", help="use this file instead of config.json")
    p.add_argument("--set", metavar="KEY=VALUE", action="append", default=[],
                   help="override a key of the checkpoint's configuration (VALUE is JSON or text)")
    p.add_argument("--pooling", choices=("last", "first", "mean"),
                   help="token that a classifier looks at")
    p.add_argument("--no-mtp", action="store_true",
                   help="leave the multi-token-prediction module out")
    p.add_argument("--allow-nan", action="store_true",
                   help="go on with weights that are NaN or infinite (not into quantised types)")
    p.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress and no notes")
    args = p.parse_args(argv)
    if args.tokenizer and args.no_tokenizer:
        p.error("--tokenizer and --no-tokenizer exclude each other")
    overrides = {}
    for item in args.set:
        key, equals, value = item.partition("=")
        if not key or not equals:
            p.error("--set %s: expected KEY=VALUE" % item)
        try:
            overrides[key] = json.loads(value)
        except ValueError:
            overrides[key] = value
    args.set = overrides
    return args


# ---- Plan ----

def is_keras(path):
    return path.endswith((".keras", ".h5", ".hdf5"))


def find_checkpoint(path):
    """A folder that holds one Keras file and no safetensors stands for that file."""
    if not os.path.exists(path):
        name = re.match(r"[\w-][\w.-]*/[\w.-]+$", path)
        hint = (": if it is on the Hugging Face hub, download it (hf download %s --local-dir DIR) "
                "and give the folder" % path)
        raise ConvertError("%s: no such file or folder%s" % (path, hint if name else ""))
    if os.path.isdir(path):
        names = os.listdir(path)
        keras = [n for n in names if is_keras(n)]
        if len(keras) == 1 and not any(n.endswith(".safetensors") for n in names):
            return os.path.join(path, keras[0])
    elif not is_keras(path) and not path.endswith((".safetensors", ".index.json")):
        raise ConvertError("%s: found another kind of file, expected .safetensors, .index.json, "
                           ".keras or .weights.h5" % path)
    return path


def make_plan(args, definitions):
    """The plan, with name, tokenizer and special ids in its config."""
    path = find_checkpoint(args.checkpoint)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    if is_keras(path):
        import keras_checkpoint
        if args.lora:
            raise ConvertError("%s: found a Keras file, expected safetensors for --lora" % path)
        raw = dict(safetensors_file.load_json(args.config) if args.config else {}, **args.set)
        plan = keras_checkpoint.plan(path, raw)
        plan.raw.overrides = args.set
        name = os.path.basename(path).split(".")[0]
    else:
        plan = plan_safetensors(args, path, folder, definitions)
        name = os.path.basename(os.path.abspath(folder))
    try:
        plan.config["name"] = name if args.name is None else args.name
        plan.config["converter"] = VERSION
        add_labels(plan)
        add_tokenizer(plan, args, folder, definitions)
        hf_config.check_overrides(plan.raw, plan.config["family"])
    except BaseException:
        plan.close()
        raise
    return plan


def plan_safetensors(args, path, folder, definitions):
    adapter = None
    if args.lora:
        import lora
        adapter = lora.Adapter(args.lora)
    config_path = args.config or os.path.join(folder, "config.json")
    raw = hf_config.override(safetensors_file.load_json(config_path), args.set, config_path)
    entries, notes = safetensors_file.open_checkpoint(path)
    plan = hf_checkpoint.plan(entries, raw, path, definitions.check_config, adapter, args.no_mtp)
    plan.notes += notes
    return plan


PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def add_labels(plan):
    """What the scores of a classifier are, and the names of its labels."""
    plan.config["problem_type"] = "none"
    n = plan.config["num_labels"]
    if not n:
        return
    raw = Json(plan.raw, plan.where)
    c = raw if raw.has("problem_type") or raw.has("id2label") else text_part(plan.raw, plan.where)
    problem = c.word("problem_type")
    if problem and problem not in PROBLEMS:
        c.bad("problem_type", "one of %s" % ", ".join(PROBLEMS))
    plan.config["problem_type"] = problem or "none"
    names = c.object("id2label").values
    labels = [names.get(str(i)) for i in range(n)]
    if names and (len(names) != n or not all(isinstance(name, str) for name in labels)):
        plan.warnings.append("%s: id2label: found %d names, expected one for each of 0 .. %d: the "
                             "labels have numbers" % (plan.where, len(names), n - 1))
    elif names:
        plan.config["labels"] = labels


def add_tokenizer(plan, args, folder, definitions):
    source, vocab_size = args.tokenizer or folder or ".", plan.config["vocab_size"]
    tokenizer = None
    if not args.no_tokenizer:
        tokenizer = tokenizer_file.load(source, plan.config["family"], vocab_size)
        if tokenizer is None and args.tokenizer:
            raise ConvertError("%s: found no tokenizer.json, expected it or vocab.json" % source)
    plan.config.update(tokenizer_file.special_ids(source, plan, tokenizer))
    plan.config["chat"] = "none"
    if tokenizer is None:
        plan.notes.append("no tokenizer: the file works on token ids")
        return
    plan.warnings += tokenizer.warnings
    plan.tokenizer = tokenizer.pack(vocab_size, definitions)
    plan.config["chat"] = tokenizer_file.chat_kind(tokenizer_file.chat_template(source))
    plan.config["tokenizer_pattern"] = tokenizer.pattern
    plan.config["tokenizer_nfc"] = tokenizer.nfc
    for key, ids in (("prefix", tokenizer.prefix), ("suffix", tokenizer.suffix)):
        if ids:
            plan.config["tokenizer_" + key] = ids


def choose_types(plan, wanted, definitions):
    """The file's tensors, in the groups of the plan."""
    groups, rounded = [], False
    for group in plan.groups:
        tensors = []
        for out in group:
            keep = matrix.common([m.keep for m in out.slices])
            name = "f32" if out.vec else keep
            if wanted and not out.vec:
                name = quantize.type_of(out.name, definitions.recipes[wanted], keep)
            rounded = rounded or (not wanted and not out.vec and name != "f32"
                                  and any(m.type == "f32" for m in out.slices))
            tensors.append(q3n_file.Tensor(out.name, definitions.types[name], out.dims))
        groups.append(tensors)
    if rounded:
        plan.notes.append("what is computed in f32 (FP8, LoRA) is rounded to the checkpoint's "
                          "type; --type f32 keeps every bit")
    return groups


# ---- Reports ----

def say(text):
    sys.stderr.write("%s: %s\n" % (NAME, text))


def size_text(n):
    for unit in ("bytes", "KiB", "MiB"):
        if n < 1024:
            return "%d %s" % (n, unit) if unit == "bytes" else "%.1f %s" % (n, unit)
        n /= 1024.0
    return "%.2f GiB" % n


def print_plan(plan, groups, file_bytes):
    for key, value in plan.config.items():
        print("config  %-32s %s" % (key, files.line(str(value))))
    for outs, tensors in zip(plan.groups, groups):
        for out, t in zip(outs, tensors):
            print("tensor  %-56s %-5s %-20s %12d bytes  <- %s" % (
                t.name, t.type.name, list(t.dims), t.bytes, files.line(out.source)))
    for name, why in plan.skipped:
        print("skipped %-56s %s" % (files.line(name), why))
    print("total   %d tensors, %d bytes (%s)" % (
        sum(len(g) for g in groups), file_bytes, size_text(file_bytes)))


def report(plan):
    """Warnings, notes and what was skipped, on stderr."""
    for text in plan.warnings:
        say("warning: %s" % files.line(text))
    for text in plan.notes:
        say("note: %s" % files.line(text))
    reasons = {}
    for name, why in plan.skipped:
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        say("skipped %d tensor%s (%s): %s" % (len(names), "" if len(names) == 1 else "s", why,
                                              files.line(shown)))


class Progress:
    """A bar where stderr is a terminal; elsewhere a line at each quarter of long work."""

    WIDTH = 30
    LINE_SECONDS = 2.0                   # between lines, at least

    def __init__(self, total, quiet):
        self.total, self.quiet = max(total, 1), quiet
        self.bar = sys.stderr.isatty()
        self.done, self.start = 0, time.time()
        self.shown, self.quarter = 0.0, 1

    def add(self, n):
        self.done += n
        if self.quiet:
            return
        now = time.time()
        if self.bar and (now - self.shown > 0.1 or self.done >= self.total):
            self.shown = now
            sys.stderr.write("\r" + self.line(now, True) + "\x1b[K")
            sys.stderr.flush()
        elif not self.bar and 4 * self.done >= self.quarter * self.total \
                and now - max(self.shown, self.start) > self.LINE_SECONDS:
            self.shown = now
            self.quarter = 4 * self.done // self.total + 1
            say(self.line(now, False))

    def line(self, now, bar):
        part, rate = self.done / self.total, self.done / max(now - self.start, 1e-3)
        left = int((self.total - self.done) / max(rate, 1.0))
        full = int(part * self.WIDTH)
        return "%s%3d %%  %s of %s  %s/s  %d:%02d left" % (
            "[%s%s] " % ("#" * full, "-" * (self.WIDTH - full)) if bar else "", int(100 * part),
            size_text(self.done), size_text(self.total), size_text(rate), left // 60, left % 60)

    def end(self):
        if self.bar and not self.quiet and self.shown:
            sys.stderr.write("\n")


# ---- Writing ----

class Writer:
    """Writes the tensors of a plan into an open file, a block of rows at a time."""

    def __init__(self, f, progress, encoder, allow_nan):
        self.f, self.progress, self.allow_nan = f, progress, allow_nan
        self.encoder = encoder               # None = nothing is quantised

    def encode(self, m, start, data, count, type_):
        try:
            return self.encoder.encode(type_, data, count, m.cols)
        except ValueError as e:
            raise ConvertError("%s: in the rows from %d on: %s" % (m.source, start + e.args[0],
                                                                   e.args[1]))

    def blocks(self, m, type_):
        """(first row, rows, data): as floats of the type, or f32 if it is quantised."""
        name = type_.name if type_.block_len == 1 else "f32"
        for start, count in m.blocks(BLOCK_BYTES, quantize.TILE_ROWS if self.encoder else 1):
            try:
                yield start, count, matrix.convert(m.read(start, count), m.type, name)
            except OverflowError as e:
                raise ConvertError("%s: found the value %g, expected at most 65504 for f16: use "
                                   "--type bf16 or f32" % (m.source, e.args[0]))

    def slice(self, tensor, m, at):
        """One slice at offset at.  The tensor's checksum goes on."""
        self.f.write(bytes(at - self.f.tell()))      # at most a gap between tensors
        first, n_bad = None, 0
        for start, count, data in self.blocks(m, tensor.type):
            index, n = matrix.not_finite(data, tensor.type.name)
            if n and first is None:
                first = start * m.cols + index
            n_bad += n
            if n_bad and not self.allow_nan:
                continue                             # count them all, write no more
            if tensor.type.block_len > 1:
                data = self.encode(m, start, data, count, tensor.type)
            tensor.crc = zlib.crc32(data, tensor.crc)
            self.f.write(data)
            self.progress.add(len(data))
        if n_bad:
            self.report(m, first, n_bad)

    def report(self, m, first, n):
        where = "index %d" % first if m.rows == 1 else "row %d, column %d" % divmod(first, m.cols)
        text = "%s: found NaN or infinity in %d of %d values, the first at %s" % (
            m.source, n, m.rows * m.cols, where)
        if not self.allow_nan:
            raise ConvertError(text + ", expected finite numbers (--allow-nan goes on)")
        say("warning: %s" % text)

    def plan(self, plan, groups, meta, file_bytes):
        """Everything: room for the metadata, data in the order of their offsets, then meta()."""
        self.f.write(bytes(len(meta())))
        for outs, tensors in zip(plan.groups, groups):
            for e in range(tensors[0].n_slices):
                for out, t in zip(outs, tensors):
                    self.slice(t, out.slices[e], t.slice_offset(e))
        self.f.write(bytes(file_bytes - self.f.tell()))
        self.f.seek(0)
        self.f.write(meta())


def check_room(path, file_bytes):
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise ConvertError("%s: found no folder %s, expected it to exist" % (path, folder))
    free = shutil.disk_usage(folder).free
    if free < file_bytes:
        raise ConvertError("%s: found %s free on the disk, expected at least %s"
                           % (path, size_text(free), size_text(file_bytes)))


def convert(args, definitions):
    files.inputs.clear()
    plan = make_plan(args, definitions)
    try:
        write_plan(plan, args, definitions)
    finally:
        plan.close()


def write_plan(plan, args, definitions):
    if args.pooling:
        plan.config["pooling"] = args.pooling
    definitions.check_config(plan.config, plan.where)
    groups = choose_types(plan, args.type, definitions)
    tensors = [t for group in groups for t in group]

    def meta(file_bytes=0):
        return q3n_file.pack_meta(plan.config, tensors, plan.tokenizer, file_bytes, definitions)

    file_bytes = q3n_file.place(groups, len(meta()))
    if args.dry_run:
        print_plan(plan, groups, file_bytes)
    if not args.quiet:
        report(plan)
    if args.dry_run:
        return
    check_room(args.out, file_bytes)
    progress = Progress(sum(t.bytes for t in tensors), args.quiet)
    try:
        with files.Output(args.out) as f:
            quantised = any(t.type.block_len > 1 for t in tensors)
            encoder = quantize.Encoder(definitions.abi) if quantised else None
            Writer(f, progress, encoder, args.allow_nan).plan(
                plan, groups, lambda: meta(file_bytes), file_bytes)
    finally:
        progress.end()
    if not args.quiet:
        say("wrote %s: %d tensors, %s" % (args.out, len(tensors), size_text(file_bytes)))


def terminate(number, _):
    raise KeyboardInterrupt(number)


def main(argv):
    files.print_any(sys.stdout)
    try:
        definitions = q3n_file.Definitions()
        args = parse_arguments(argv, list(definitions.recipes))
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)         # Windows has no SIGHUP; nohup ignores it
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, terminate)
        convert(args, definitions)
    except ConvertError as e:
        for text in str(e).split("\n"):
            say("error: %s" % files.line(text))
        return 1
    except OSError as e:
        say("error: %s: %s" % (e.filename or "file", e.strerror or e))
        return 1
    except UnicodeEncodeError as e:
        say("error: found the text %a, expected valid Unicode" % e.object[:60])
        return 1
    except KeyboardInterrupt as e:
        say("interrupted: nothing was written")
        return 128 + (e.args[0] if e.args else signal.SIGINT)
    finally:
        safetensors_file.Store.close_all()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
