"""Where the time of a step goes, in a handful of groups that a person can do something about.

The parts of the model and of the step are labelled while one step runs under torch's profiler; an
operation belongs to the labels around it, and one of the backward pass to those of the forward
operation that it is the gradient of.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from dpo_kit.models import output_head
from dpo_kit.roofline import body_matrices
from dpo_kit.trainer import PreferenceTrainer

# Key in the results -> what it is called.
GROUPS = {
    "body": "matrix products of the body",
    "head": "head and log-probs",
    "attention": "attention",
    "reference": "reference",
    "optimiser": "optimiser and clipping",
    "data": "planning and data",
    "waiting": "device waits for the host",
    "rest": "rest: norms, activations, copies, Python",
}

_LABEL, _STEP = "dpo_kit.bench/", "dpo_kit.bench/step"
# Labels that torch sets itself.
_OPTIMISER, _DATA = "Optimizer.", "enumerate(DataLoader)"
# Kineto would say on stderr that it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_PRODUCT = re.compile(r"mm_?$|matmul|linear")


class StepProfile:
    """One step under the profiler: `start`, a step, `stop`; then `shares`."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self._trainer = trainer
        self._cuda = trainer.args.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profiler = profile(activities=activities)
        self._labels = contextlib.ExitStack()

    def start(self) -> None:
        """Label the parts and begin; the device must be idle."""
        _label_parts(self._labels, self._trainer)
        self._labels.enter_context(self._profiler)
        self._labels.enter_context(record_function(_STEP))

    def stop(self) -> None:
        """End, and take the labels off; the device must be idle."""
        self._labels.close()

    def shares(self) -> dict[str, float]:
        """Group -> percentage of the step's time; they sum to 100. See `GROUPS`."""
        events = self._profiler.events()
        total = next(event.cpu_time_total for event in events if event.name == _STEP)
        spent = dict.fromkeys(GROUPS, 0.0)
        for event, labels in _labelled(events):
            group = _group(event.name, labels)
            if self._cuda:
                spent[group] += sum(kernel.duration for kernel in event.kernels)
                if group == "data":
                    spent["waiting"] += event.self_cpu_time_total
            elif _STEP in labels:
                spent[group] += event.self_cpu_time_total
        if self._cuda:
            idle = max(0.0, total - sum(spent.values()) + spent["waiting"])
            # While the host plans, the device has nothing to do, unless workers plan ahead.
            planning = min(spent["waiting"], idle)
            spent["data"], spent["waiting"] = spent["data"] + planning, idle - planning
        else:
            del spent["waiting"]
        whole = sum(spent.values())
        return {group: 100 * time / whole for group, time in spent.items()}


def _label_parts(stack: contextlib.ExitStack, trainer: PreferenceTrainer) -> None:
    """Put labels on the parts of the policy and of the step; the stack takes them off."""
    policy: Any = trainer.model
    for module in policy.modules():
        if "attention" in type(module).__name__.lower():
            _label_module(stack, module, f"{_LABEL}attention")
    for module, _ in body_matrices(policy)[0]:
        _label_module(stack, module, f"{_LABEL}body")
    _label_module(stack, output_head(policy).module, f"{_LABEL}head")
    _label_call(stack, trainer.reference, "logprobs", f"{_LABEL}reference")
    _label_call(stack, trainer.accelerator, "clip_grad_norm_", f"{_LABEL}optimiser")


def _label_module(stack: contextlib.ExitStack, module: nn.Module, label: str) -> None:
    entered: list[record_function] = []

    def before(*_: Any) -> None:
        entered.append(record_function(label))
        entered[-1].__enter__()

    def after(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(before).remove)
    # Called on errors too: by one, gradient checkpointing ends the forward pass that it computes again.
    stack.callback(module.register_forward_hook(after, always_call=True).remove)


def _label_call(stack: contextlib.ExitStack, owner: Any, name: str, label: str) -> None:
    call = getattr(owner, name)

    def labelled(*arguments: Any, **named: Any) -> Any:
        with record_function(label):
            return call(*arguments, **named)

    setattr(owner, name, labelled)
    stack.callback(delattr, owner, name)


def _labelled(events: Any) -> list[tuple[Any, frozenset[str]]]:
    """Operations of the host with the labels around them, those of a backward operation's forward among
    them; of nested body, head and attention the innermost."""
    found: dict[int, frozenset[str]] = {}
    creators: dict[tuple[int, int], frozenset[str]] = {}
    result = []
    host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU and not e.is_async]
    for event in sorted(host, key=lambda e: (e.time_range.start, -e.time_range.end)):
        around = found.get(id(event.cpu_parent), frozenset())
        # The backward pass names the thread of its forward, and nothing else does.
        if event.fwd_thread:
            around |= creators.get((event.fwd_thread, event.sequence_nr), frozenset())
        elif event.sequence_nr >= 0:
            # The last operation with a number is the one that made the node of that number.
            creators[event.thread, event.sequence_nr] = around
        name = event.name
        if name.startswith(_LABEL):
            inner = {f"{_LABEL}{part}" for part in ("attention", "body", "head")}
            around = (around - inner if name in inner else around) | {name}
        elif name.startswith((_OPTIMISER, _DATA)):
            around |= {f"{_LABEL}{'optimiser' if name.startswith(_OPTIMISER) else 'data'}"}
        found[id(event)] = around
        result.append((event, around))
    return result


def _group(name: str, labels: frozenset[str]) -> str:
    parts = {label.removeprefix(_LABEL) for label in labels}
    for part in ("data", "optimiser", "reference", "head", "attention"):
        if part in parts:
            return part
    return "body" if "body" in parts and _PRODUCT.search(name) else "rest"
