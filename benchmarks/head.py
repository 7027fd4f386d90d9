"""Time and memory of `token_logprobs` by implementation, on the device at hand: a Markdown table.

    python benchmarks/head.py --rows 8192 --hidden 4096 --vocabulary 128256 --dtype bf16 [--frozen]

Median times of a forward pass without gradient and of forward and backward; the most memory that each holds
beyond inputs, results and gradients; the relative distance of log-probs and of the gradient at the hidden
states from the naive ones of the same dtype; and, as the limit, the matrix products alone. On CUDA the
variants of `fused` are measured as well: whoever measures keeps the winner.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from dpo_kit.logprob import chunked_token_logprobs, naive_token_logprobs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEAD = {"bias": None, "softcap": None, "scale": 1.0, "extras": ()}
Score = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def variants(device: str) -> dict[str, Score]:
    known: dict[str, Score] = {"naive": naive_token_logprobs, "chunked": chunked_token_logprobs}
    if device != "cuda":
        return known
    from dpo_kit.logprob.fused import fused_token_logprobs as fused

    return known | {
        "fused": fused,
        "fused, nothing kept": partial(fused, keep_bytes=0),
        "fused, chunks of 64 MiB": partial(fused, keep_bytes=0, chunk_bytes=64 * 2**20),
        "fused, chunks of 512 MiB": partial(fused, keep_bytes=0, chunk_bytes=512 * 2**20),
        "fused, no logits written": partial(fused, fused_product=True),
    }


def milliseconds(run: Callable[[], object], device: str, repeats: int) -> float:
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(repeats + 1):  # the first compiles, chooses kernels and faults in the memory
        synchronise()
        start = time.perf_counter()
        run()
        synchronise()
        times.append(time.perf_counter() - start)
    return 1e3 * median(times[1:])


def peak_bytes(run: Callable[[], tuple[Tensor, ...]], device: str) -> int:
    """The most that a call holds beyond its inputs and what it returns; on the CPU by Linux's own count."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is held now
        before = resident()
    returned = run()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident()
    return max(0, peak - before - sum(x.nbytes for x in returned))


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def forward(score: Score, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (score(hidden, weight, targets, **HEAD)[0],)


def both(score: Score, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    logps, _ = score(hidden, weight, targets, **HEAD)
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    return logps.detach(), *torch.autograd.grad(logps.mean(), leaves)


def difference(found: Tensor, expected: Tensor) -> str:
    return f"{((found - expected).float().norm() / expected.float().norm()).item():.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("rows", 1024), ("hidden", 576), ("vocabulary", 49152), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--frozen", action="store_true", help="the head wants no gradient")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    make = {"dtype": DTYPES[args.dtype], "device": args.device}
    hidden = torch.randn(args.rows, args.hidden, **make).requires_grad_()
    weight = torch.randn(args.vocabulary, args.hidden, **make).mul_(3 / args.hidden**0.5)
    weight.requires_grad_(not args.frozen)
    targets = torch.randint(args.vocabulary, (args.rows,), device=args.device)
    inputs = (hidden, weight, targets)
    naive = both(naive_token_logprobs, *inputs)[:2]
    print("| | forward, ms | and backward, ms | forward, MiB | and backward, MiB | log-probs | gradient |")
    print("|---|---|---|---|---|---|---|")
    for name, score in variants(args.device).items():
        runs = [partial(forward, score, *inputs), partial(both, score, *inputs)]
        runs = runs[:1] if "no logits" in name else runs
        columns = (
            [f"{milliseconds(run, args.device, args.repeats):.4g}" for run in runs],
            [f"{peak_bytes(run, args.device) / 2**20:.0f}" for run in runs],
            [difference(a, b) for a, b in zip(runs[-1](), naive, strict=False)],
        )
        cells = [cell for column in columns for cell in (*column, "")[:2]]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    with torch.no_grad():
        once = milliseconds(lambda: hidden @ weight.T, args.device, args.repeats)
    both_passes = (2 if args.frozen else 3) * once
    print(f"| matrix products alone | {once:.4g} | {both_passes:.4g} | | | | |\n")
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{args}, {where}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
