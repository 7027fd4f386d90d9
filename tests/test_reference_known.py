"""What is known stays as it was first written, and nothing is taken for known that is not."""

import copy
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import make_model, make_pairs
from test_reference_cache import cached, fill, plan, sequences_in
from test_reference_store import make_shard

from dpo_kit.errors import InputError
from dpo_kit.fingerprint import model_key
from dpo_kit.models import load_model
from dpo_kit.packing import pack_tree
from dpo_kit.reference import LiveReference, ReferenceCache, make_reference
from dpo_kit.reference.lookup import Lookup
from dpo_kit.reference.origin import key_of_path
from dpo_kit.reference.shards import Shard, write_shard
from dpo_kit.reference.store import ModelStore


def with_sums(shard, by):
    """The same sequences with other values."""
    return Shard(shard.keys, shard.sums + by, shard.lengths, shard.logprobs)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Two models of one configuration; their folders have no weights until they are loaded."""
    for seed, name in enumerate("AB"):
        make_model("llama", seed=seed).save_pretrained(tmp_path / "hub" / name)
        (tmp_path / "snapshots" / name).mkdir(parents=True)
        shutil.copy(tmp_path / "hub" / name / "config.json", tmp_path / "snapshots" / name)
    loaded = []

    def download_and_load(path, dtype):
        loaded.append(path)
        shutil.copytree(tmp_path / "hub" / path[-1], tmp_path / "snapshots" / path[-1], dirs_exist_ok=True)
        return load_model(tmp_path / "snapshots" / path[-1], dtype)

    monkeypatch.setattr("dpo_kit.reference.origin.load_model", download_and_load)
    monkeypatch.setattr(
        "dpo_kit.reference.origin.cached_file",
        lambda path, name: str(tmp_path / "snapshots" / path[-1] / name),
    )
    return loaded


def test_models_whose_weights_are_not_downloaded_yet_are_not_taken_for_each_other(tmp_path, hub):
    cache = ReferenceCache(tmp_path / "cache")
    expected = [model_key(make_model("llama", seed=seed)) for seed in (0, 1)]
    for loads in (["org/A", "org/B"], []):
        hub.clear()
        keys = [key_of_path(cache, f"org/{name}", torch.float32, None) for name in "AB"]
        assert keys == expected
        assert hub == loads


def test_files_that_change_while_they_are_loaded_are_not_remembered(tmp_path, monkeypatch):
    first, second = make_model("llama", seed=1), make_model("llama", seed=2)
    first.save_pretrained(tmp_path / "model")

    def load_and_overwrite(path, dtype):
        found = copy.deepcopy(first)
        second.save_pretrained(path)
        return found

    with monkeypatch.context() as patched:
        patched.setattr("dpo_kit.reference.origin.load_model", load_and_overwrite)
        cache = ReferenceCache(tmp_path / "cache")
        assert key_of_path(cache, str(tmp_path / "model"), torch.float32, None) == model_key(first)
    assert key_of_path(cache, str(tmp_path / "model"), torch.float32, None) == model_key(second)


def test_a_cache_that_cannot_remember_files_serves_what_it_has(tmp_path):
    model, pairs = make_model("llama", seed=7), make_pairs()
    fill(cached(model, tmp_path), pairs)
    # Not even root can write into this.
    (tmp_path / "reference" / "files").write_text("a file")
    model.save_pretrained(tmp_path / "model")
    reference = cached(make_model("llama"), tmp_path, given=str(tmp_path / "model"))
    assert fill(reference, pairs) == 0


def test_a_missing_reference_is_reported_under_its_own_field(tmp_path):
    for mode in ("cached", "live"):
        with pytest.raises(InputError) as refused:
            make_reference(
                mode, make_model("llama"), needed=True, cacheable=True, given="/no/such", cache_dir=tmp_path
            )
        assert refused.value.field == "reference.path"


@pytest.mark.parametrize("where", ["a file", "below a file", "/proc/nowhere"])
def test_a_cache_that_cannot_be_is_found_when_the_reference_is_made(tmp_path, where):
    (tmp_path / "file").write_text("")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "reference").write_text("")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "cache"}.get(where, Path(where))
    with pytest.raises(InputError, match=r"reference\.cache_dir"):
        cached(make_model("llama"), folder)


def test_making_a_reference_leaves_no_file_behind(tmp_path):
    cached(make_model("llama"), tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("kind", ["sequences", "tokens"])
def test_what_is_known_is_not_written_again(tmp_path, kind):
    shard, more = make_shard(5, tokens=True), make_shard(3, tokens=True, seed=1)
    store, other = ModelStore(tmp_path), ModelStore(tmp_path)
    assert len(store.known(kind)) == 0
    other.add(shard, "sequences")
    # It was missing for `store` when it looked last; one more is new, and twice there.
    store.add(Shard.joined([with_sums(shard, 1.0), more, with_sums(more, 1.0)]), kind)
    sums = ModelStore(tmp_path).known("sequences")
    assert len(sums) == 8
    np.testing.assert_array_equal(sums.sums(sums.find(shard.keys)), shard.sums)
    np.testing.assert_array_equal(sums.sums(sums.find(more.keys)), more.sums)
    written = ModelStore(tmp_path).read_new("sequences", set())
    assert sum(map(len, written)) == 8
    if kind == "tokens":
        tokens = ModelStore(tmp_path).known("tokens")
        expected = np.concatenate([shard.logprobs, more.logprobs])
        found = tokens.find(np.concatenate([shard.keys, more.keys]))
        np.testing.assert_array_equal(tokens.entries(found), expected)


def test_of_two_values_the_older_counts_and_the_one_that_was_read_stays(tmp_path):
    shard = make_shard(40)
    reader = ModelStore(tmp_path)
    # Written at once by two processes: in whatever order the names are.
    for tries in range(6):
        folder = tmp_path / str(tries)
        older, newer = (
            write_shard(folder, with_sums(shard, tries)),
            write_shard(folder, with_sums(shard, 0.5)),
        )
        os.utime(older, ns=(10, 10**9))
        os.utime(newer, ns=(10, 10**9 + 1))
        known = ModelStore(folder).known("sequences")
        np.testing.assert_array_equal(known.sums(known.find(shard.keys)), shard.sums + tries)
    first = write_shard(tmp_path, shard)
    reader.known("sequences")
    os.utime(write_shard(tmp_path, with_sums(shard, 1.0)), ns=(10, 10))
    os.utime(first, ns=(10, 20))
    known = reader.known("sequences")
    np.testing.assert_array_equal(known.sums(known.find(shard.keys)), shard.sums)


def test_of_many_equal_keys_the_first_is_found():
    shard = make_shard(1000)
    many = Shard.joined([with_sums(shard, by) for by in range(30)])
    lookup = Lookup(many)
    np.testing.assert_array_equal(lookup.sums(lookup.find(shard.keys)), shard.sums)
    assert len(lookup) == 1000


def test_values_are_bit_equal_after_another_run_wrote_its_own(tmp_path):
    model, pairs = make_model("llama", hidden_size=64), make_pairs(24)
    first = cached(model, tmp_path)
    fill(first, pairs[:12])
    batch = pack_tree(pairs, with_keys=True)
    before = first.logprobs(batch).sequences

    def one_by_one(examples):
        return [pack_tree([example], with_keys=True) for example in examples]

    # Each by itself, and so with other roundings.
    other = cached(model, tmp_path, tokens=True)
    assert fill(other, pairs, plan=one_by_one) == sequences_in(pairs)
    assert not torch.equal(other.logprobs(batch).sequences, before)
    again = cached(model, tmp_path)
    assert fill(again, pairs) == 0
    assert torch.equal(again.logprobs(batch).sequences, before)
    summary = ReferenceCache(tmp_path).models()[0]
    assert (summary.sequences, summary.with_tokens) == (sequences_in(pairs), sequences_in(pairs))


def test_ls_counts_each_sequence_once(tmp_path):
    store, shard = ReferenceCache(tmp_path).of_model("0" * 32), make_shard(5, tokens=True)
    for by in range(3):
        write_shard(store.folder, with_sums(shard, by))
        write_shard(store.folder, with_sums(shard, by).of_kind("sequences"))
    summary = store.summary()
    assert (summary.sequences, summary.with_tokens) == (5, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_are_of_the_dtype_of_a_live_reference(tmp_path, dtype):
    model, pairs = make_model("llama", dtype=dtype), make_pairs(8)
    reference, live = cached(model, tmp_path, tokens=True), LiveReference.copy_of(model)
    fill(reference, pairs)
    for batch in plan(pairs):
        found, expected = reference.logprobs(batch), live.logprobs(batch)
        assert (found.sequences.dtype, found.entries.dtype) == (
            expected.sequences.dtype,
            expected.entries.dtype,
        )
        if dtype == torch.float64:
            torch.testing.assert_close(found.sequences, expected.sequences, rtol=1e-12, atol=1e-12)
