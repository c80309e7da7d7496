#!/usr/bin/env python3
"""Trains the model: minutes on one GPU.

    train.py PREPARED OUT [--steps N]

PREPARED is the folder that prepare.py wrote. OUT becomes a complete checkpoint. Samples are drawn while
training goes on, by processes of their own, and are packed into rows in which a conversation sees itself only.
Matrices are trained by Muon, the rest by Adam; arithmetic is bf16 over float32 weights.
"""

import argparse
import multiprocessing
import pathlib
import queue
import shutil
import threading
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import model as models
import prepare
import score
import tokens
from skills import Skills

SEED = 1
ROW = 4096
ROWS_PER_MESSAGE = 8
# Part of all tokens by kind. Long texts have few tokens to learn from, so they get many.
SHARES = {
    "define": 0.28,
    "copy": 0.14,
    "recall": 0.35,
    "add": 0.04,
    "chat": 0.03,
    "small talk": 0.03,
    "unknown": 0.08,
    "conversation": 0.05,
}
# Lengths of texts, and the part of the tokens of all texts.
RECALL_TOKENS = [(40, 250, 0.25), (250, 700, 0.30), (700, 1300, 0.17), (1300, 2300, 0.14), (2300, 4000, 0.14)]
# Room for tokens to learn from, as part of all.
LEARNED_MAX = 0.5


class Packer:
    """Fills rows with conversations in the proportions of `SHARES`."""

    def __init__(self, folder, seed):
        self.encoder = tokens.Encoder(folder)
        self.skills = skills = Skills(prepare.read(folder), "train", seed)
        self.count = lambda text: len(self.encoder(text))
        others = [
            skills.unknown,
            skills.unknown,
            skills.define_unknown,
            skills.define_unknown,
            skills.other_arithmetic,
            skills.statement,
        ]
        self.makers = {
            "define": skills.define,
            "copy": lambda: skills.copy(skills.random.random() < 0.55),
            "recall": self.recall,
            "add": skills.add,
            "chat": skills.chat,
            "small talk": skills.small_talk,
            "unknown": lambda: skills.random.choice(others)(),
            "conversation": skills.conversation,
        }
        self.spent = dict.fromkeys(SHARES, 0.0)

    def recall(self):
        draw = self.skills.random
        low, high, _ = draw.choices(
            RECALL_TOKENS, [weight / (low + high) for low, high, weight in RECALL_TOKENS]
        )[0]
        return self.skills.recall(draw.randint(low, high), self.count)

    def sample(self):
        kind = min(SHARES, key=lambda kind: self.spent[kind] / SHARES[kind])
        ids, said = self.encoder.chat(self.skills.with_system(self.makers[kind]()))
        self.spent[kind] += len(ids)
        return ids[:ROW], said[:ROW]

    def rows(self, count):
        """`(tokens, positions, learned)`, each `count x ROW`; `learned` where the next token is to be learned."""
        ids, positions = np.zeros((count, ROW), np.int16), np.zeros((count, ROW), np.int16)
        learned = np.zeros((count, ROW), np.bool_)
        for row in range(count):
            at = 0
            while at < ROW:
                sample, said = self.sample()
                length = min(len(sample), ROW - at)
                ids[row, at : at + length] = sample[:length]
                positions[row, at : at + length] = np.arange(length)
                learned[row, at : at + length - 1] = said[1:length]
                at += length
        return ids, positions, learned


def produce(folder, seed, pipe):
    packer = Packer(folder, seed)
    while True:
        pipe.put(packer.rows(ROWS_PER_MESSAGE))


