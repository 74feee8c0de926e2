#!/usr/bin/env python3
"""Measure the benchmark geometries and print a table; with peers, their speed beside ours.

usage: bench_table.py [--q3n COMMAND] [--geometries "g1 g2 g3"] [--types "q4 q8 bf16"]
                      [--threads LIST] [--repeat N] [--depth N] [--models DIR] [--out DIR]
                      [--bench-flags FLAGS]
                      [--peer "[NAME=]PATH ..."] [--peer-models DIR] [--peer-args ARGS] [--rounds N]

Each geometry is made once with random weights (DIR/bench_GEOMETRY_TYPE.q3n) and measured with
q3n bench: prefill of 512 tokens, 64 decoded tokens, for q4 also after --depth (4096) tokens.
A row is a median with minimum and maximum; the roof: see q3n bench --help.
What does not fit into memory or on the disk, and types that this build does not have, are passed
over.

A peer is a llama-bench program (of llama.cpp or a fork).  It runs on the files of --peer-models
whose name begins as g1-q4, g1-q8, g1-bf16: g1-q4_0.gguf, g1-iq4_nl.gguf.  Ours and the peers take
turns for --rounds rounds; the ratios (prefill, decode) are the medians of each round's.
--peer-args go to every peer, or "NAME: -fa 1; NAME: -rtr 1" to one each.  A peer without a name is
called by its directory.

The collected numbers are in OUT/GEOMETRY-TYPE[-PEER-FILE].json, in the form of q3n bench --json,
for tools/plot_bench.py."""
import argparse
import collections
import copy
import glob
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys

import q3n_file

PROMPT, TOKENS = 512, 64
DEPTH_TYPES = ("q4",)            # measured after a long text too
# Weights of the presets, to know what fits before it is made.
WEIGHTS = {"g1": 0.874e9, "g2": 6.73e9, "g3": 1.19e9}
SPARE_BYTES = 1 << 30            # memory for the session, the bandwidth's buffer, the system

Peer = collections.namedtuple("Peer", "name path args depth_option")


class Skip(Exception):
    """Why a row is not measured."""


def say(text):
    print(text, flush=True)


# ---- The machine ----

def available_memory():
    """Bytes, None if the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            fields = dict(line.split(":", 1) for line in f)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def check_memory(what, size):
    free = available_memory()
    if free is not None and size + SPARE_BYTES > free:
        raise Skip("%s needs %.1f GB of memory, %.1f are available"
                   % (what, (size + SPARE_BYTES) / 1e9, free / 1e9))


def default_threads():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- Running ----

def run_json(command):
    """What a program prints, as JSON; Skip with its last words if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False,
                          universal_newlines=True)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or ["status %d" % done.returncode]
        raise Skip("%s failed: %s" % (os.path.basename(command[0]), words[-1][:200]))
    try:
        return json.loads(done.stdout)
    except ValueError as e:
        raise Skip("%s printed no JSON: %s" % (os.path.basename(command[0]), e))


