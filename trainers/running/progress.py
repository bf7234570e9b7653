"""A progress bar on a terminal; in a log file, or without tqdm, nothing but what is said."""

import sys


class Bar:
    """total: None where it is not known; shown: False on all but the first of several processes."""

    def __init__(self, text: str, total: int | None, unit: str, shown: bool = True):
        try:
            from tqdm import tqdm
        except ImportError:
            self.bar = None
        else:
            self.bar = tqdm(desc=text, total=total, unit=unit, disable=not (shown and sys.stderr.isatty()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()

    def add(self, postfix: dict | None = None) -> None:
        """One unit more."""
        if self.bar is not None:
            if postfix:
                self.bar.set_postfix(postfix, refresh=False)
            self.bar.update(1)

    def add_many(self, count: int) -> None:
        """`count` units more."""
        if self.bar is not None:
            self.bar.update(count)

    def reach(self, done: int, postfix: dict | None = None) -> None:
        """`done` units in all; postfix: what stands behind the bar."""
        if self.bar is not None:
            if postfix:
                self.bar.set_postfix(postfix, refresh=False)
            self.bar.update(done - self.bar.n)

    def say(self, text: str) -> None:
        """A line above the bar, or just a line."""
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text)