def batches(folder, rows, workers, device):
    """Batches on the device without end, in an order that depends on seed and number of workers only."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Queue(3) for _ in range(workers)]
    for index, pipe in enumerate(pipes):
        context.Process(target=produce, args=(folder, SEED * 1000 + index, pipe), daemon=True).start()
    ready = queue.Queue(4)
    learned_max = int(rows * ROW * LEARNED_MAX)

    def collect():
        turn = 0
        while True:
            parts = []
            for _ in range(rows // ROWS_PER_MESSAGE):
                parts.append(pipes[turn % workers].get())
                turn += 1
            ids, positions, learned = (np.concatenate(part) for part in zip(*parts))
            places = np.flatnonzero(learned)[:learned_max]
            where = np.zeros(learned_max, np.int64)
            where[: len(places)] = places
            target = np.full(learned_max, -100, np.int64)
            target[: len(places)] = ids.reshape(-1)[places + 1]
            tensors = [
                torch.from_numpy(array)
                for array in (ids.astype(np.int32), positions.astype(np.int32), where, target)
            ]
            if device == "cuda":
                tensors = [tensor.pin_memory() for tensor in tensors]
            ready.put(tensors)

    threading.Thread(target=collect, daemon=True).start()
    while True:
        yield [tensor.to(device, non_blocking=True) for tensor in ready.get()]


class Muon:
    """Momentum whose steps are made orthogonal (Jordan et al., 2024); matrices of one shape go together."""

    def __init__(self, parameters, momentum=0.95):
        self.momentum = momentum
        by_shape = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        self.groups = [
            (group, torch.zeros(len(group), *shape, device=group[0].device))
            for shape, group in by_shape.items()
        ]

    @torch.no_grad()
    def step(self, rate):
        for group, moving in self.groups:
            gradient = torch.stack([parameter.grad for parameter in group])
            update = muon_update(gradient, moving, self.momentum)
            scale = max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            for parameter, change in zip(group, update.unbind()):
                parameter.add_(change.to(parameter.dtype), alpha=-rate * scale)


def muon_update(gradient, moving, momentum):
    moving.lerp_(gradient, 1 - momentum)
    x = gradient.lerp(moving, momentum).bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def rate_at(progress):
    """Warm up, hold, fall to nothing."""
    return min(1.0, progress / 0.01, (1 - progress) / 0.55)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prepared", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=9500, help="9500")
    parser.add_argument("--rows", type=int, default=48, help=f"rows of {ROW} tokens in a step; 48")
    parser.add_argument("--workers", type=int, default=14, help="processes that draw samples; 14")
    parser.add_argument("--matrix-rate", type=float, default=0.02)
    parser.add_argument("--rate", type=float, default=0.004)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(arguments.prepared / name, arguments.out / name)
    source = batches(arguments.prepared, arguments.rows, arguments.workers, device)
    encoder = tokens.Encoder(arguments.prepared)
    sets = score.items(prepare.read(arguments.prepared), encoder, 100)

    model = models.Tiny().to(device)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    muon = Muon(matrices)
    adam = torch.optim.Adam(others, lr=arguments.rate, betas=(0.9, 0.98), fused=device == "cuda")
    compiled = device == "cuda"
    if compiled:
        global muon_update
        muon_update = torch.compile(muon_update)
    make_mask = torch.compile(create_block_mask) if compiled else create_block_mask

    def loss_of(ids, positions, where, target, mask):
        attend = lambda q, k, v: flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        hidden = model.hidden(ids, positions, attend).flatten(0, 1)[where]
        return F.cross_entropy(model.logits(hidden).float(), target, ignore_index=-100)

    forward = torch.compile(loss_of) if compiled else loss_of
    began = steady = time.time()
    for step in range(arguments.steps):
        ids, positions, where, target = next(source)
        document = (positions == 0).cumsum(1, dtype=torch.int32)
        together = lambda b, h, q, k: (q >= k) & (document[b, q] == document[b, k])
        mask = make_mask(together, len(ids), None, ROW, ROW, device=device)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = forward(ids, positions, where, target, mask)
        loss.backward()
        if step == 20:
            loss.item()
            steady = time.time()
        scale = rate_at(step / arguments.steps)
        adam.param_groups[0]["lr"] = arguments.rate * scale
        adam.step()
        muon.step(arguments.matrix_rate * scale)
        model.zero_grad(set_to_none=True)
        if step % 100 == 0:
            speed = (step - 20) * arguments.rows * ROW / (time.time() - steady) if step > 20 else 0
            print(
                f"step {step} of {arguments.steps}  {time.time() - began:.0f} s  {speed / 1e6:.2f} M tokens/s  loss {loss.item():.4f}",
                flush=True,
            )
        if step % 1000 == 999:
            scores, _ = score.score(model, encoder, sets, device)
            print("  " + ", ".join(f"{kind} {good}" for kind, (good, _) in scores.items()), flush=True)
            models.save(model, arguments.out)
    models.save(model, arguments.out)
    print(f"{arguments.steps * arguments.rows * ROW / 1e6:.0f} M tokens, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
