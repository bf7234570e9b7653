"""A progress bar on a terminal; in a log file, or without tqdm, only the messages are printed."""

import sys


class Bar:
    """total: units in all, None where not known; shown: False on all but the first of several processes."""

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
        """Advances by one unit; postfix: values shown after the bar."""
        if self.bar is not None:
            if postfix:
                self.bar.set_postfix(postfix, refresh=False)
            self.bar.update(1)

    def add_many(self, count: int) -> None:
        """Advances by `count` units."""
        if self.bar is not None:
            self.bar.update(count)

    def reach(self, done: int, postfix: dict | None = None) -> None:
        """Advances to `done` units in all; postfix: values shown after the bar."""
        if self.bar is not None:
            if postfix:
                self.bar.set_postfix(postfix, refresh=False)
            self.bar.update(done - self.bar.n)

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text)
