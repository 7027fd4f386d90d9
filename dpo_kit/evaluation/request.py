"""What can be asked of a model (`dpo-kit eval`), and what contradicts itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dpo_kit.errors import InputError
from dpo_kit.evaluation.judges import URLS, EndpointOptions
from dpo_kit.pairs.options import LoadOptions

OPPONENTS = ("reference", "chosen")
DTYPES = ("float32", "bfloat16", "float16", "float64")
_BETA = 0.1
# Fields whose option is given once for each.
_SINGULAR = {"temperatures": "temperature", "settings": "setting"}
_NOTHING_TO_MEASURE = "nothing is sampled: give --reward, --reference, --prompts, or --data with --judge"
# How rows are loaded where nothing is said.
_LOAD = LoadOptions(invalid="drop")


@dataclass(frozen=True)
class EvalRequest:
    """What is asked of a model; whatever there is nothing given for is left out of the answer.

    Attributes:
        model: folder or hub id of a causal LM.
        reference: another: what the implicit reward, the KL and win rates are against.
        data: sources of pairs.
        load: how their rows are read.
        prompts: a file of prompts to sample on; default: the distinct prompts of the data, in their order.
        judges: specs of `load_judge`.
        endpoint: how judges behind an endpoint are asked.
        reward: spec of `load_reward`, the true reward of samples.
        against: whom the samples are judged against: samples of the `reference`, or the `chosen` replies of
            the data (of a prompt with several pairs, that of its first); default: all that there are.
        agreement: whether the judges also judge the data's pairs, chosen against rejected.
        temperatures: of the model's samples; 0 takes the likeliest token each time.
        reference_temperature: of the reference's; default: that of the samples they are judged against. The
            DPO paper's win rates over temperatures are against texts that stay the same (arXiv 2305.18290,
            figures 2 and 3): `chosen`, or a reference of one temperature.
        samples: replies for each prompt; 0 samples nothing.
        max_prompts: prompts beyond these, and in `agreement` their pairs, are not looked at.
        max_new_tokens: longest reply.
        batch_size: prompts generated at once; part of what the seed determines.
        top_p: nucleus sampling below 1.
        seed: of the samples, the reference's too; the same model then gives the same replies.
        beta: of the implicit reward beta (log pi - log pi_ref) of pairs; None for 0.1.
        chat_template_kwargs: for prompts and pairs that are messages.
        tokenizer: folder or hub id; default: beside the model.
        dtype: of the weights.
        max_length: longer pairs are left out, and counted; None for no limit.
        tokens: of one forward pass over pairs.
    """

    model: str
    reference: str | None = None
    data: Sequence[str] = ()
    load: LoadOptions = _LOAD
    prompts: Path | None = None
    judges: Sequence[str] = ()
    endpoint: EndpointOptions = field(default_factory=EndpointOptions)
    reward: str | None = None
    against: Sequence[str] = ()
    agreement: bool = False
    temperatures: Sequence[float] = (1.0,)
    reference_temperature: float | None = None
    samples: int = 1
    max_prompts: int | None = 256
    max_new_tokens: int = 64
    batch_size: int = 64
    top_p: float = 1.0
    seed: int = 0
    beta: float | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    dtype: str = "float32"
    max_length: int | None = None
    tokens: int = 4096

    def opponents(self) -> list[str]:
        """Whom samples are judged against."""
        there = {"reference": self.reference is not None, "chosen": bool(self.data) and self.prompts is None}
        return list(dict.fromkeys(self.against)) or [name for name in OPPONENTS if there[name]]

    @property
    def draws(self) -> bool:
        """Whether there is something to find out from samples."""
        wanted = self.prompts or self.reward or self.reference or (self.judges and self.opponents())
        return self.samples > 0 and bool(wanted)

    @property
    def beta_or_default(self) -> float:
        """`beta`, or the default."""
        return _BETA if self.beta is None else self.beta

    def described(self) -> dict[str, Any]:
        """What determines the figures besides model, reference, data, prompts and judges, in JSON's types."""
        names = ["reward", "temperatures", "reference_temperature", "top_p", "samples", "max_prompts"]
        names += ["max_new_tokens", "batch_size", "seed", "tokenizer", "dtype", "max_length", "tokens"]
        found = {name: getattr(self, name) for name in names} | {"temperatures": list(self.temperatures)}
        loading = asdict(self.load) if self.data else None
        kwargs = dict(self.chat_template_kwargs)
        return found | {"beta": self.beta_or_default, "chat_template_kwargs": kwargs, "load": loading}

    def check(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            InputError: naming the option.
        """
        for problem, option in self._problems():
            raise InputError(problem, field=option)

    def _problems(self) -> Iterable[tuple[str, str]]:
        if not self.data and not self.prompts:
            yield "there is nothing to evaluate on: give pairs, or a file of prompts", "--data"
        if self.dtype not in DTYPES:
            yield f"unknown dtype '{self.dtype}'; known: {', '.join(DTYPES)}", "--dtype"
        for name in ("max_prompts", "max_new_tokens", "batch_size", "tokens", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                yield f"expected 1 or more, got {getattr(self, name)}", f"--{name.replace('_', '-')}"
        if self.samples < 0:
            yield f"expected 0 or more, got {self.samples}", "--samples"
        if not 0 < self.beta_or_default < math.inf:
            yield f"expected more than 0, got {self.beta}", "--beta"
        if not 0 < self.top_p <= 1:
            yield f"expected more than 0 and at most 1, got {self.top_p}", "--top-p"
        if not self.temperatures or not all(0 <= t < math.inf for t in self.temperatures):
            yield "expected temperatures of 0 or more", "--temperature"
        if not 0 <= (self.reference_temperature or 0.0) < math.inf:
            yield "expected a temperature of 0 or more", "--reference-temperature"
        if 0 in (*self.temperatures, self.reference_temperature) and self.samples > 1:
            yield "several replies at temperature 0 would be the same: ask for one", "--samples"
        if self.reference_temperature is not None and self.reference is None:
            yield "there is no reference to sample from: give --reference", "--reference-temperature"
        yield from self._idle()
        yield from self._problems_of_judges()

    def _idle(self) -> Iterable[tuple[str, str]]:
        """Options that would change nothing."""
        if self.prompts is not None and self.samples == 0:
            yield "prompts are there to sample on, and --samples is 0", "--prompts"
        if self.reward is not None and self.samples == 0:
            yield "it is the reward of samples, and --samples is 0", "--reward"
        if not self.draws:
            why = "nothing is sampled" if self.samples == 0 else _NOTHING_TO_MEASURE
            for name, default in (("temperatures", (1.0,)), ("top_p", 1.0), ("reference_temperature", None)):
                if getattr(self, name) != default:
                    yield why, f"--{_SINGULAR.get(name, name).replace('_', '-')}"
            if self.samples > 1:
                yield why, "--samples"
        if self.beta is not None and not (self.data and self.reference):
            yield "it is that of the implicit reward of pairs: give --data and --reference", "--beta"
        if not self.data:
            if self.max_length is not None:
                yield "it is that of pairs: give --data", "--max-length"
            for each in fields(LoadOptions):
                if each.name != "seed" and getattr(self.load, each.name) != getattr(_LOAD, each.name):
                    option = "map" if each.name == "mapping" else each.name.replace("_", "-")
                    yield "it is how --data is loaded, and there is none", f"--{option}"
        if not any(spec.startswith(URLS) for spec in self.judges):
            for each in fields(EndpointOptions):
                if getattr(self.endpoint, each.name) != getattr(EndpointOptions(), each.name):
                    option = f"--judge-{_SINGULAR.get(each.name, each.name).replace('_', '-')}"
                    yield "there is no judge behind an endpoint: give --judge http(s)://HOST/v1#MODEL", option

    def _problems_of_judges(self) -> Iterable[tuple[str, str]]:
        for name in self.against:
            if name not in OPPONENTS:
                yield f"'{name}' is not one of: {', '.join(OPPONENTS)}", "--against"
        if self.against and not self.judges:
            yield "there is nobody to judge: give --judge", "--against"
        if "reference" in self.against and self.reference is None:
            yield "there is no reference: give --reference", "--against"
        if "chosen" in self.against and not self.data:
            yield "there are no chosen replies: give --data", "--against"
        if "chosen" in self.against and self.prompts is not None:
            yield "chosen replies belong to the prompts of the data: leave --prompts out", "--against"
        if self.agreement and not (self.data and self.judges):
            yield "agreement is that of a --judge with the labels of --data", "--agreement"
        if self.agreement and (self.load.votes == "share" or self.load.ties == "half"):
            yield (
                "with --votes share or --ties half a pair has both labels, so none to agree with",
                "--agreement",
            )
        if self.judges and not self.agreement and not (self.samples and self.opponents()):
            yield "there is nothing to judge: give --reference, or --data without --prompts", "--judge"
