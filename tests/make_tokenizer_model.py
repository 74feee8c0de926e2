#!/usr/bin/env python3
"""A model file of a few random weights with a full-size tokenizer, for testing the tokenizer.

usage: make_tokenizer_model.py TOKENIZER_DIR OUT.q3n
"""
import os
import subprocess
import sys
import tempfile

import synthetic

CONVERT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "tools", "convert.py")
VOCAB = 151936                   # of every published Qwen3 model


def make(tokenizer_dir, out):
    config = synthetic.qwen3_config(vocab_size=VOCAB)
    with tempfile.TemporaryDirectory() as folder:
        synthetic.write_checkpoint(folder, config, synthetic.qwen3_tensors(config))
        return subprocess.call([sys.executable, CONVERT, folder, out, "--tokenizer", tokenizer_dir,
                                "--name", "tokenizer", "--quiet"])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: make_tokenizer_model.py TOKENIZER_DIR OUT.q3n")
    sys.exit(make(sys.argv[1], sys.argv[2]))
