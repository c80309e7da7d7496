#!/usr/bin/env python3
"""Makes what training starts from: the words to define, and the tokenizer.

    prepare.py OUT      (needs Debian's wordnet-base, and tokenizers from PyPI)

Writes `words.json`, `tokenizer.json` and `tokenizer_config.json` to the folder OUT.
"""

import json
import pathlib
import sys

import dictionary
import tokens
from skills import Skills

SEED = 7


def main(out):
    out.mkdir(parents=True, exist_ok=True)
    (out / "words.json").write_text(json.dumps(dictionary.read()) + "\n")
    tokens.train(texts(Skills(read(out), "train", SEED)), out)


def texts(skills):
    yield from skills.glosses
    yield from skills.defined * 2
    yield from ["user", "assistant", "system"] * 2000
    for _ in range(60_000):
        yield from (text for _, text in skills.short())
    for _ in range(1_500):
        yield from (text for _, text in skills.recall(400, lambda text: len(text) // 2))


def read(folder):
    """What `dictionary.read` found when `main` ran."""
    return json.loads((folder / "words.json").read_text())


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
