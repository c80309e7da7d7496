#!/usr/bin/env python3
"""Scores a checkpoint on items that training did not see: an answer counts if every token of it is right.

    score.py CHECKPOINT [--words FOLDER] [--items N] [--device cpu|cuda] [--failures N]

FOLDER has the `words.json` of prepare.py; the checkpoint's folder when absent. An answer is right when the
most probable token is the expected one at each step up to the end of the turn, which is what greedy
decoding needs in order to give exactly this answer.
"""

import argparse
import json
import pathlib

import torch

import model as models
import prepare
import tokens
from skills import WORDS_MAX, Skills

SEED = 20
LENGTHS = (512, 1024, 2048, 3900)


def kinds(skills, count):
    """Makers of items by name. `count` counts the tokens of a text."""
    sized = lambda least, numbers: lambda: long_enough(skills, count, least, numbers)
    lists = lambda backwards: lambda: skills.copy(backwards, skills.random.randint(1, WORDS_MAX))
    made = {
        "greeting": skills.chat,
        "repeat, 1 to 8 words": lists(False),
        "reverse, 1 to 8 words": lists(True),
        "repeat, 8 words": lambda: skills.copy(False, WORDS_MAX),
        "reverse, 8 words": lambda: skills.copy(True, WORDS_MAX),
        "two-digit addition": lambda: skills.add(two_digits=True),
    }
    made |= {f"recall at {length} tokens": sized(length, True) for length in LENGTHS}
    made |= {f"recall of other facts at {length} tokens": sized(length, False) for length in LENGTHS[:2]}
    made |= {
        "meaning of a word": skills.define,
        "meaning of an unknown word": skills.define_unknown,
        "small talk": skills.small_talk,
        "other questions": skills.unknown,
        "other arithmetic": skills.other_arithmetic,
        "conversation of several turns": skills.conversation,
    }
    return made


def long_enough(skills, count, least, numbers):
    """A question about a text: `least` tokens or a few more up to the answer."""
    while True:
        turns = skills.recall(least + 16, count, facts=3, numbers=numbers)
        if sum(count(text) for _, text in turns) >= least:
            return turns


def items(dictionary, encoder, each):
    """`{kind: [turns]}` of the test split."""
    count = lambda text: len(encoder(text))
    made = kinds(Skills(dictionary, "test", SEED), count)
    return {kind: [draw() for _ in range(each // 4 if "39" in kind else each)] for kind, draw in made.items()}


@torch.no_grad()
def right(model, encoder, conversations, device, tokens_max=1 << 18):
    """For each conversation, whether its last answer would be given exactly."""
    encoded = []
    for index, turns in enumerate(conversations):
        ids, _ = encoder.chat(turns)
        before, _ = encoder.chat(turns[:-1])
        head = len(before) + 1 + len(encoder("assistant\n"))
        encoded.append((len(ids) - 1, head, ids[:-1], index))
    encoded.sort()
    result = [False] * len(encoded)
    while encoded:
        longest = encoded[-1][0]
        batch = [encoded.pop() for _ in range(min(len(encoded), max(1, tokens_max // longest)))]
        rows = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, (length, _, ids, _) in zip(rows, batch):
            row[:length] = torch.tensor(ids)
        rows = rows.to(device)
        hidden = model.hidden(rows, torch.arange(longest, device=device)[None].expand_as(rows), models.causal)
        for row, state, (length, head, _, index) in zip(rows, hidden, batch):
            best = model.logits(state[head - 1 : length - 1]).argmax(-1)
            result[index] = bool((best == row[head:length]).all())
    return result


def score(model, encoder, sets, device):
    """`{kind: (right, of)}` and the failures as `(kind, turns)`."""
    scores, failures = {}, []
    for kind, conversations in sets.items():
        marks = right(model, encoder, conversations, device)
        scores[kind] = (sum(marks), len(marks))
        failures += [(kind, turns) for mark, turns in zip(marks, conversations) if not mark]
    return scores, failures


def write_heldout(model, encoder, sets, file, each=10):
    """The first items of each kind with the right answer and the one that greedy decoding gives."""
    found = []
    for kind, conversations in sets.items():
        if any(long in kind for long in ("2048", "3900", "8 words")) and "1 to" not in kind:
            continue
        for turns in conversations[:each]:
            messages = [{"role": role, "content": text} for role, text in turns[:-1]]
            found.append(
                {
                    "kind": kind,
                    "messages": messages,
                    "right": turns[-1][1],
                    "pytorch": answer(model, encoder, turns[:-1]),
                }
            )
    lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in found)
    file.write_text(f"[\n{lines}\n]\n")


@torch.no_grad()
def answer(model, encoder, turns, tokens_max=200):
    """The greedy answer to `turns`, as text; the whole sequence is computed again for each token."""
    ids, _ = encoder.chat(turns)
    ids += [tokens.START, *encoder("assistant\n")]
    said, device = [], model.model.embed_tokens.weight.device
    while len(said) < tokens_max:
        row = torch.tensor([ids + said], device=device)
        hidden = model.hidden(row, torch.arange(row.shape[1], device=device)[None], models.causal)
        best = int(model.logits(hidden[0, -1]).argmax())
        if best in (tokens.END, tokens.END_OF_TEXT):
            break
        said.append(best)
    return encoder.tokenizer.decode(said)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--words", type=pathlib.Path, help="folder with words.json; the checkpoint's")
    parser.add_argument("--items", type=int, default=400, help="items of each kind; 400")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--failures", type=int, default=0, help="failures to show of each kind; 0")
    parser.add_argument("--json", type=pathlib.Path, help="file for the scores")
    parser.add_argument("--heldout", type=pathlib.Path, help="file for ten items of each kind, with answers")
    arguments = parser.parse_args()
    dictionary = prepare.read(arguments.words or arguments.checkpoint)
    encoder = tokens.Encoder(arguments.checkpoint)
    model = models.load(arguments.checkpoint).to(arguments.device)
    sets = items(dictionary, encoder, arguments.items)
    scores, failures = score(model, encoder, sets, arguments.device)
    shown = dict.fromkeys(scores, 0)
    for kind, turns in failures:
        shown[kind] += 1
        if shown[kind] <= arguments.failures:
            *_, (_, asked), (_, expected) = turns
            said = answer(model, encoder, turns[:-1]) if len(asked) < 4000 else "(long)"
            print(f"[{kind}] {asked[-200:]!r}\n  expected {expected!r}\n  said     {said!r}")
    for kind, (good, of) in scores.items():
        print(f"{kind:42} {good:5} of {of:5}  {100 * good / of:6.2f} %")
    if arguments.heldout:
        write_heldout(model, encoder, sets, arguments.heldout)
    if arguments.json:
        arguments.json.write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
