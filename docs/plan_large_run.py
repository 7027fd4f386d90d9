"""The arithmetic of docs/large-runs.md: a policy of 70B parameters on 64 GPUs, 10 million pairs.

`python docs/plan_large_run.py` writes the tables into the page, between its marks. Parameters and activations
are counted on the meta device, work by `dpo_kit.roofline`, rank times by dealing drawn pairs. What a constant
is taken from stands beside it. Nothing here has run on a GPU.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from dpo_kit.examples import PairTokens
from dpo_kit.roofline import Work, count_work

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from lengths import LENGTHS, generated_pairs  # noqa: E402

PAGE = ROOT / "docs" / "large-runs.md"

# The shape of Llama 3 70B (arXiv 2407.21783, table 3).
SHAPE = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}
PAIRS, NODES, GPUS_PER_NODE = 10_000_000, 8, 8
GPUS = NODES * GPUS_PER_NODE
# Bytes of a GPU; dense bf16 operations a second of an H100 SXM (NVIDIA's data sheet: 1,979 with sparsity).
GPU_BYTES, PEAK = 80e9, 989.4e12
# Bytes a second each way: NVLink of one GPU (900 GB/s both ways), and eight 400 Gb/s cards of a node.
NVLINK, NODE_NETWORK = 450e9, 8 * 400e9 / 8
# Shares of the peak, what is computed a second time counted. Llama 3 405B had 38 to 43% of it as useful
# arithmetic, on up to 16,384 H100s (arXiv 2407.21783, table 4).
SHARES = (0.3, 0.4, 0.5)
# Unexpected interruptions in 54 days of training on 16,384 GPUs (the same, section 3.3.4).
INTERRUPTIONS, OBSERVED_GPU_HOURS = 419, 54 * 24 * 16_384
# Not counted but there: CUDA's context, NCCL's buffers, what the allocator cannot use. Assumed.
OVERHEAD = 5e9
DATA = {"hh-like": "HH-like", "ultrafeedback": "UltraFeedback-like"}
BATCHES = (512, 1024, 2048)
BUDGETS = (4096, 8192, 16_384, 32_768)
_COUNTED_PAIRS, _COUNTED_BATCH = 1024, 512
# Measured on the two cores of docs' machine: benchmarks/results/data.md (tokenising), a store of two million
# sequences read (0.43 s, 24.002 bytes each), benchmarks/planning.py (planning, one process).
TOKENISED_A_SECOND, LOADED_A_SECOND, CACHE_BYTES, PLANNING_A_MILLION = 4712, 2e6 / 0.43, 24, 39.1


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def gb(size: float) -> str:
    """Bytes in GB (10^9)."""
    return f"{size / 1e9:,.1f} GB" if size < 99.95e9 else f"{size / 1e9:,.0f} GB"


def span(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, length in (("days", 48 * 3600), ("h", 5400), ("min", 120)):
        if seconds >= length:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


@cache
def model() -> LlamaForCausalLM:
    """The policy without its weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SHAPE))


def size_of(part: torch.nn.Module) -> int:
    """Parameters of a part."""
    return sum(p.numel() for p in part.parameters())


@cache
def parts() -> dict[str, int]:
    """Parameters by part, and of all."""
    whole = model()
    layer = size_of(whole.model.layers[0])
    return {
        "one decoder layer": layer,
        "80 decoder layers": layer * SHAPE["num_hidden_layers"],
        "embedding": size_of(whole.model.embed_tokens),
        "final norm and head": size_of(whole.model.norm) + size_of(whole.lm_head),
        "all": size_of(whole),
    }


def parameters() -> str:
    rows = [(name, f"{count:,}", gb(2 * count), gb(4 * count)) for name, count in parts().items()]
    return table(("part", "parameters", "in bf16", "in fp32"), rows)


