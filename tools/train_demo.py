"""Train a demo model: about a million parameters that turn orders in words into JSON plans.

    python tools/train_demo.py checkpoints/llada-demo --minutes 60
    python tools/train_demo.py checkpoints/sdar-demo --attention block_causal --minutes 30
    python tools/train_demo.py checkpoints/sdar-demo --attention block_causal --device cuda --processes 1

The recipes: demo_full.py (LLaDA) and demo_block_causal.py (SDAR).

Two single-thread processes average their gradients (faster on two cores than one process with two threads);
with --device cuda, one process trains on the GPU.
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

import demo_block_causal
import demo_full
import demo_task
import torch
import torch.distributed as dist
from demo_checkpoint import ASSISTANT, END_ID, USER, make_tokenizer
from tokenizers import Tokenizer
from torch import Tensor, nn

RECIPES = {"full": demo_full, "block_causal": demo_block_causal}
DRILLS = 0.25  # share of single-step samples


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


def _average_gradients(model: nn.Module, world: int) -> None:
    """The mean of the processes' gradients, with a norm of at most 1; zero if one is not finite."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    if world > 1:
        dist.all_reduce(flat)
        flat /= world
    flat *= min(1.0, 1.0 / (flat.norm().item() + 1e-6)) if not math.isnan(flat.sum().item()) else 0.0
    offset = 0
    for p in model.parameters():
        p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
        offset += p.numel()


def train(rank: int, args: argparse.Namespace) -> None:
    out, seed, rate, world = args.out, args.seed, args.rate, args.processes
    torch.set_num_threads(1)
    torch.set_default_device(args.device)
    torch.manual_seed(seed)  # the same initial weights everywhere
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{args.port}", rank=rank, world_size=world)
    recipe = RECIPES[args.attention]
    model, tokenizer = recipe.Model(), make_tokenizer()
    if args.resume:
        recipe.load(model, tokenizer, out)
    elif args.start is not None:
        demo_block_causal.start_from_full(model, args.start)
    torch.manual_seed(seed + 1 + rank)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=6e-3 * rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=2.5e-3 * rate, betas=(0.9, 0.98), weight_decay=0.0)
    peaks = [(group, group["lr"]) for optimiser in (muon, adamw) for group in optimiser.param_groups]
    data = batches(tokenizer, random.Random(seed * 1000 + rank), args.batch, held_out=False, drills=DRILLS)
    tests = batches(tokenizer, random.Random(seed * 1000 + 999), 64, held_out=True)
    start, step, sequences, next_report, recent = time.time(), 0, 0, 60.0, []
    clock = torch.zeros(1, device="cpu")
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
                "exact_match_64_held_out": round(recipe.exact_match(model, tokenizer, ids, examples), 3),
            }
            print(json.dumps(line), flush=True)
            with open(out / "training_log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            recipe.save(model, tokenizer, out)
            model.train()
            recent, next_report = [], clock.item() + max(60.0, args.minutes * 60 / 30)
        if done >= 1:
            return
        for group, peak in peaks:
            group["lr"] = peak * min(1.0, (step + 1) / 100) * min(1.0, (1 - done) / 0.6)
        ids, _ = next(data)
        loss = recipe.loss_of(model, ids)
        loss.backward()
        _average_gradients(model, world)
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
    parser.add_argument("--attention", choices=RECIPES, default="full", help="the recipe (default full)")
    parser.add_argument(
        "--start",
        type=Path,
        metavar="FILE",
        help="with --attention block_causal: begin with the weights of a demo model with full attention",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda, with one process")
    parser.add_argument("--port", type=int, default=29571, help="local port of the gradient exchange")
    args = parser.parse_args()
    if args.start is not None and (args.resume or args.attention != "block_causal"):
        parser.error("--start needs --attention block_causal, and cannot be combined with --resume")
    if args.device != "cpu" and args.processes != 1:
        parser.error(f"--device {args.device} takes one process: give --processes 1")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        (args.out / "training_log.jsonl").unlink(missing_ok=True)
    torch.multiprocessing.spawn(train, (args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
