"""Compares clips of one model with clips of another (base and tuned): same prompts, same seeds, every reward of the pack.

    python -m trainers.compare --a base/ --b tuned/ --output comparison/
    python -m trainers.compare --a base/ --b half/ --more full=full/ --names base half --output comparison/ \\
        --vae wan_2.1_vae.safetensors --manifold shell.safetensors

Folders of videos or latents are matched by file name (path below the folder, without suffix); two folders of anybody's
videos will do. Prompts, which PRISM, flow residual and prompt gap need, come from NAME.txt next to a clip, from prompt.txt in
its folder, or from a .jsonl given in place of a folder, with lines {"file", "prompt", "seed"}: such files are matched by
prompt and seed. Every reward for which the needed files are given is measured; geometry needs nothing.

OUTPUT gets

  index.html        the report: one page that needs no other file and no network
  comparison.json   every difference with its 95 % interval, detail figures, alarms, what was left out and why, every clip
  montage.png       first, middle and last frame of pairs, side by side
  side_by_side/     videos of pairs, side by side
  clips.jsonl       scores, each written as soon as it is known: a killed run continues from there

The exit code is 0 when pairs were compared, 1 when none could be, 2 when an argument or a file cannot be used, 130 after
Ctrl-C.
"""