class _SavedLikeFlash(torch.autograd.Function):
    """Keeps for backward what flash attention keeps: q, k, v, the output and a log-sum-exp a head."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError


def _attention(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
    return _SavedLikeFlash.apply(q, k, v).transpose(1, 2), None


@cache
def layer_bytes_a_token() -> int:
    """Bytes that a layer keeps for its backward pass, for each token, in bf16: counted on the meta device."""
    AttentionInterface.register("counted", _attention)
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": 1}, attn_implementation="counted")
    tokens, kept = 256, {}
    with torch.device("meta"):
        body = LlamaForCausalLM(config).to(torch.bfloat16).model
        weights = {p.untyped_storage()._cdata for p in body.parameters()}
        hidden = torch.empty(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        angles = body.rotary_emb(hidden, torch.arange(tokens)[None])

        def pack(saved: torch.Tensor) -> torch.Tensor:
            if saved.untyped_storage()._cdata not in weights:
                # The tensor itself is held, so that no other one gets its storage's address.
                kept[saved.untyped_storage()._cdata] = saved
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            body.layers[0](hidden, position_embeddings=angles)
    return sum(saved.untyped_storage().nbytes() for saved in kept.values()) // tokens


def state_bytes(shards: int) -> float:
    """Of one GPU: weights, Adam's two moments and the gradient, in fp32."""
    return 16 * parts()["all"] / shards


def memory_rows(budget: int) -> list[tuple[str, float]]:
    """(part, bytes) of one GPU, sharded over all of them, at a budget of so many tokens a micro-batch."""
    count, hidden = parts(), SHAPE["hidden_size"]
    layer, tail = 2 * count["one decoder layer"], 2 * count["final norm and head"]
    return [
        ("weights, fp32, 1/64", 4 * count["all"] / GPUS),
        ("Adam's moments, fp32, 1/64", 8 * count["all"] / GPUS),
        ("gradient, fp32, 1/64", 4 * count["all"] / GPUS),
        ("gathered in bf16: a layer, the next one, and one being laid out", 3 * layer),
        ("gathered in bf16: norm and head, kept from forward to backward", tail),
        ("gradients on their way: a layer in bf16, and in fp32 to be sent", 3 * layer),
        ("gradient of the head: its sum in fp32, in bf16, and to be sent", 5 * tail),
        ("gradient of the embedding, bf16, and to be sent", 6 * count["embedding"]),
        ("layers' inputs, bf16 (gradient checkpointing)", 2 * hidden * SHAPE["num_hidden_layers"] * budget),
        ("one layer computed again, and as much for its gradients", 2 * layer_bytes_a_token() * budget),
        ("CUDA, NCCL, the allocator (assumed)", OVERHEAD),
    ]


def memory() -> str:
    columns = [memory_rows(budget) for budget in BUDGETS]
    rows = [(name, *(gb(column[i][1]) for column in columns)) for i, (name, _) in enumerate(columns[0])]
    sums = [sum(size for _, size in column) for column in columns]
    rows.append(("**all**", *(f"**{gb(total)}**" for total in sums)))
    rows.append(("of 80 GB", *(f"{total / GPU_BYTES:.0%}" for total in sums)))
    return table(("of one GPU, tokens a micro-batch:", *(f"{budget:,}" for budget in BUDGETS)), rows)


def sharding() -> str:
    rows = []
    for shards in (64, 32, 16, 8):
        state, copies = state_bytes(shards), GPUS // shards
        least = state + sum(size for _, size in memory_rows(BUDGETS[0])[3:])
        rows.append((str(shards), str(copies), gb(state), gb(least), f"{least / GPU_BYTES:.0%}"))
    return table(("sharded over", "copies", "state a GPU", f"all, {BUDGETS[0]:,} tokens", "of 80 GB"), rows)


@cache
def work(name: str, reference: bool) -> Work:
    """Of `_COUNTED_PAIRS` drawn pairs; with the reference's forward pass, or without."""
    drawn = generated_pairs(LENGTHS[name], _COUNTED_PAIRS, SHAPE["vocab_size"])
    pairs = [PairTokens.from_row({k: np.asarray(v) for k, v in row.items()}) for row in drawn]
    return count_work(pairs, _COUNTED_BATCH, model(), reference)


