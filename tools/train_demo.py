"""Train the demo model: a LLaDA of about a million parameters that turns orders in words into JSON plans.

    python tools/train_demo.py checkpoints/llada-demo --minutes 60

LLaDA's recipe (arXiv 2502.09992, section 2): mask each token of the response with probability t ~ U(0, 1),
predict the masked ones, weigh the loss by 1/t; the response region has a fixed size and is filled up with
end-of-text tokens. Half of the samples are masked as block decoding sees them: a window is masked with ratio
t, everything right of it completely.

Two single-thread processes average their gradients (faster on two cores than one process with two threads).
Writes config.json, model.safetensors (bf16, the official tensor names), the tokenizer and training_log.jsonl.
Needs torch, safetensors and tokenizers. Shape notation: B batch, L length, D width, H heads, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import demo_task
import torch
import torch.distributed as dist
import torch.nn.functional as F
from demo_checkpoint import (
    ASSISTANT,
    END_ID,
    EPS,
    HEADS,
    LAYERS,
    MASK_ID,
    MAX_LENGTH,
    MLP,
    THETA,
    USER,
    VOCAB,
    WIDTH,
    make_tokenizer,
    save,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

DRILLS = 0.25  # share of single-step samples


class Linear(nn.Linear):
    """A bias-free linear layer with float32 master weights that multiplies in bfloat16."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight.bfloat16()).float()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(WIDTH, EPS)
        self.ff_norm = nn.RMSNorm(WIDTH, EPS)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (Linear(WIDTH, WIDTH) for _ in range(4))
        self.ff_proj, self.up_proj, self.ff_out = Linear(WIDTH, MLP), Linear(WIDTH, MLP), Linear(MLP, WIDTH)
        nn.init.zeros_(
            self.attn_out.weight
        )  # the model starts as the identity: copying is then learnt at once
        nn.init.zeros_(self.ff_out.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.attn_norm(x)
        q, k, v = (
            p(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + self.attn_out(attended.transpose(1, 2).flatten(-2))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat([-x2, x1], -1) * sin


class Model(nn.Module):
    """The names of the attributes make the official tensor names of LLaDA (see `save`)."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f = nn.RMSNorm(WIDTH, EPS)
        self.ff_out = Linear(WIDTH, VOCAB)
        nn.init.normal_(self.wte.weight, std=0.5)
        with torch.no_grad():
            self.ff_out.weight.copy_(self.wte.weight * 0.2)
        angles = torch.outer(
            torch.arange(MAX_LENGTH), THETA ** (-torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
        )
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(self, ids: Tensor, first_row: int) -> Tensor:
        """Logits [B, L - first_row, V] of the rows from `first_row`."""
        x = self.wte(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.ff_out(self.ln_f(x[:, first_row:]))


def batches(
    tokenizer: Tokenizer, rng: random.Random, size: int, *, held_out: bool, drills: float = 0.0
) -> Iterator[tuple[Tensor, list]]:
    """Batches ([B, P + GEN_LENGTH] ids, examples) of prompts of one length P: only the response
    is padded.

    A share `drills` of the examples has a single step.
    """
    user, assistant = tokenizer.token_to_id(USER), tokenizer.token_to_id(ASSISTANT)
    buckets: dict[int, list] = defaultdict(list)
    while True:
        example = demo_task.draw(rng, held_out=held_out, drill=rng.random() < drills)
        prompt = [user, *tokenizer.encode(example.prompt).ids, assistant]
        answer = tokenizer.encode(example.answer).ids
        answer += [END_ID] * (demo_task.GEN_LENGTH - len(answer))
        bucket = buckets[len(prompt)]
        bucket.append((prompt + answer, example))
        if len(bucket) == size:
            yield torch.tensor([ids for ids, _ in bucket]), [example for _, example in bucket]
            bucket.clear()


def noise(response: Tensor) -> tuple[Tensor, Tensor]:
    """Masked positions of the response [B, G] (bool) and the loss weight of each (float)."""
    rows, length = response.shape
    # stratified over the batch: the same law for each row, less variance of the 1/t weights
    t = ((torch.rand(1) + torch.arange(rows) / rows) % 1).clamp_min(0.02)[torch.randperm(rows), None]
    position = torch.arange(length)
    window = torch.tensor([8, 16, 32, 32, 32, 48])[torch.randint(6, (rows, 1))]
    start = (torch.rand(rows, 1) * (length / window).ceil()).floor() * window
    block_wise = torch.rand(rows, 1) < 0.5
    start, end = torch.where(block_wise, start, 0), torch.where(block_wise, start + window, length)
    inside = (position >= start) & (position < end)
    drawn = inside & (torch.rand(rows, length) < t)
    return drawn | (position >= end), drawn / t


def loss_of(model: Model, ids: Tensor) -> Tensor:
    first = ids.shape[1] - demo_task.GEN_LENGTH
    response = ids[:, first:]
    masked, weight = noise(response)
    noisy = torch.cat([ids[:, :first], response.masked_fill(masked, MASK_ID)], 1)
    losses = F.cross_entropy(model(noisy, first).flatten(0, 1), response.flatten(), reduction="none")
    return (losses * weight.flatten()).sum() / response.numel()


@torch.inference_mode()
def exact_match(
    model: Model, tokenizer: Tokenizer, ids: Tensor, examples: list, threshold: float = 0.9
) -> float:
    """Share of right answers, decoded by blocks of 32 with a threshold and no cache: a progress figure, not
    the evaluation."""
    first = ids.shape[1] - demo_task.GEN_LENGTH
    canvas = torch.cat([ids[:, :first], torch.full((len(ids), demo_task.GEN_LENGTH), MASK_ID)], 1)
    for end in range(first + 32, ids.shape[1] + 1, 32):
        while (canvas[:, first:end] == MASK_ID).any():
            probabilities = model(canvas, first).softmax(-1)
            probabilities[..., MASK_ID] = 0
            confidence, token = probabilities.max(-1)
            confidence = confidence.masked_fill(canvas[:, first:] != MASK_ID, -1)
            confidence[:, end - first :] = -1
            commit = (confidence >= threshold) | (
                (confidence == confidence.amax(1, keepdim=True)) & (confidence >= 0)
            )
            canvas[:, first:] = torch.where(commit, token, canvas[:, first:])
    answers = tokenizer.decode_batch(canvas[:, first:].tolist())
    return sum(demo_task.is_right(a, e.plan) for a, e in zip(answers, examples, strict=True)) / len(examples)


def load(model: Model, tokenizer: Tokenizer, path: Path) -> None:
    """Weights saved by `save`; rows of the embedding and the head follow their tokens, should the vocabulary
    have changed."""
    tensors = {
        name.removeprefix("model.transformer."): t.float()
        for name, t in load_file(path / "model.safetensors").items()
    }
    old = Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab()
    for name in ("wte.weight", "ff_out.weight"):
        rows = model.state_dict()[name].clone()
        for token, i in tokenizer.get_vocab().items():
            if token in old:
                rows[i] = tensors[name][old[token]]
        tensors[name] = rows
    model.load_state_dict(tensors)


def train(rank: int, args: argparse.Namespace) -> None:
    out, seed, rate, world = args.out, args.seed, args.rate, args.processes
    torch.set_num_threads(1)
    torch.manual_seed(seed)  # the same initial weights everywhere
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{args.port}", rank=rank, world_size=world)
    model, tokenizer = Model(), make_tokenizer()
    if args.resume:
        load(model, tokenizer, out)
    torch.manual_seed(seed + 1 + rank)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=6e-3 * rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=2.5e-3 * rate, betas=(0.9, 0.98), weight_decay=0.0)
    peaks = [(group, group["lr"]) for optimiser in (muon, adamw) for group in optimiser.param_groups]
    data = batches(tokenizer, random.Random(seed * 1000 + rank), args.batch, held_out=False, drills=DRILLS)
    tests = batches(tokenizer, random.Random(seed * 1000 + 999), 64, held_out=True)
    start, step, sequences, next_report, recent = time.time(), 0, 0, 60.0, []
    clock = torch.zeros(1)
    while True:
        clock[0] = time.time() - start
        dist.broadcast(clock, 0)
        done = clock.item() / (60 * args.minutes)
        if rank == 0 and (clock.item() >= next_report or done >= 1):
            model.eval()
            ids, examples = next(tests)
            line = {
                "seed": seed,
                "rate": rate,
                "minutes": round(clock.item() / 60, 1),
                "step": step,
                "sequences": sequences,
                "loss": round(sum(recent) / len(recent), 4),
                "exact_match_64_held_out": round(exact_match(model, tokenizer, ids, examples), 3),
            }
            print(json.dumps(line), flush=True)
            with open(out / "training_log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            save(model, tokenizer, out)
            model.train()
            recent, next_report = [], clock.item() + max(60.0, args.minutes * 60 / 30)
        if done >= 1:
            return
        for group, peak in peaks:
            group["lr"] = peak * min(1.0, (step + 1) / 100) * min(1.0, (1 - done) / 0.6)
        ids, _ = next(data)
        loss = loss_of(model, ids)
        loss.backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        dist.all_reduce(flat)
        flat /= world
        flat *= min(1.0, 1.0 / (flat.norm().item() + 1e-6)) if not math.isnan(flat.sum().item()) else 0.0
        offset = 0
        for p in model.parameters():
            p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
            offset += p.numel()
        muon.step()
        adamw.step()
        model.zero_grad(set_to_none=True)
        recent.append(loss.item())
        step, sequences = step + 1, sequences + args.batch * world


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory of the checkpoint to write")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time (default 60)")
    parser.add_argument("--batch", type=int, default=32, help="sequences per step and process (default 32)")
    parser.add_argument("--processes", type=int, default=2, help="single-thread processes (default 2)")
    parser.add_argument("--seed", type=int, default=1, help="seed of data and initial weights (default 1)")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the learning rates (default 1)")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the weights in `out`, and append to its log"
    )
    parser.add_argument("--port", type=int, default=29571, help="local port of the gradient exchange")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        (args.out / "training_log.jsonl").unlink(missing_ok=True)
    torch.multiprocessing.spawn(train, (args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
