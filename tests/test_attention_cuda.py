"""The CUDA backends of tree attention.

Marked tests run the kernels. The others run anywhere: index and shape logic by brute force, and the
variable-length backend with a plain implementation of the operation in the kernel's place.
"""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import dense

from dpo_kit.attention import attention_backend, flex, plan_tree_attention, varlen
from dpo_kit.attention.varlen import VarlenAttention
from dpo_kit.tree import build_tree

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
DEVICE = "cuda"
NO_OPTIONS = {"scaling": None, "window": None, "softcap": None, "sinks": None}
sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8)


def random_tree(seed, trunk=300, replies=6, longest=150):
    """Replies that leave a long trunk, and one another, at random places."""
    generator = np.random.default_rng(seed)
    known = [generator.integers(0, 1000, trunk)]
    for _ in range(replies):
        base = known[generator.integers(len(known))]
        cut = generator.integers(trunk // 2, len(base) + 1)
        own = generator.integers(0, 1000, generator.integers(1, longest))
        known.append(np.concatenate([base[:cut], own]))
    return build_tree([*known, generator.integers(1000, 2000, 37)])


TREES = {
    "mixed": random_tree(0),
    "long path, short replies": random_tree(1, trunk=1000, replies=20, longest=8),
    "one token": build_tree([[3]]),
    "separate": build_tree([[1] * 129, [2] * 128, [3]]),
    "replies of one token": build_tree([[7, *range(8, 140), n] for n in range(200, 205)]),
}


def inputs(tree, heads, size, dtype, device="cpu", requires_grad=False):
    draw = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, h, len(tree), size, generator=draw, dtype=torch.float64) for h in heads]
    # As projections lie in memory: row by row.
    rows = [x.transpose(1, 2).contiguous().to(device, dtype).transpose(1, 2) for x in qkv]
    return [x.requires_grad_(requires_grad) for x in rows]


def sees(tree, window=None):
    """[T, T] bool: a token sees itself and its ancestors, by walking up."""
    mask = np.zeros((len(tree), len(tree)), bool)
    for row in range(len(tree)):
        ancestor, steps = row, 0
        while ancestor >= 0 and (window is None or steps < window):
            mask[row, ancestor] = True
            ancestor, steps = tree.parents[ancestor], steps + 1
    return mask


