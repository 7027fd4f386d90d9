"""References that run a forward pass of their own: a second model, or the policy without its adapter."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dpo_kit.adapter_kinds import check_leaves_base
from dpo_kit.adapters import read_config
from dpo_kit.errors import InputError
from dpo_kit.fingerprint import active_adapters
from dpo_kit.logprob import HeadInputs
from dpo_kit.models import disable_dropout, unwrap
from dpo_kit.packing import MicroBatch
from dpo_kit.scoring import SequenceLogProbs, head_inputs, sequence_logprobs


class LiveReference:
    """A second model in memory, frozen, scored beside the policy on the same micro-batches.

    Args:
        model: the model; it is frozen and put into eval mode in place.
        is_policy: whether it has the weights that the policy starts from.
    """

    needs_keys = False

    def __init__(self, model: nn.Module, *, is_policy: bool) -> None:
        disable_dropout(model)
        self._model = model.eval().requires_grad_(False)
        self.model: nn.Module | None = self._model
        self.is_policy = is_policy

    @classmethod
    def copy_of(cls, policy: nn.Module) -> LiveReference:
        """A frozen copy of the policy as it stands now."""
        return cls(copy.deepcopy(policy), is_policy=True)

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> SequenceLogProbs:
        """One forward pass of the reference."""
        return sequence_logprobs(self._model, batch)

    @torch.no_grad()
    def head_inputs(self, batch: MicroBatch) -> HeadInputs:
        """What its output head multiplies; see `dpo_kit.scoring.head_inputs`."""
        return head_inputs(self._model, batch)


class MovingReference(LiveReference):
    """A copy that follows the policy (TR-DPO, arXiv 2404.09656): ref <- (1 - w) ref + w policy.

    Args:
        policy: what it is a copy of at first; its parameters that are trained are those that move.
        update_every: steps between updates (the paper's tau).
        weight: w in (0, 1]; 1 is the paper's hard update, less its soft one (alpha).

    Raises:
        InputError: a value out of range, or a soft update of adapters: of a product of two matrices it would
            move each by itself.
    """

    FILE = "reference.safetensors"

    def __init__(self, policy: nn.Module, *, update_every: int, weight: float) -> None:
        if update_every < 1:
            raise InputError(f"expected 1 or more, got {update_every}", field="reference.update_every")
        if not 0 < weight <= 1:
            raise InputError(f"expected more than 0, up to 1, got {weight}", field="reference.update_weight")
        if weight < 1 and active_adapters(policy):
            raise InputError(
                "a soft update mixes weights, and adapters are factors of weights",
                field="reference.update_weight",
                mend="Set it to 1.0, or train without adapters.",
            )
        trained = {name for name, p in unwrap(policy).named_parameters() if p.requires_grad}
        super().__init__(copy.deepcopy(unwrap(policy)), is_policy=True)
        self._every, self._weight = update_every, weight
        self._moving = {name: p for name, p in self._model.named_parameters() if name in trained}

    @torch.no_grad()
    def after_step(self, policy: nn.Module, step: int) -> bool:
        """Follow the policy where it is time, after `step` optimiser steps; whether it did."""
        if step % self._every:
            return False
        now = dict(unwrap(policy).named_parameters())
        for name, value in self._moving.items():
            target = now[name].detach()
            # In shards over the ranks, all of which come here.
            target = (target.full_tensor() if hasattr(target, "full_tensor") else target).to(value.device)
            # In fp32 at least: a small share of a bf16 weight would be lost.
            exact = torch.promote_types(value.dtype, torch.float32)
            mixed = value.to(exact).lerp(target.to(exact), self._weight)
            value.copy_(target if self._weight == 1 else mixed)
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters that move, by name."""
        return {name: value.detach() for name, value in self._moving.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave, bit for bit.

        Raises:
            InputError: it is of another model.
        """
        shapes = [{name: value.shape for name, value in of.items()} for of in (state, self._moving)]
        if shapes[0] != shapes[1]:
            raise InputError("the reference in the checkpoint is of another model", field="reference.mode")
        for name, value in self._moving.items():
            value.copy_(state[name])

    def save(self, folder: Path) -> None:
        """Write reference.safetensors into a checkpoint's folder."""
        state = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        safetensors.torch.save_file(state, folder / self.FILE)

    def load(self, folder: Path) -> None:
        """Read it back.

        Raises:
            InputError: there is none, or it is damaged or of another model.
        """
        path = folder / self.FILE
        try:
            self.load_state_dict(safetensors.torch.load_file(path))
        except (OSError, safetensors.SafetensorError) as error:
            problem = f"the checkpoint's moving reference cannot be read: {error}"
            raise InputError(problem, file=path, field="reference.mode") from error


class AdapterOffReference:
    """The policy, a peft model, with its adapters switched off; no second model in memory.

    Args:
        policy: a peft model, possibly wrapped.
        is_policy: whether the fresh adapter changes nothing.

    Raises:
        InputError: it is no peft model.
    """

    needs_keys = False
    model: nn.Module | None = None

    def __init__(self, policy: nn.Module, *, is_policy: bool) -> None:
        check_has_adapters(policy)
        self._policy: Any = unwrap(policy)
        self.is_policy = is_policy

    def _switched(self) -> contextlib.AbstractContextManager[None]:
        return adapters_off(self._policy)

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> SequenceLogProbs:
        """One forward pass of the base model."""
        with self._switched():
            return sequence_logprobs(self._policy, batch)

    @torch.no_grad()
    def head_inputs(self, batch: MicroBatch) -> HeadInputs:
        """What the base model's output head multiplies; see `dpo_kit.scoring.head_inputs`."""
        with self._switched():
            return head_inputs(self._policy, batch)


class AdapterReference(AdapterOffReference):
    """Another adapter of the policy, a peft model; no second model in memory.

    Args:
        policy: a peft model, possibly wrapped.
        name: of the adapter that is the reference.

    Raises:
        InputError: no peft model, no such adapter, or the one that is trained.
    """

    def __init__(self, policy: nn.Module, name: str) -> None:
        super().__init__(policy, is_policy=False)
        known = list(self._policy.peft_config)
        if name not in known:
            raise InputError(
                f"the policy has no adapter '{name}'",
                field="reference.adapter",
                mend=f"Known: {', '.join(known)}.",
            )
        if name in active_adapters(self._policy):
            raise InputError(
                f"the adapter '{name}' is the one that is trained",
                field="reference.adapter",
                mend="Load the reference's adapter under another name (model.load_adapter).",
            )
        self._name = name

    def _switched(self) -> contextlib.AbstractContextManager[None]:
        return adapters_on(self._policy, self._name)


class StartReference:
    """The policy with all that is trained of it as it was at first; no second model in memory.

    Its start is kept as a frozen copy of the trained parameters alone, outside of the model, so that it is
    never saved, trained or given to an optimiser; for the time of a forward pass it takes their place.

    Args:
        policy: possibly wrapped, with its adapters, at its start.
    """

    needs_keys = False
    is_policy = True
    model: nn.Module | None = None

    def __init__(self, policy: nn.Module) -> None:
        self._policy: Any = unwrap(policy)
        # A parameter that two modules share is kept once.
        start: dict[nn.Parameter, nn.Parameter] = {
            p: nn.Parameter(p.detach().clone(), requires_grad=False)
            for p in self._policy.parameters()
            if p.requires_grad
        }
        self._places = [
            (module, name, start[p])
            for module in self._policy.modules()
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
            if p in start
        ]

    @contextlib.contextmanager
    def _at_start(self) -> Iterator[None]:
        now = [module._parameters[name] for module, name, _ in self._places]
        if any(hasattr(p, "full_tensor") for p in now):
            raise InputError(
                "the start of an adapter cannot take the place of parameters that are sharded over ranks",
                field="reference.mode",
                mend="Set it to live or, with a loss that needs log-probs alone, to cached; or do not shard.",
            )
        modes = [(module, module.training) for module in self._policy.modules()]
        try:
            self._policy.eval()
            for (module, name, start), p in zip(self._places, now, strict=True):
                if p is not None and start.device != p.device:
                    start.data = start.data.to(p.device)
                module._parameters[name] = start
            yield
        finally:
            for (module, name, _), p in zip(self._places, now, strict=True):
                module._parameters[name] = p
            for module, mode in modes:
                module.training = mode

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> SequenceLogProbs:
        """One forward pass of the policy as it was."""
        with self._at_start():
            return sequence_logprobs(self._policy, batch)

    @torch.no_grad()
    def head_inputs(self, batch: MicroBatch) -> HeadInputs:
        """What its output head multiplied; see `dpo_kit.scoring.head_inputs`."""
        with self._at_start():
            return head_inputs(self._policy, batch)


def load_adapter(policy: nn.Module, folder: Path, name: str = "reference") -> str:
    """Load an adapter from a folder beside the policy's own, not to be trained; its name.

    Raises:
        InputError: no safetensors adapter in there, or not one for this policy.
    """
    check_has_adapters(policy)
    config = read_config(folder, field="reference.adapter")
    # It would change the weights of the policy, which has them too.
    check_leaves_base(config, field="reference.adapter", file=folder)
    inner: Any = unwrap(policy)
    try:
        inner.load_adapter(str(folder), name, is_trainable=False)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"the adapter cannot be loaded: {reason}"
        raise InputError(problem, file=folder, field="reference.adapter") from error
    return name


def check_has_adapters(policy: nn.Module) -> None:
    """Raises InputError where a model is no peft model."""
    if not hasattr(unwrap(policy), "peft_config"):
        raise InputError(
            "the policy has no adapters to switch",
            field="reference.mode",
            mend="Set it to auto, cached or live, or give the policy an adapter (model.lora).",
        )


@contextlib.contextmanager
def adapters_off(policy: nn.Module) -> Iterator[None]:
    """Within: a peft model is its base model, in eval mode; after: it is as it was."""
    inner: Any = unwrap(policy)
    with _left_as_it_was(inner), inner.disable_adapter():
        inner.eval()
        yield


@contextlib.contextmanager
def adapters_on(policy: nn.Module, name: str) -> Iterator[None]:
    """Within: another adapter of a peft model is switched on, in eval mode; after: it is as it was."""
    inner: Any = unwrap(policy)
    active, tuned = inner.active_adapter, inner.active_adapters
    with _left_as_it_was(inner):
        try:
            inner.set_adapter(name)
            inner.eval()
            yield
        finally:
            inner.set_adapter(active)
            # Several may be on at once; the peft model itself knows of one.
            if len(tuned) > 1:
                inner.base_model.set_adapter(tuned)


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """After: modes and requires_grad are as before. peft sets both when adapters are switched."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in trained:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
