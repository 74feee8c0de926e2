"""python3 -m qwen3next MODEL.q3n PROMPT: continues the prompt."""
import sys

from . import Error, Model


def main(argv):
    if len(argv) != 3:
        print("usage: qwen3next MODEL.q3n PROMPT", file=sys.stderr)
        return 2
    try:
        with Model(argv[1]) as model, model.session(capacity=1024) as session:
            for piece in session.generate(argv[2], 200, temperature=0.8, top_p=0.95, seed=1):
                print(piece, end="", flush=True)
            print()
    except (Error, OSError) as e:
        print("qwen3next: %s" % e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
