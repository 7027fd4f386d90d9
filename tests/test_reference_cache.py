"""The cached reference: values equal to a live reference's, and exactly what is missing is computed."""

import contextlib
import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from families import make_model, make_pairs
from peft import LoraConfig, get_peft_model

from dpo_kit.errors import InputError, TrainingError
from dpo_kit.examples import PairTokens, ScoredReplies
from dpo_kit.fingerprint import digest_weights, model_key
from dpo_kit.packing import pack_tree, plan_step
from dpo_kit.reference import LiveReference, ReferenceCache, make_reference
from dpo_kit.reference import cached as cached_reference
from dpo_kit.reference.shards import Shard
from dpo_kit.reference.store import ModelStore
from dpo_kit.scoring import sequence_logprobs

CPU = torch.device("cpu")


def plan(examples):
    return plan_step(examples, 256, with_keys=True)


def fill(reference, pairs, **settings):
    """In groups of four."""
    groups = [pairs[i : i + 4] for i in range(0, len(pairs), 4)]
    settings = {"plan": plan, "device": CPU} | settings
    return reference.fill(groups, **settings)


def cached(policy, folder, **settings):
    settings = {"needed": True, "cacheable": True, "cache_dir": folder} | settings
    return make_reference("cached", policy, **settings)


def sequences_in(pairs):
    """How many distinct sequences there are."""
    return len(
        {(tuple(p.prompt), tuple(reply), len(p.prompt)) for p in pairs for reply in p.replies},
    )


def lora(model, seed=None, **settings):
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    adapted = get_peft_model(model, LoraConfig(**settings))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return adapted


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("tokens", [False, True])
def test_values_are_those_of_a_live_reference(tmp_path, family, tokens):
    model, pairs = make_model(family), make_pairs(12)
    reference = cached(model, tmp_path, tokens=tokens)
    assert (reference.model, reference.is_policy, reference.needs_keys) == (None, True, True)
    assert fill(reference, pairs) == sequences_in(pairs)
    live = LiveReference.copy_of(model)
    for again in (reference, cached(model, tmp_path, tokens=tokens)):
        again.reload()
        for batch in plan(pairs[::-1]):
            found, expected = again.logprobs(batch), live.logprobs(batch)
            torch.testing.assert_close(found.sequences, expected.sequences, rtol=1e-5, atol=1e-5)
            if tokens:
                torch.testing.assert_close(found.entries, expected.entries, rtol=1e-4, atol=1e-5)
            assert found.sequences.dtype == torch.float32


def test_exactly_what_is_missing_is_computed(tmp_path):
    model, pairs = make_model("llama"), make_pairs(16)

    def computed(part, **settings):
        return fill(cached(model, tmp_path, **settings), part)

    half = computed(pairs[:8])
    assert half == sequences_in(pairs[:8])
    assert computed(pairs[:8]) == 0
    assert computed(pairs[2:6]) == 0
    assert computed(pairs[:8][::-1]) == 0
    assert computed(pairs) == sequences_in(pairs) - half
    assert computed(pairs[::-1] + pairs) == 0
    # The same replies as a ranked list, and one by one.
    lists = [ScoredReplies(p.prompt, [p.rejected, p.chosen], [1.0, 2.0]) for p in pairs]
    assert computed(lists) == 0
    assert computed([ScoredReplies(p.prompt, [p.chosen], [1.0]) for p in pairs]) == 0
    # The same tokens with another border, and another reply.
    first = pairs[0]
    longer = np.concatenate([first.prompt, first.chosen[:1]])
    moved = PairTokens(longer, np.append(first.chosen[1:], 5), first.rejected)
    assert computed([moved]) == 2
    assert computed(pairs, tokens=True) == sequences_in(pairs)
    assert computed(pairs, autocast=torch.bfloat16) == sequences_in(pairs)


