"""Preference pairs out of groups of candidate clips: the best against the worst of a prompt, where that says something.

    python -m trainers.pairs build --groups candidates/ --by geometry=1 --output pairs/

Then pairs/pairs.jsonl goes into `python -m trainers.prism cache --pairs`. The exit code is 0 when there is a pair, 1 when no
group gave one, 2 when an argument or a file cannot be used, 130 after Ctrl-C.
"""
