"""The reference that a run asks for, made from what it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from dpo_kit import ranks
from dpo_kit.adapter_kinds import check_leaves_base
from dpo_kit.errors import InputError
from dpo_kit.fingerprint import active_adapters, adapter_tensors, model_key, trained_base_parameters
from dpo_kit.models import unwrap
from dpo_kit.reference.cached import CachedReference
from dpo_kit.reference.in_memory import (
    AdapterOffReference,
    AdapterReference,
    LiveReference,
    MovingReference,
    StartReference,
    check_has_adapters,
    load_adapter,
)
from dpo_kit.reference.interface import GivenReference, NoReference, Reference
from dpo_kit.reference.origin import Origin, key_of_path, load_reference
from dpo_kit.reference.store import ReferenceCache

ReferenceMode = Literal["auto", "cached", "adapter_off", "adapter", "live", "moving", "none"]

_OURS = (CachedReference, LiveReference, AdapterOffReference, StartReference, NoReference)


def make_reference(
    mode: str,
    policy: nn.Module,
    *,
    needed: bool,
    given: nn.Module | Reference | str | Path | None = None,
    cacheable: bool = False,
    tokens: bool = False,
    autocast: torch.dtype | None = None,
    cache_dir: str | Path | None = None,
    adapter: str | None = None,
    update_every: int = 512,
    update_weight: float = 0.6,
) -> Reference:
    """The reference that a run asks for.

    Args:
        mode: "auto": none where the objective needs none; "cached" where it can be; where nothing is given
            and the policy has adapters, "adapter_off" if these are fresh and nothing else is trained, else a
            frozen copy of what is trained, which takes its place (`StartReference`); else "live".
        policy: with its adapter, where it gets one; as it is before the first step, in eval or train mode.
        needed: whether the objective looks at a reference.
        given: a model, or where to load one from, or a reference of one's own; default: the policy as it is.
        cacheable: whether log-probs are all that the objective wants of it.
        tokens: whether it wants those of each token.
        autocast: what the models are run in.
        cache_dir: of "cached"; see `ReferenceCache`.
        adapter: the adapter that is the reference, in mode "adapter": its folder, or its name in the policy.
        update_every: steps between updates, in mode "moving".
        update_weight: the policy's share in an update, in mode "moving".

    Raises:
        InputError: an unknown mode, or one that does not go with the objective or the policy.
    """
    _check_mode(mode, needed, given)
    if mode == "none" or (mode == "auto" and not needed):
        return NoReference()
    if given is not None and not isinstance(given, (nn.Module, str, Path)):
        return given if isinstance(given, _OURS) else GivenReference(given)
    if mode == "auto":
        if not cacheable and given is None and active_adapters(policy):
            fresh = _is_fresh(policy) and not trained_base_parameters(policy)
            return AdapterOffReference(policy, is_policy=True) if fresh else StartReference(policy)
        mode = "cached" if cacheable else "live"
    if mode == "cached":
        if needed and not cacheable:
            raise InputError(
                "the loss compares whole distributions with the reference's, and these are not kept",
                field="reference.mode",
                mend="Set it to auto or live.",
            )
        return _cached(policy, given, ReferenceCache(cache_dir), tokens, autocast)
    return _in_memory(mode, policy, given, adapter, update_every, update_weight)


def _check_mode(mode: str, needed: bool, given: Any) -> None:
    known = get_args(ReferenceMode)
    if mode not in known:
        raise InputError(
            f"unknown reference mode '{mode}'", field="reference.mode", mend=f"Known: {', '.join(known)}."
        )
    if mode == "none" and needed:
        raise InputError(
            "the loss compares with a reference, and there is none",
            field="reference.mode",
            mend="Set it to auto or live, or choose a loss that needs no reference.",
        )
    if given is not None and mode not in ("auto", "cached", "live"):
        raise InputError(
            f"a reference of its own does not go with mode {mode}",
            field="reference.mode",
            mend="Leave reference.path and ref_model out"
            + ("." if mode == "none" else ", or set it to live or cached."),
        )


def _in_memory(
    mode: str, policy: nn.Module, given: Any, adapter: str | None, update_every: int, update_weight: float
) -> Reference:
    if mode == "live":
        if isinstance(given, nn.Module):
            return LiveReference(given, is_policy=False)
        if given is not None:
            return LiveReference(load_reference(given, _dtype(policy)), is_policy=False)
        return LiveReference.copy_of(policy)
    if mode == "moving":
        return MovingReference(policy, update_every=update_every, weight=update_weight)
    _check_base_stays(policy)
    if mode == "adapter_off":
        return AdapterOffReference(policy, is_policy=_is_fresh(policy))
    if adapter is None:
        raise InputError(
            "mode adapter needs the name of an adapter",
            field="reference.adapter",
            mend="Give its folder, or the name of one that the policy has loaded.",
        )
    if Path(adapter).is_dir():
        adapter = load_adapter(policy, Path(adapter))
    return AdapterReference(policy, adapter)


def _check_base_stays(policy: nn.Module) -> None:
    """Raises InputError where a policy without its adapter would change in training."""
    check_has_adapters(policy)
    for config in unwrap(policy).peft_config.values():  # type: ignore[operator]
        check_leaves_base(config, field="reference.mode")
    if trained := trained_base_parameters(policy):
        more = f" and {len(trained) - 3} more" if len(trained) > 3 else ""
        raise InputError(
            f"the base model is trained too, and the reference would follow: {', '.join(trained[:3])}{more}",
            field="reference.mode",
            mend="Set it to cached or live, or train adapters alone (such as bias: none in model.lora).",
        )


def _cached(
    policy: nn.Module,
    given: nn.Module | str | Path | None,
    cache: ReferenceCache,
    tokens: bool,
    autocast: torch.dtype | None,
) -> CachedReference:
    cache.check()
    model: Any = unwrap(given if isinstance(given, nn.Module) else policy)
    name = str(given) if isinstance(given, (str, Path)) else getattr(model.config, "_name_or_path", "")
    dtype = _dtype(policy)
    if isinstance(given, (str, Path)):
        key = ranks.by_first(lambda: key_of_path(cache, str(given), dtype, autocast))
    else:
        # A fresh adapter changes nothing: then a run with one shares the cache of the bare model.
        adapters: list[str] | None = [] if given is None and _is_fresh(policy) else None
        # The other ranks' weights are the same, or not there yet.
        key = ranks.by_first(lambda: model_key(model, autocast=autocast, adapters=adapters))
    origin = Origin(key, autocast, dtype, path=name)
    if given is None:
        origin.policy = policy
    elif isinstance(given, nn.Module):
        origin.given = given
    return CachedReference(
        cache.of_model(key),
        origin,
        is_policy=given is None,
        tokens=tokens,
        autocast=autocast,
        dtype=torch.promote_types(dtype, torch.float32),
        name=name,
    )


def _is_fresh(policy: nn.Module) -> bool:
    """`starts_as_base`, as rank 0 sees it."""
    return ranks.by_first(lambda: starts_as_base(policy))


def starts_as_base(policy: nn.Module) -> bool:
    """Whether the adapters of a peft model are sure to change nothing yet, seen by their parameters.

    So with LoRA whose second factor is zero, beside whole modules that equal those they were copied from. Of
    any other kind of adapter nothing is known, and the answer is no.
    """
    inner: Any = unwrap(policy)
    on = active_adapters(inner)
    if not on or any(str(inner.peft_config[name].peft_type.value) != "LORA" for name in on):
        return False
    originals = dict(inner.get_base_model().state_dict())
    tensors = adapter_tensors(inner, on)
    for name, value in tensors.items():
        parts = name.split(".")
        if "modules_to_save" in parts:
            at = parts.index("modules_to_save")
            original = originals.get(".".join([*parts[:at], "original_module", *parts[at + 2 :]]))
            unchanged = original is not None and torch.equal(value, original)
        elif "lora_B" in parts or "lora_embedding_B" in parts:
            unchanged = not bool(value.any())
        else:
            unchanged = "lora_A" in parts or "lora_embedding_A" in parts
        if not unchanged:
            return False
    return bool(tensors)


def _dtype(policy: nn.Module) -> torch.dtype:
    return next(policy.parameters()).dtype