def test_a_sequence_that_is_known_is_not_scored_again(tmp_path):
    model, pairs = make_model("llama"), make_pairs(8)
    reference = cached(model, tmp_path)
    fill(reference, pairs[:4])
    scored = []

    def watched(examples):
        scored.extend((tuple(e.prompt), tuple(reply)) for e in examples for reply in e.replies)
        return plan(examples)

    known = {(tuple(p.prompt), tuple(reply)) for p in pairs[:4] for reply in p.replies}
    wanted = {(tuple(p.prompt), tuple(reply)) for p in pairs for reply in p.replies}
    fill(reference, pairs + pairs, plan=watched)
    assert sorted(scored) == sorted(wanted - known)


def test_the_policy_is_left_as_it_was(tmp_path):
    policy = lora(make_model("llama"), seed=1)
    policy.train()
    modes = [m.training for m in policy.modules()]
    trained = [p.requires_grad for p in policy.parameters()]
    digest = digest_weights(policy)
    fill(cached(policy, tmp_path), make_pairs())
    fill(cached(lora(make_model("llama")), tmp_path), make_pairs())
    assert [m.training for m in policy.modules()] == modes
    assert [p.requires_grad for p in policy.parameters()] == trained
    assert digest_weights(policy) == digest


def test_lora_and_full_training_share_what_is_known(tmp_path):
    pairs, base = make_pairs(), make_model("llama")
    assert fill(cached(base, tmp_path), pairs)
    adapted = lora(copy.deepcopy(base))
    assert fill(cached(adapted, tmp_path), pairs) == 0
    assert fill(cached(lora(copy.deepcopy(base), seed=1), tmp_path), pairs) == sequences_in(pairs)


