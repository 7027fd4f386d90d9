"""Where the model of a cached reference comes from, while some of its log-probs must be computed.

A model is known by its key, so each place where it may be is simply asked whether it is there: the policy
without its adapters, the policy as it stands, a model that was given, and last the files it was loaded from.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.utils import cached_file

from dpo_kit.errors import InputError
from dpo_kit.fingerprint import active_adapters, files_key, model_key
from dpo_kit.models import disable_dropout, load_model, unwrap
from dpo_kit.reference.in_memory import adapters_off
from dpo_kit.reference.store import ReferenceCache

# transformers then has empty weights on the other ranks.
_ON_FIRST_RANK = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@dataclass
class Origin:
    """A model by its key, and the places where it may be.

    Attributes:
        key: see `dpo_kit.fingerprint.model_key`.
        autocast: part of the key.
        dtype: of weights that are loaded.
        policy: what is trained; it was the model before the first step, or is without its adapters.
        given: a model of the user's.
        path: folder or hub id.
    """

    key: str
    autocast: torch.dtype | None
    dtype: torch.dtype
    policy: nn.Module | None = None
    given: nn.Module | None = None
    path: str | None = None

    @contextlib.contextmanager
    def __call__(self, device: torch.device) -> Iterator[nn.Module]:
        """The model on a device, for as long as the context lasts.

        Raises:
            InputError: it is nowhere any more.
        """
        with contextlib.ExitStack() as stack:
            model = self._in_policy(stack, device) or self._given_on(stack, device) or self._loaded(device)
            if model is None:
                raise self._gone()
            yield model

    def _gone(self) -> InputError:
        where = [
            "the policy was trained since" if self.policy is not None else "",
            "the model that was given was changed since" if self.given is not None else "",
            f"'{self.path}' does not hold it" if self.path else "it was not loaded from files",
        ]
        return InputError(
            "log-probs of the reference are missing, and the model itself is gone: "
            + ", and ".join(filter(None, where)),
            field="reference.mode",
            mend="Name all data, for evaluation too, before training starts, or set it to live.",
        )

    def _is_it(self, model: nn.Module, adapters: list[str] | None = None) -> bool:
        return model_key(model, autocast=self.autocast, adapters=adapters) == self.key

    def _in_policy(self, stack: contextlib.ExitStack, device: torch.device) -> nn.Module | None:
        if self.policy is None:
            return None
        policy = unwrap(self.policy)
        if any(hasattr(p, "full_tensor") for p in policy.parameters()):
            # In shards it is run by all ranks together or not at all: `CachedReference.fill_together`.
            return None
        if active_adapters(policy) and self._is_it(policy, []):
            stack.enter_context(adapters_off(policy))
        elif not self._is_it(policy):
            return None
        return _on(policy, device)

    def _given_on(self, stack: contextlib.ExitStack, device: torch.device) -> nn.Module | None:
        if self.given is None or not self._is_it(self.given):
            return None
        # Memory of the device is taken for this time only.
        stack.callback(_on, self.given, next(self.given.parameters()).device)
        return _on(self.given, device)

    def _loaded(self, device: torch.device) -> nn.Module | None:
        if not self.path:
            return None
        try:
            model = load_reference(self.path, self.dtype)
        except InputError:
            if self.policy is None and self.given is None:
                # There was no other place.
                raise
            return None
        disable_dropout(model)
        return _on(model, device) if self._is_it(model) else None


def key_of_path(cache: ReferenceCache, path: str, dtype: torch.dtype, autocast: torch.dtype | None) -> str:
    """The key of a model that lies in files; it is loaded where the cache does not know these files yet.

    Raises:
        InputError: there is no such model.
    """

    def files_now() -> str | None:
        folder = _model_folder(path)
        # What another version of transformers makes of the same files may be another model.
        also = (str(dtype), str(autocast), transformers.__version__)
        return None if folder is None else files_key(folder, *also)

    before = files_now()
    if before is not None and (known := cache.known_key(before)):
        return known
    key = model_key(load_reference(path, dtype), autocast=autocast)
    # Loading fetches what the hub has and the folder had not; and nobody stops others from writing there.
    after = files_now()
    if after is not None and before in (None, after):
        # A cache that may only be read can do without.
        with contextlib.suppress(InputError):
            cache.remember(after, key)
    return key


def load_reference(path: str | Path, dtype: torch.dtype) -> nn.Module:
    """`load_model`, whose errors name the reference's field.

    Raises:
        InputError: there is no such model.
    """
    try:
        with _whole_on_each_rank():
            return load_model(path, dtype)
    except InputError as error:
        if error.field != "model.path":
            raise
        raise InputError(
            error.problem, file=error.file, line=error.line, field="reference.path", mend=error.mend
        ) from error


@contextlib.contextmanager
def _whole_on_each_rank() -> Iterator[None]:
    """Within: weights are not left to rank 0 alone, as accelerate can have it for what will be sharded."""
    before = os.environ.get(_ON_FIRST_RANK)
    os.environ[_ON_FIRST_RANK] = "false"
    try:
        yield
    finally:
        os.environ.pop(_ON_FIRST_RANK)
        if before is not None:
            os.environ[_ON_FIRST_RANK] = before


def _model_folder(path: str) -> Path | None:
    """The folder of a model's files: itself, or where the hub's files are kept; None where there is none."""
    if Path(path).is_dir():
        return Path(path)
    try:
        config = cached_file(path, "config.json")
    except (OSError, ValueError):
        return None
    return None if config is None else Path(config).parent


def _on(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on a device; one that is there is not touched, since quantised ones cannot be moved."""
    there = next(model.parameters()).device
    same = there.type == device.type and device.index in (None, there.index)
    return model if same else model.to(device)
