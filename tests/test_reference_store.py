"""The reference cache on disk: damaged files, full disks, and what other processes do meanwhile."""

import errno
import hashlib
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from families import make_model, make_pairs
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_reference_cache import cached, fill, plan, sequences_in

from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.reference import ReferenceCache
from dpo_kit.reference.lookup import Lookup
from dpo_kit.reference.shards import DamagedShardError, Shard, read_shard, write_file, write_shard
from dpo_kit.reference.store import ModelStore


def make_shard(count=5, tokens=False, seed=0):
    generator = np.random.default_rng(seed)
    keys = generator.integers(0, 256, (count, 16), dtype=np.uint8)
    lengths = generator.integers(1, 9, count) if tokens else None
    logprobs = generator.normal(size=lengths.sum()).astype(np.float32) if tokens else None
    return Shard(keys, generator.normal(size=count), lengths, logprobs)


def assert_same(found, expected):
    for name, value in vars(expected).items():
        if value is None:
            assert getattr(found, name) is None
        else:
            np.testing.assert_array_equal(getattr(found, name), value, strict=True)


@pytest.mark.parametrize("tokens", [False, True])
def test_a_shard_reads_as_it_was_written(tmp_path, tokens):
    shard = make_shard(tokens=tokens)
    path = write_shard(tmp_path, shard)
    assert_same(read_shard(path), shard)
    assert write_shard(tmp_path, shard) == path
    assert list(tmp_path.iterdir()) == [path]


def test_lookups_find_each_sequence_wherever_it_is():
    shard = make_shard(50, tokens=True)
    # Ends in zeros, and differs from another in one bit; and the same sequence twice.
    shard.keys[3, 4:] = 0
    shard.keys[4] = shard.keys[3]
    shard.keys[4, 15] = 1
    twice = Shard.joined([shard, shard])
    lookup = Lookup(twice)
    order = np.random.default_rng(1).permutation(50)
    places = lookup.find(shard.keys[order])
    np.testing.assert_array_equal(lookup.sums(places), shard.sums[order])
    starts = np.concatenate([[0], shard.lengths.cumsum()])
    expected = [shard.logprobs[starts[i] : starts[i + 1]] for i in order]
    np.testing.assert_array_equal(lookup.entries(places), np.concatenate(expected))
    assert (lookup.find(make_shard(9, seed=5).keys) == -1).all()
    assert (Lookup(Shard.joined([])).find(shard.keys) == -1).all()


def filled(folder):
    """A reference with several shards on disk, and the pairs that they hold."""
    model, pairs = make_model("llama"), make_pairs(12)
    for end in (4, 8, 12):
        fill(cached(model, folder), pairs[:end])
    return model, pairs, ReferenceCache(folder).stores()[0]


DAMAGES = {
    "cut": lambda content: content[:-7],
    "empty": lambda content: b"",
    "a flipped bit": lambda content: content[:-5] + bytes([content[-5] ^ 4]) + content[-4:],
    "a flipped bit in the header": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "longer": lambda content: content + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_shard_is_named_set_aside_and_computed_again(tmp_path, damage):
    model, pairs, store = filled(tmp_path)
    victim = store.shards()[1]
    lost = len(read_shard(victim))
    victim.write_bytes(damage(victim.read_bytes()))
    cache = ReferenceCache(tmp_path)
    assert [path for path, problem in cache.verify() if problem] == [victim]
    reference = cached(model, tmp_path)
    with pytest.warns(DpoKitWarning, match=re.escape(str(victim))):
        assert fill(reference, pairs) == lost
    assert not victim.exists() or read_shard(victim)
    assert victim.with_name(victim.name + ".damaged").exists()
    assert all(problem == "" for _, problem in cache.verify())
    assert all(len(reference.logprobs(batch).sequences) for batch in plan(pairs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fill(cached(model, tmp_path), pairs) == 0
    assert cache.models()[0].damaged == 1


_FUZZED = make_shard(4, tokens=True)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_in_a_file_no_wrong_value_comes_out(tmp_path, data):
    folder = tmp_path / str(time.monotonic_ns())
    store = ModelStore(folder)
    path = write_shard(folder, _FUZZED)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    if data.draw(st.booleans()):
        content = data.draw(st.binary(max_size=200))
    path.write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = store.read_new("tokens", set())
    assert len(found) + len(caught) == 1
    if found:
        assert_same(found[0], _FUZZED)
    store.summary()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["sequences", "tokens"]),
    parts=st.dictionaries(
        st.sampled_from(["keys", "sums", "lengths", "logprobs", "other"]),
        st.tuples(
            st.sampled_from([np.uint8, np.float64, np.int64, np.float32]),
            st.lists(st.integers(0, 3), max_size=3),
            st.integers(-2, 3),
        ),
    ),
)
@example(kind="sequences", parts={"keys": (np.uint8, [], 0), "sums": (np.float64, [], 0)})
def test_a_file_of_another_form_under_its_own_digest_is_damaged_or_fits(tmp_path, kind, parts):
    arrays = {
        name: np.full(shape, value).astype(dtype, casting="unsafe")
        for name, (dtype, shape, value) in parts.items()
    }
    content = safetensors.numpy.save(arrays)
    folder = tmp_path / str(time.monotonic_ns())
    write_file(folder / f"{kind}-{hashlib.sha256(content).hexdigest()[:32]}.safetensors", content)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for shard in ModelStore(folder).read_new(kind, set()):
            lookup = Lookup(shard)
            places = lookup.find(shard.keys)
            assert lookup.sums(places).shape == (len(shard),)
            if kind == "tokens":
                assert len(lookup.entries(places)) == len(shard.logprobs)


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": np.array([1, 2, 3])},
        {"lengths": np.array([1, 2, 3, 4, -1])},
        {"lengths": np.array([1, 2, 3, 4, 0]), "logprobs": np.zeros(10, np.float32)},
        {"logprobs": np.zeros(3, np.float32)},
        {"logprobs": np.zeros((1, 15), np.float32)},
        {"sums": np.zeros(4)},
        {"sums": np.zeros((5, 1))},
        {"keys": np.zeros((5, 8), np.uint8)},
        {"keys": np.zeros((5, 16), np.int8)},
        {"sums": np.zeros(5, np.float32)},
    ],
    ids=str,
)
def test_parts_that_do_not_fit_together_are_damage_whatever_the_digest_says(tmp_path, change):
    arrays = {
        "keys": np.zeros((5, 16), np.uint8),
        "sums": np.zeros(5),
        "lengths": np.arange(1, 6),
        "logprobs": np.zeros(15, np.float32),
    }
    for parts, fits in ((arrays, True), (arrays | change, False)):
        content = safetensors.numpy.save(parts)
        path = tmp_path / f"tokens-{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
        write_file(path, content)
        if fits:
            assert len(read_shard(path)) == 5
        else:
            with pytest.raises(DamagedShardError):
                read_shard(path)