def train(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05


def test_new_data_after_training_began_gets_the_start_and_not_the_policy(tmp_path):
    pairs = make_pairs(8)
    start = make_model("llama")
    expected = [sequence_logprobs(start, batch).sequences.detach() for batch in plan(pairs)]
    start.save_pretrained(tmp_path / "start")
    adapted = lora(copy.deepcopy(start))
    loaded = type(start).from_pretrained(tmp_path / "start")
    for policy, folder in ((adapted, "peft"), (loaded, "loaded")):
        reference = cached(policy, tmp_path / folder)
        fill(reference, pairs[:4])
        train(policy)
        assert fill(reference, pairs)
        for batch, values in zip(plan(pairs), expected, strict=True):
            torch.testing.assert_close(reference.logprobs(batch).sequences, values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["", "another"])
def test_a_start_that_is_gone_is_refused(tmp_path, where):
    policy, pairs = make_model("llama"), make_pairs(8)
    if where:
        make_model("llama", seed=9).save_pretrained(tmp_path / where)
        policy.config._name_or_path = str(tmp_path / where)
    reference = cached(policy, tmp_path)
    fill(reference, pairs[:4])
    train(policy)
    assert fill(reference, pairs[:4]) == 0
    with pytest.raises(InputError, match=r"reference\.mode.*the model itself is gone.*live"):
        fill(reference, pairs)


def test_a_model_in_files_is_not_loaded_where_all_is_known(tmp_path, monkeypatch):
    model, policy, pairs = make_model("llama", seed=7), make_model("llama"), make_pairs()
    model.save_pretrained(tmp_path / "model")
    reference = cached(policy, tmp_path, given=str(tmp_path / "model"))
    assert not reference.is_policy
    fill(reference, pairs)
    assert reference.store.folder.name == model_key(model)
    monkeypatch.setattr("dpo_kit.reference.origin.load_model", None)
    (tmp_path / "model").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").iterdir():
        os.utime(path, (1, 1))
    warm = cached(policy, tmp_path, given=str(tmp_path / "moved"))
    assert fill(warm, pairs) == 0
    batch = plan(pairs)[0]
    expected = sequence_logprobs(model, batch).sequences.detach()
    torch.testing.assert_close(warm.logprobs(batch).sequences, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_was_given_fills_and_goes_back_to_its_place(tmp_path):
    given, policy, pairs = make_model("llama", seed=7), make_model("llama"), make_pairs()
    reference = cached(policy, tmp_path, given=given)
    assert fill(reference, pairs) == sequences_in(pairs)
    batch = plan(pairs)[0]
    expected = sequence_logprobs(given, batch).sequences.detach()
    torch.testing.assert_close(reference.logprobs(batch).sequences, expected, rtol=1e-5, atol=1e-5)
    assert next(given.parameters()).device == CPU


def test_a_sequence_that_was_not_asked_for_is_computed_on_the_spot(tmp_path):
    model, pairs = make_model("llama"), make_pairs(8)
    reference = cached(model, tmp_path, tokens=True)
    fill(reference, pairs[:6])
    batch = pack_tree(pairs, with_keys=True)
    found, expected = reference.logprobs(batch), LiveReference.copy_of(model).logprobs(batch)
    torch.testing.assert_close(found.sequences, expected.sequences, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entries, expected.entries, rtol=1e-4, atol=1e-5)
    assert fill(cached(model, tmp_path), pairs) == 0
    with pytest.raises(ValueError, match="with_keys"):
        reference.logprobs(pack_tree(pairs))
    train(model)
    with pytest.raises(InputError, match="the model itself is gone"):
        reference.logprobs(pack_tree(make_pairs(seed=5), with_keys=True))


def test_values_are_of_the_precision_that_the_key_says_wherever_they_are_computed(tmp_path):
    model, pairs = make_model("llama"), make_pairs(8)
    batch = pack_tree(pairs, with_keys=True)
    expected = {}
    for dtype in (None, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            expected[dtype] = sequence_logprobs(model, batch).sequences
    assert (expected[None] - expected[torch.bfloat16]).abs().max() > 1e-3
    for dtype, other in ((None, torch.bfloat16), (torch.bfloat16, None)):
        reference = cached(model, tmp_path, autocast=dtype)
        with torch.autocast("cpu", other, enabled=other is not None):
            found = reference.logprobs(batch).sequences
        torch.testing.assert_close(found, expected[dtype], rtol=1e-5, atol=1e-5)


def test_log_probs_that_are_not_finite_are_not_kept(tmp_path):
    model = make_model("llama")
    model.model.norm.weight.data[0] = float("nan")
    reference = cached(model, tmp_path)
    with pytest.raises(TrainingError, match=r"not finite on pairs:\d"):
        fill(reference, make_pairs())
    assert reference.store.shards() == []


def test_ranks_share_the_work_and_see_each_others(tmp_path):
    model, pairs = make_model("llama"), make_pairs(24)
    ranks = [cached(model, tmp_path) for _ in range(3)]
    # The same pairs again, in groups that fall to other ranks.
    data = pairs + pairs[4:8] + pairs
    done = [fill(reference, data, rank=i, ranks=3) for i, reference in enumerate(ranks)]
    assert sum(done) == sequences_in(pairs)
    assert min(done) > 0
    for reference in ranks:
        reference.reload()
        assert all(len(reference.logprobs(batch).sequences) for batch in plan(pairs))


def test_a_fill_that_is_interrupted_goes_on_with_the_micro_batches_that_were_left(tmp_path, monkeypatch):
    """Else sums in other shapes would come out otherwise in the last bits."""
    model, pairs = make_model("llama"), make_pairs(24)
    monkeypatch.setattr(cached_reference, "_TOGETHER", 8)

    def filled(folder, stop_after=None):
        batches, done = [], []

        def counted(count):
            done.append(count)
            if len(done) == stop_after:
                raise KeyboardInterrupt

        def planned(examples):
            batches.extend(found := plan_step(examples, 60, with_keys=True))
            return found

        reference = cached(model, folder)
        with pytest.raises(KeyboardInterrupt) if stop_after else contextlib.nullcontext():
            fill(reference, pairs, plan=planned, progress=counted)
        return [batch.keys.numpy().tobytes() for batch in batches], done

    whole, counts = filled(tmp_path / "whole")
    filled(tmp_path / "again", stop_after=len(whole) // 2)
    rest, left = filled(tmp_path / "again")
    assert 0 < len(rest) < len(whole)
    assert rest == whole[-len(rest) :]
    assert left == counts[-len(rest) :]


def test_settle_is_called_with_the_model_that_scores(tmp_path):
    model, seen = make_model("llama"), []
    reference = cached(model, tmp_path)
    fill(reference, make_pairs(), settle=lambda m, examples: seen.append((m, len(examples))))
    fill(reference, make_pairs(), settle=lambda *_: pytest.fail("nothing is missing"))
    assert [m for m, _ in seen] == [model]


_FILL = """
import sys, time
sys.path.insert(0, {tests!r})
from families import make_model, make_pairs
from test_reference_cache import cached, fill
from dpo_kit.reference import cached as module
module._TOGETHER, module.SHARD_SECONDS, module.SHARD_SHARE = 4, 0.0, 0.0
print("ready", flush=True)
sys.stdin.readline()
done = fill(cached(make_model("llama"), sys.argv[1]), make_pairs({count}, longest=6),
            progress=lambda n: time.sleep({pause}))
print(done, flush=True)
"""


def start_fill(folder, count, pause):
    code = _FILL.format(tests=str(Path(__file__).parent), count=count, pause=pause)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_fill_that_is_killed_loses_little_and_nothing_is_damaged(tmp_path):
    process = start_fill(tmp_path, 64, 0.02)
    go(process)
    cache = ReferenceCache(tmp_path)
    deadline = time.monotonic() + 60
    while sum(len(store.shards()) for store in cache.stores()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert all(problem == "" for _, problem in cache.verify())
    model, pairs = make_model("llama"), make_pairs(64, longest=6)
    reference = cached(model, tmp_path)
    reference.reload()
    known = len(reference)
    assert 0 < known < sequences_in(pairs)
    assert fill(reference, pairs) == sequences_in(pairs) - known
    assert all(problem == "" for _, problem in cache.verify())


def test_two_processes_fill_the_same_folder_at_once(tmp_path):
    processes = [start_fill(tmp_path, 48, 0.0) for _ in range(2)]
    for process in processes:
        go(process)
    done = [int(process.communicate(timeout=60)[0]) for process in processes]
    pairs = make_pairs(48, longest=6)
    assert max(done) <= sequences_in(pairs) <= sum(done)
    checked = list(ReferenceCache(tmp_path).verify())
    assert checked
    assert all(problem == "" for _, problem in checked)
    model = make_model("llama")
    reference = cached(model, tmp_path)
    assert fill(reference, pairs) == 0
    for batch in plan(pairs):
        expected = sequence_logprobs(model, batch).sequences.detach()
        torch.testing.assert_close(reference.logprobs(batch).sequences, expected, rtol=1e-5, atol=1e-5)


def random_shard(count, seed=0):
    generator = np.random.default_rng(seed)
    keys = generator.integers(0, 256, (count, 16), dtype=np.uint8)
    return Shard(keys, generator.normal(size=count))


def test_a_sequence_takes_about_24_bytes(tmp_path):
    store = ModelStore(tmp_path)
    store.add(random_shard(100_000), "sequences")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 30 * 100_000


@pytest.mark.slow
def test_two_million_sequences_are_read_in_seconds(tmp_path):
    store = ModelStore(tmp_path)
    for seed in range(4):
        store.add(random_shard(500_000, seed), "sequences")
    reference = cached(make_model("llama"), tmp_path)
    reference.store = store
    started = time.perf_counter()
    reference.reload()
    # A second or so; the limit is for a machine that others use as well.
    assert time.perf_counter() - started < 8
    assert not reference.missing(random_shard(500_000, 3).keys).any()
    assert reference.missing(random_shard(1000, 9).keys).all()
