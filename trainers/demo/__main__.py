"""Runs benchmarks.demo.demo, which is in a checkout of the repository but not in a release."""

import sys

try:
    from benchmarks.demo.demo import main
except ModuleNotFoundError as missing:
    if not (missing.name or "").startswith("benchmarks"):
        raise
    sys.exit("the demo needs the folder benchmarks, which releases do not contain: run it from the root of a checkout")

if __name__ == "__main__":
    main()