def flops_a_pair(name: str) -> tuple[float, float]:
    """(training with the forward computed twice, the reference's forward)."""
    trained, both = work(name, False).flops, work(name, True).flops
    forward = both - trained
    return (trained + forward) / _COUNTED_PAIRS, forward / _COUNTED_PAIRS


def arithmetic() -> str:
    rows = []
    for name, label in DATA.items():
        found, (training, forward) = work(name, False), flops_a_pair(name)
        separate, distinct = (n / _COUNTED_PAIRS for n in (found.separate_tokens, found.distinct_tokens))
        rows.append(
            (
                label,
                f"{separate:.0f}",
                f"{distinct:.0f}",
                f"{separate / distinct:.2f}",
                f"{distinct * PAIRS / 1e9:.1f}",
                f"{training / 1e12:.0f}",
                f"{forward / 1e12:.0f}",
            )
        )
    header = (
        "pairs",
        "tokens apart",
        "distinct",
        "ratio",
        "distinct, all (10^9)",
        "TFLOP a pair, training",
        "reference",
    )
    return table(header, rows)


def times() -> str:
    rows = []
    for name, label in DATA.items():
        for what, flops in zip(("training, one epoch", "the reference"), flops_a_pair(name), strict=True):
            taken = (PAIRS * flops / (GPUS * PEAK * share) for share in SHARES)
            rows.append((f"{label}: {what}", *(f"{seconds / 3600:.0f} h" for seconds in taken)))
    return table(("share of the peak:", *(f"{share:.0%}" for share in SHARES)), rows)


def transfer_seconds(bytes_each: int) -> float:
    """One all-gather or reduce-scatter of the whole model, so many bytes a number, at the wires' full rate.

    Ring: all but a GPU's own part of the bytes goes over every link; over NVLink and the network at once.
    """
    moved = bytes_each * parts()["all"] * (GPUS - 1) / GPUS
    return max(moved / NVLINK, moved / NODE_NETWORK)


def traffic_seconds(rate: float = 1.0) -> float:
    """Of a micro-batch, at a share of the rate: weights gathered twice (bf16), gradients scattered (fp32)."""
    return (2 * transfer_seconds(2) + transfer_seconds(4)) / rate


def compute_seconds(tokens: float, name: str = "ultrafeedback", share: float = 0.4) -> float:
    """Of a micro-batch on one GPU, forward, forward again and backward."""
    distinct = work(name, False).distinct_tokens / _COUNTED_PAIRS
    return tokens * flops_a_pair(name)[0] / distinct / (PEAK * share)


def traffic() -> str:
    rows = [
        (
            f"{tokens:,}",
            span(compute_seconds(tokens)),
            span(traffic_seconds()),
            span(traffic_seconds(0.5)),
            f"{traffic_seconds(0.5) / compute_seconds(tokens):.0%}",
        )
        for tokens in (1024, 2048, *BUDGETS)
    ]
    header = ("tokens a micro-batch", "computing, at 40%", "traffic, full rate", "half rate", "of computing")
    return table(header, rows)


def even_tokens() -> int:
    """Tokens of a micro-batch at which computing takes as long as traffic at half the wires' rate."""
    return math.ceil(traffic_seconds(0.5) / compute_seconds(1.0))


def steps() -> str:
    budget, rows = 8192, []
    for name, label in DATA.items():
        distinct = work(name, False).distinct_tokens / _COUNTED_PAIRS
        for batch in BATCHES:
            tokens = distinct * batch / GPUS
            micro = math.ceil(tokens / budget)
            computing, moving = compute_seconds(tokens, name), traffic_seconds(0.5) * micro
            rows.append(
                (
                    f"{label}, {batch}",
                    f"{PAIRS / batch:,.0f}",
                    f"{tokens:,.0f}",
                    str(micro),
                    span(computing),
                    span(moving),
                    span(max(computing, moving)),
                )
            )
    header = (
        "pairs in a step",
        "steps",
        "tokens a GPU",
        "micro-batches",
        "computing",
        "traffic, half rate",
        "a step, overlapped",
    )
    return table(header, rows)