def test_a_file_in_writing_is_never_read(tmp_path):
    model, pairs, store = filled(tmp_path)
    whole = store.shards()[0]
    whole.rename(whole.with_name(f".{whole.name}.123-abc.writing"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fill(cached(model, tmp_path), pairs) > 0


def test_a_shard_that_is_pruned_while_others_are_read_is_missing(tmp_path, monkeypatch):
    _, _, store = filled(tmp_path)
    listed = store.shards()
    listed[0].unlink()
    monkeypatch.setattr(store, "shards", lambda kind: listed)
    assert len(store.read_new("sequences", set())) == 2


def test_a_full_disk_is_an_input_error_and_leaves_nothing_half_written(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError) as refused:
            write_shard(tmp_path, make_shard(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.field == "reference.cache_dir"
    assert str(tmp_path) in str(refused.value)
    assert "prune" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


_UNTIL_FULL = """
import sys, warnings
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_reference_store import make_shard
from dpo_kit.errors import InputError
from dpo_kit.reference.shards import read_shard, write_shard
folder = Path(sys.argv[1])
try:
    for seed in range(1000):
        write_shard(folder, make_shard(500, seed=seed))
except InputError as error:
    print(error)
assert all(len(read_shard(path)) == 500 for path in folder.iterdir())
print(seed, len(list(folder.iterdir())))
"""


def test_a_disk_that_fills_up_keeps_what_was_whole(tmp_path):
    # A file system of 64 KiB, seen by this one process alone.
    mount = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=64k none "$0" && exec "$@"',
        str(tmp_path),
    ]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    code = _UNTIL_FULL.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [*mount, sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    refused, counts = done.stdout.splitlines()
    assert "No space left on device" in refused
    written, found = map(int, counts.split())
    assert written == found > 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_late_leaves_nothing_half_written(tmp_path, monkeypatch, call):
    model, pairs = make_model("llama"), make_pairs(12)
    fill(cached(model, tmp_path), pairs[:4])
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())

    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    reference = cached(model, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, fails)
        with pytest.raises(InputError, match=r"reference\.cache_dir.*No space left on device"):
            fill(reference, pairs)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == files
    assert fill(reference, pairs) == sequences_in(pairs) - sequences_in(pairs[:4])


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "reference").write_text("a file")
    with pytest.raises(InputError, match=r"reference\.cache_dir"):
        fill(cached(make_model("llama"), tmp_path), make_pairs())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_only_be_read_serves_what_it_has(tmp_path):
    model, pairs, store = filled(tmp_path)
    store.folder.chmod(0o555)
    try:
        assert fill(cached(model, tmp_path), pairs) == 0
        with pytest.raises(InputError, match="Permission denied"):
            fill(cached(model, tmp_path), make_pairs(seed=5))
    finally:
        store.folder.chmod(0o755)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_modes_that_the_user_asked_for(tmp_path, mask):
    before = os.umask(mask)
    try:
        path = write_shard(tmp_path / "folder", make_shard())
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
