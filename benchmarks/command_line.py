"""The argument parser of a benchmark's command, from its module's docstring."""

import argparse


def make_parser(name: str, doc: str) -> argparse.ArgumentParser:
    """name: as after `python -m`; doc: the first paragraph is the description, the rest follows the options in --help."""
    summary, _, rest = doc.partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"python -m {name}", description=summary, epilog=rest, formatter_class=raw)