def data() -> str:
    """Sizes on disk and rates, of both kinds of pairs."""
    rows = []
    for name, label in DATA.items():
        known, random = LENGTHS[name], np.random.default_rng(0)
        drawn = (part.draw(random, 100_000) for part in (known.prompt, known.chosen, known.rejected))
        rows.append((f"{label}: token ids, int32", gb(PAIRS * 4 * sum(float(d.mean()) for d in drawn))))
    rows += [
        ("tokenising, at the measured 4,712 pairs/s of two cores", span(PAIRS / TOKENISED_A_SECOND)),
        ("the same on 64 cores, if it scales", span(PAIRS / TOKENISED_A_SECOND / 32)),
        ("planning an epoch, one process, at 39.1 s a million", span(PAIRS / 1e6 * PLANNING_A_MILLION)),
        ("the reference's log-probs, 24 bytes a sequence", gb(2 * PAIRS * CACHE_BYTES)),
        ("reading them, at 2 million in 0.43 s", span(2 * PAIRS / LOADED_A_SECOND)),
        ("each rank's share of them", f"{2 * PAIRS * CACHE_BYTES / GPUS / 1e6:.1f} MB"),
    ]
    return table(("10 million pairs", ""), rows)


def checkpoints() -> str:
    size, hours = 12 * parts()["all"], OBSERVED_GPU_HOURS / INTERRUPTIONS / GPUS
    rows = []
    for rate in (2e9, 10e9, 50e9):
        writing = size / rate
        for between in (hours, hours / 10):
            # Young 1974; Daly 2006: sqrt(2 * time of a checkpoint * mean time between failures).
            every = math.sqrt(2 * writing * between * 3600)
            lost = writing / every + every / (2 * between * 3600)
            rows.append(
                (f"{rate / 1e9:.0f} GB/s", span(writing), f"{between:.0f} h", span(every), f"{lost:.1%}")
            )
    header = ("writing, all ranks together", "a checkpoint", "between failures", "save every", "time lost")
    return table(header, rows)


def figures() -> dict[str, str]:
    """Single numbers that the page's text quotes."""
    return {
        "checkpoint": gb(12 * parts()["all"]),
        "checkpoint of a rank": gb(12 * parts()["all"] / GPUS),
        "unsharded gradient": gb(4 * parts()["all"]),
        "one gather": f"{transfer_seconds(2):.2f} s",
        "one scatter": f"{transfer_seconds(4):.2f} s",
        "even tokens": f"{even_tokens():,}",
        "GPU-hours between failures": f"{OBSERVED_GPU_HOURS / INTERRUPTIONS:,.0f}",
        "bytes of a layer a token": f"{layer_bytes_a_token() / 1e6:.2f} MB",
    }


def dealing() -> str:
    from simulate_dealing import simulated

    return table(
        ("pairs in a step", "in order: mean", "worst step", "by work: mean", "worst step"), simulated(GPUS)
    )


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (parameters, memory, sharding, arithmetic, times, traffic, steps, data, dealing, checkpoints)
}


def with_table(text: str, name: str, markdown: str, by: str = "plan_large_run.py") -> str:
    """The page with a table between its marks."""
    begin, end = f"<!-- written by {by}: {name} -->", f"<!-- end of {name} -->"
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ValueError(f"the page has no lines {begin} and {end}")
    return f"{before}{begin}\n\n{markdown}\n\n{end}{after}"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        page = with_table(page, name, make())
    written = PAGE.with_suffix(".writing")
    written.write_text(page, encoding="utf-8")
    os.replace(written, PAGE)
    print("\n".join(f"{name}: {value}" for name, value in figures().items()))