def make_model(args, geometry, type_name, types):
    """The path of the model file, made if it is not there."""
    path = os.path.join(args.models, "bench_%s_%s.q3n" % (geometry, type_name))
    t = types.get(type_name)
    if t is None:
        raise Skip("this version has no type %s" % type_name)
    size = WEIGHTS.get(geometry, 0) * t.block_bytes / t.block_len
    if os.path.exists(path):
        size = os.path.getsize(path)
    check_memory("%s %s" % (geometry, type_name), size)
    if os.path.exists(path):
        return path
    os.makedirs(args.models, exist_ok=True)
    free = shutil.disk_usage(args.models).free
    if 1.05 * size > free:
        raise Skip("%s %s needs %.1f GB on the disk, %.1f are free"
                   % (geometry, type_name, 1.05 * size / 1e9, free / 1e9))
    done = subprocess.run(args.q3n + ["init", path, "--preset", geometry, "--type", type_name,
                                      "--seed", "1"], stdout=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise Skip("%s %s could not be made" % (geometry, type_name))
    return path


def measure_ours(args, path, depths, repeats):
    return run_json(args.q3n + [
        "bench", path, "--json", "-p", str(PROMPT), "-n", str(TOKENS), "-t", args.threads,
        "-d", ",".join(map(str, depths)), "-r", str(repeats), "--limit", "900"] + args.bench_flags)


def measure_peer(args, peer, path, depths, repeats):
    """The results of llama-bench in our form."""
    base = [peer.path, "-m", path, "-t", args.threads, "-r", str(repeats), "-o", "json", *peer.args]
    tests = run_json(base + ["-p", str(PROMPT), "-n", str(TOKENS)])
    result = {"model": path, "name": "%s %s" % (peer.name, os.path.basename(path)),
              "prefill": [], "decode": []}
    for test in tests:
        if test["n_prompt"] and not test["n_gen"]:
            result["prefill"].append(peer_row(test, "n", test["n_prompt"]))
        elif test["n_gen"] and not test["n_prompt"]:
            result["decode"].append(peer_row(test, "depth", 0))
    for depth in depths:
        if depth == 0 or not peer.depth_option:
            continue
        if peer.depth_option == "-d":
            more = ["-p", "0", "-n", str(TOKENS), "-d", str(depth)]
        else:
            more = ["-p", "0", "-n", "0", "-gp", "%d,%d" % (depth, TOKENS)]
        result["decode"] += [peer_row(test, "depth", depth) for test in run_json(base + more)
                             if test["n_gen"] == TOKENS]
    return result


def peer_row(test, key, value):
    threads = test["n_threads"]
    return {key: value, "threads": int(str(threads).split(",")[0]),
            "tok_s_samples": test["samples_ts"], "tok_s": statistics.median(test["samples_ts"])}


def merge(results):
    """Rounds of the same measurement as one: all samples of each row."""
    merged = copy.deepcopy(results[0])
    for kind, key in (("read", "gb_s"), ("decode", "roof_gb_s"), ("decode", "roof_share"),
                      ("prefill", "tok_s"), ("decode", "tok_s")):
        for i, row in enumerate(merged.get(kind, [])):
            if key not in row:
                continue
            samples = [x for r in results for x in r[kind][i][key + "_samples"]]
            median = statistics.median(samples)
            for rate in ("gmac_s", "gb_s"):
                if key == "tok_s" and rate in row:
                    row[rate] *= median / row[key]
            row.update({key: median, key + "_min": min(samples), key + "_max": max(samples),
                        key + "_samples": samples})
    if "read" in merged:
        merged["read_gb_s"] = max(row["gb_s"] for row in merged["read"])
        merged["repeats"] = sum(r["repeats"] for r in results)
    return merged


# ---- Peers ----

def default_name(path):
    """The directory of the program that is not one of a build."""
    parts = os.path.abspath(path).split(os.sep)[:-1]
    while len(parts) > 1 and (parts[-1] in ("bin", "Release") or parts[-1].startswith("build")):
        parts.pop()
    return parts[-1] or "peer"


def find_peers(args):
    by_name, for_all = {}, []
    for part in filter(None, (p.strip() for p in args.peer_args.split(";"))):
        name, colon, rest = part.partition(":")
        if colon and " " not in name and not name.startswith("-"):
            by_name[name] = shlex.split(rest)
        else:
            for_all += shlex.split(part)
    peers = []
    for word in shlex.split(args.peer):
        name, equal, path = word.partition("=")
        if not equal:
            name, path = default_name(word), word
        if not os.access(path, os.X_OK) or os.path.isdir(path):
            sys.exit("bench: peer %s: %s is no program" % (name, path))
        usage = subprocess.run([path, "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               check=False, universal_newlines=True, errors="replace").stdout
        option = "-d" if "--n-depth" in usage else "-gp" if "-gp" in usage else None
        peers.append(Peer(name, path, tuple(for_all + by_name.get(name, [])), option))
    return peers


def peer_files(args, geometry, type_name):
    if not args.peer_models:
        return []
    files = sorted(glob.glob(os.path.join(glob.escape(args.peer_models), geometry + "-*.gguf")))
    starts = [geometry + "-" + prefix + type_name for prefix in ("", "i")]
    return [f for f in files if any(os.path.basename(f).lower().startswith(s) for s in starts)]


# ---- The table ----

LINE = "%-24s %7s  %-30s  %-28s %6s %6s  %s"
HEADER = LINE % ("", "threads", "prefill %d tokens/s" % PROMPT, "decode %d tokens/s" % TOKENS,
                 "GB/s", "roof", "ours / peer")


def spread(row):
    if not row:
        return ""
    samples = row["tok_s_samples"]
    return "%9.2f (%.2f .. %.2f)" % (row["tok_s"], min(samples), max(samples))


def bandwidth(row):
    if not row or "gb_s" not in row:
        return "", ""
    return "%.2f" % row["gb_s"], "%.0f %%" % (100 * row["roof_share"])


def find_row(result, place, threads):
    kind, key, value = place
    return next((r for r in result[kind] if r[key] == value and r["threads"] == threads), None)


def ratio(place, threads, ours, theirs):
    """Median over the rounds of ours / theirs; "" if either is not there."""
    pairs = [(find_row(a, place, threads), find_row(b, place, threads))
             for a, b in zip(ours, theirs)]
    if not pairs or not all(a and b for a, b in pairs):
        return ""
    return "%.2fx" % statistics.median(a["tok_s"] / b["tok_s"] for a, b in pairs)


def print_rows(label, result, depths, ours=(), theirs=()):
    """A line a number of threads, and one for each depth; ours and theirs are rounds to compare."""
    prefill, *decodes = [("prefill", "n", PROMPT)] + [("decode", "depth", d) for d in depths]
    for threads in sorted({r["threads"] for r in result["prefill"] + result["decode"]}):
        for place in decodes:
            row, first = find_row(result, place, threads), place is decodes[0]
            if not row and not first:
                continue
            places = (prefill, place) if first else (place,)
            ratios = [ratio(p, threads, ours, theirs) for p in places]
            say((LINE % (label if first else "  at depth %d" % place[2], threads,
                         spread(find_row(result, prefill, threads)) if first else "", spread(row),
                         *bandwidth(row), " ".join(ratios))).rstrip())


def measure_row(args, geometry, type_name, types, peers):
    """Measures one geometry and type, ours and the peers in turn, and prints it."""
    path = make_model(args, geometry, type_name, types)
    depths = [0] + ([args.depth] if type_name in DEPTH_TYPES and args.depth else [])
    rivals = [(p, f) for f in peer_files(args, geometry, type_name) for p in peers]
    rounds = args.rounds if rivals else 1
    repeats = -(-args.repeat // rounds)
    ours, theirs, failed = [], {r: [] for r in rivals}, {}
    for _ in range(rounds):
        ours.append(measure_ours(args, path, depths, repeats))
        for rival in rivals:
            if rival in failed:
                continue
            try:
                check_memory(rival[1], os.path.getsize(rival[1]))
                theirs[rival].append(measure_peer(args, *rival, depths, repeats))
            except Skip as e:
                failed[rival] = e
    mine = merge(ours)
    save(args, "%s-%s" % (geometry, type_name), mine)
    print_rows("%s %s" % (geometry, type_name), mine, depths)
    for peer, file in rivals:
        stem = os.path.splitext(os.path.basename(file))[0]
        label = "  %s %s" % (peer.name, stem[len(geometry) + 1:])
        if (peer, file) in failed:
            say("%-24s %s" % (label, failed[peer, file]))
            continue
        rounds_of_peer = theirs[peer, file]
        result = merge(rounds_of_peer)
        save(args, "%s-%s-%s-%s" % (geometry, type_name, peer.name, stem), result)
        print_rows(label, result, depths, ours, rounds_of_peer)
    return mine


def save(args, name, result):
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, name + ".json"), "w", encoding="utf-8") as f:
        json.dump(result, f, indent=1)
        f.write("\n")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--q3n", default="build/q3n", type=shlex.split)
    parser.add_argument("--geometries", default="g1 g2 g3", type=str.split)
    parser.add_argument("--types", default="q4 q8 bf16", type=str.split)
    parser.add_argument("--threads", default="", help="numbers of threads (one a CPU)")
    parser.add_argument("--repeat", default=5, type=int, help="repetitions of a measurement")
    parser.add_argument("--depth", default=4096, type=int, help="for q4; 0 leaves it out")
    parser.add_argument("--models", default="build/models")
    parser.add_argument("--out", default="build/bench")
    parser.add_argument("--bench-flags", default="", type=shlex.split, help="more for q3n bench")
    parser.add_argument("--peer", default="", help='"[NAME=]PATH ..." of llama-bench programs')
    parser.add_argument("--peer-models", default="", help="folder of g1-q4_0.gguf and so on")
    parser.add_argument("--peer-args", default="", help="more for the peers")
    parser.add_argument("--rounds", default=3, type=int, help="turns of ours and the peers")
    args = parser.parse_args()
    args.threads = ",".join(args.threads.replace(",", " ").split()) or str(default_threads())
    return args


def main():
    args = parse_arguments()
    peers = find_peers(args)
    if peers and not os.path.isdir(args.peer_models):
        sys.exit("bench: the peers need a folder of models: PEER_MODELS=DIR")
    types = q3n_file.Definitions().types
    say(HEADER)
    measured = None
    for geometry in args.geometries:
        for type_name in args.types:
            try:
                measured = measure_row(args, geometry, type_name, types, peers)
            except Skip as e:
                say("%-24s skipped: %s" % ("%s %s" % (geometry, type_name), e))
    if not measured:
        return 1
    say("%s, %d CPUs, %s, %s; reading %.2f GB/s"
        % (measured["cpu"], measured["cpus"], measured["isa"], measured["compiler"],
           measured["read_gb_s"]))
    say("numbers: %s/*.json; tools/plot_bench.py draws them" % args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
