"""Runs benchmarks.demo.demo, which a checkout has and a release lacks."""

import sys

try:
    from benchmarks.demo.demo import main
except ModuleNotFoundError as missing:
    if not (missing.name or "").startswith("benchmarks"):
        raise
    sys.exit("the demo is in the folder benchmarks, which only a checkout has: run it from the checkout's root")

if __name__ == "__main__":
    main()