def plain_varlen(
    query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """What flash attention documents: lower-right aligned, window inclusive on both sides, -1 unlimited."""
    left, right = window_size
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q[-1] == len(query)
    assert cu_k[-1] == len(key)
    assert max_q == cu_q.diff().max()
    assert max_k == cu_k.diff().max()
    out = []
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        groups = query.shape[1] // key.shape[1]
        q, k, v = query[q0:q1], key[k0:k1], value[k0:k1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        place = torch.arange(len(q))[:, None] + len(k) - len(q)
        column = torch.arange(len(k))
        seen = torch.ones(len(q), len(k), dtype=torch.bool)
        if right >= 0:
            seen &= column <= place + right
        if left >= 0:
            seen &= column >= place - left
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(out)


@pytest.fixture
def varlen_on_cpu(monkeypatch):
    monkeypatch.setattr(varlen, "_kernel", lambda: (plain_varlen, {"enable_gqa": True}))
    monkeypatch.setattr(varlen, "kernel_takes", lambda query, value: True)


@pytest.mark.parametrize("options", [{}, {"window": 1}, {"window": 40}, {"scaling": 0.3}], ids=str)
@pytest.mark.parametrize("name", TREES)
def test_varlen_is_given_the_right_ragged_batch(varlen_on_cpu, name, options):
    tree = TREES[name]
    qkv = inputs(tree, (4, 2, 2), 8, torch.float64, requires_grad=True)
    plan = plan_tree_attention(tree, "varlen")
    found = plan.attend(*qkv, **{**NO_OPTIONS, **options})
    expected = dense(*qkv, tree, window=options.get("window"), scale=options.get("scaling"))
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((out * upstream).sum(), qkv) for out in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_varlen_gathers_only_where_a_branch_has_a_path():
    assert VarlenAttention.plan(TREES["separate"]).key_rows is None
    assert len(VarlenAttention.plan(TREES["replies of one token"]).key_rows) == 5 * 134


def test_the_gradient_of_gathered_keys_is_summed_in_fp32():
    """A prompt's key under 600 replies: in bf16 the sum would stop growing at 256."""
    key = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    rows = torch.cat([torch.zeros(600, dtype=torch.int64), torch.ones(1, dtype=torch.int64)])
    varlen._GatherRows.apply(key, rows).sum().backward()
    assert key.grad.flatten().tolist() == [600, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_calls_the_kernel_of_this_torch(dtype):
    """On the meta device: signature, shapes and the gradient's shapes, without the numbers."""
    pytest.importorskip("torch.nn.attention.varlen")
    tree = TREES["mixed"]
    plan = plan_tree_attention(tree, "varlen").to("meta")
    qkv = inputs(tree, (6, 2, 2), 16, dtype, "meta", requires_grad=True)
    out = plan.attend(*qkv, **{**NO_OPTIONS, "window": 5})
    assert out.shape == (1, len(tree), 6, 16)
    assert out.dtype == dtype
    assert [g.shape for g in torch.autograd.grad(out.sum(), qkv)] == [x.shape for x in qkv]


@given(given=sequences, window=st.sampled_from([None, 1, 3, 5]), block=st.sampled_from([1, 2, 4, 7]))
@settings(deadline=None, max_examples=150)
def test_subtree_ends_and_blocks_are_those_of_the_mask(given, window, block):
    tree = build_tree(given)
    ends = flex.subtree_ends(tree)
    rows = np.arange(len(tree))
    visible = (rows <= rows[:, None]) & (rows[:, None] < ends)
    np.testing.assert_array_equal(visible, sees(tree))

    tensors = [torch.from_numpy(x.astype(np.int32)) for x in (ends, tree.positions)]
    some, full = (x.numpy() for x in flex.block_structure(*tensors, window, block))
    count = -(-len(tree) // block)
    padded = np.zeros((count * block,) * 2, bool)
    padded[: len(tree), : len(tree)] = sees(tree, window)
    blocks = padded.reshape(count, block, count, block).transpose(0, 2, 1, 3)
    # The diagonal is never full, except that a block may be a single row.
    np.testing.assert_array_equal(full, blocks.all((2, 3)) & ~np.eye(count, dtype=bool))
    assert (some >= blocks.any((2, 3))).all()
    assert (some >= full).all()
    if window is None:
        np.testing.assert_array_equal(some, blocks.any((2, 3)))


@pytest.mark.parametrize("window", [None, 40, 200])
@pytest.mark.parametrize("name", TREES)
def test_block_mask_means_the_tree(name, window):
    """Full blocks, and mixed blocks through mask_mod, make up the dense mask; each block is listed once."""
    tree = TREES[name]
    mask = plan_tree_attention(tree, "flex").block_mask(window)
    count = -(-len(tree) // flex.BLOCK)
    rows = torch.arange(len(tree))
    inside = mask.mask_mod(None, None, rows[:, None], rows)

    def listed(counts, indices):
        dense_blocks = torch.zeros(count, count, dtype=torch.int)
        for i in range(count):
            for j in indices[0, 0, i, : counts[0, 0, i]]:
                dense_blocks[i, j] += 1
        spread = dense_blocks.repeat_interleave(flex.BLOCK, 0).repeat_interleave(flex.BLOCK, 1)
        return spread[: len(tree), : len(tree)]

    mixed = listed(mask.kv_num_blocks, mask.kv_indices)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert (mixed + full).max() == 1
    found = (mixed.bool() & inside) | full.bool()
    np.testing.assert_array_equal(found.numpy(), sees(tree, window))
    if name == "mixed" and window is None:
        assert full.any()
    assert mask.seq_lengths == (len(tree), len(tree))
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), mixed.T)
    assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices), full.T)


FLEX_OPTIONS = [
    {},
    {"window": 40},
    {"softcap": 0.7},
    {"scaling": 0.3},
    {"sinks": True},
    {"sinks": True, "softcap": 2.0},
]


@pytest.mark.parametrize("options", FLEX_OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["mixed", "one token"])
def test_flex_forward_equals_a_dense_mask(name, options):
    tree, options = TREES[name], dict(options)
    if options.get("sinks"):
        options["sinks"] = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    qkv = inputs(tree, (4, 2, 2), 16, torch.float64)
    assert flex.flex_takes(*qkv)
    found = plan_tree_attention(tree, "flex").attend(*qkv, **{**NO_OPTIONS, **options})
    scale = options.pop("scaling", None)
    torch.testing.assert_close(found, dense(*qkv, tree, scale=scale, **options))


@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_what_a_backend_cannot_do_goes_to_the_gathered_one(backend):
    tree = TREES["mixed"]
    qkv = inputs(tree, (4, 2, 2), 8, torch.float64, requires_grad=True)
    plan = plan_tree_attention(tree, backend)
    options = {**NO_OPTIONS, "softcap": 0.7, "sinks": torch.zeros(4, dtype=torch.float64)}
    found = plan.attend(*qkv, **options)
    torch.testing.assert_close(found, dense(*qkv, tree, softcap=0.7, sinks=options["sinks"]))
    found.sum().backward()
    assert plan.gathered.plan is plan.gathered.plan


def test_the_backend_for_a_device():
    assert attention_backend("cpu") == "gathered"
    assert attention_backend("cuda") == ("varlen" if varlen.available() else "gathered")
    with pytest.raises(ValueError, match="known: gathered, varlen, flex"):
        plan_tree_attention(TREES["mixed"], "flash")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_flex_compiles_once_for_all_lengths_windows_and_caps(monkeypatch):
    """On the CPU, as on CUDA; forward only."""
    monkeypatch.setattr(flex, "_COMPILED_ON", ("cpu",))
    flex._flex_attention.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    kinds = [("window", None, None), ("window", 40, 50), ("softcap", 0.7, 0.9)]
    for count, (option, *values) in enumerate(kinds, start=1):
        for seed, value in enumerate([*values, *values]):
            tree = random_tree(seed, trunk=200 + 50 * seed)
            qkv = inputs(tree, (4, 2, 2), 16, torch.float32)
            found = plan_tree_attention(tree, "flex").attend(*qkv, **{**NO_OPTIONS, option: value})
            torch.testing.assert_close(found, dense(*qkv, tree, **{option: value}), rtol=1e-4, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count
    flex._flex_attention.cache_clear()


CUDA_OPTIONS = [{}, {"window": 1}, {"window": 100}, {"softcap": 1.5}, {"sinks": True}]
CUDA_KINDS = [(torch.bfloat16, (6, 2, 2)), (torch.float16, (4, 4, 4)), (torch.float32, (8, 1, 1))]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", CUDA_OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "heads"), CUDA_KINDS, ids=str)
@pytest.mark.parametrize("backend", ["gathered", "varlen", "flex"])
def test_cuda_equals_a_dense_mask(backend, dtype, heads, options):
    """Output and gradients are as near the fp64 truth as those of a dense mask in the same dtype."""
    torch._dynamo.reset()
    if options.get("sinks"):
        options = {"sinks": torch.linspace(-1, 1, heads[0], dtype=dtype, device=DEVICE)}
    for name, tree in TREES.items():
        qkv = inputs(tree, heads, 64, dtype, DEVICE, requires_grad=True)
        found = plan_tree_attention(tree, backend).to(DEVICE).attend(*qkv, **{**NO_OPTIONS, **options})
        upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
        ours = with_gradients(found, qkv, upstream)
        naive = with_gradients(dense(*qkv, tree, **options), qkv, upstream)
        exact = [x.detach().double().requires_grad_() for x in qkv]
        wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        truth = with_gradients(dense(*exact, tree, **wide), exact, upstream)
        floor = 1e-5 if dtype == torch.float32 else 2e-3
        for what, mine, theirs, right in zip(("out", "dq", "dk", "dv"), ours, naive, truth, strict=True):
            # Where a token sees itself alone, queries and keys have no gradient but rounding.
            scale = max(right.norm().item(), upstream.norm().item() / 10)
            error, allowed = ((x.double() - right).norm().item() / scale for x in (mine, theirs))
            assert error <= 1.5 * allowed + floor, (name, what)


def with_gradients(out, leaves, upstream):
    return [out.detach(), *torch.autograd.grad((out * upstream.to(out.dtype)).sum(), leaves)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_the_kernel_is_used_and_nothing_waits_for_the_device(backend):
    tree = TREES["mixed"]
    qkv = inputs(tree, (4, 2, 2), 64, torch.bfloat16, DEVICE)
    plan = plan_tree_attention(tree, backend).to(DEVICE)
    # Compiled on one plan; the plan that is watched has its masks still to make.
    plan_tree_attention(tree, backend).to(DEVICE).attend(*qkv, **NO_OPTIONS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan.attend(*qkv, **NO_OPTIONS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert "plan" not in vars(plan.gathered)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_flex_does_not_compile_for_every_length_with_gradients():
    def run(seed):
        tree = random_tree(seed, trunk=200 + 50 * seed)
        qkv = inputs(tree, (4, 2, 2), 64, torch.bfloat16, DEVICE, requires_grad=True)
        plan_tree_attention(tree, "flex").to(DEVICE).attend(*qkv, **NO_OPTIONS).sum().backward()

    torch._dynamo.reset()
    for seed in (1, 2):
        run(seed)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in (3, 4, 5):
        run(seed)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
