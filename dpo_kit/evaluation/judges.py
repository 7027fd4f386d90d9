"""Judges: which of two replies to a prompt is the better one, by a reward or by a model behind an endpoint.

Leaves out how verdicts are counted (`win_rate`, `agreement`) and how an endpoint is asked (`endpoint`).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dpo_kit.errors import InputError
from dpo_kit.evaluation.rewards import Reward, load_reward

Reply = str | Sequence[Mapping[str, Any]]
Progress = Callable[[int, int], None]
"""(answers there are, answers that are wanted)."""

DEFAULT_KEY = "OPENAI_API_KEY"
URLS = ("http://", "https://")


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one comparison.

    Attributes:
        preference: how far the first reply is preferred, in [0, 1]: 1 it is better, 0 the second is, 0.5
            neither; None where the judge came to nothing that can be read.
        answers: of a judge that sees one reply before the other, what it answered with the first reply
            shown first, and with the second shown first: "A" (the one shown first), "B", "tie" or None.
    """

    preference: float | None
    answers: tuple[str | None, str | None] | None = None


class Judge(ABC):
    """Compares replies in pairs.

    Attributes:
        name: for tables and files; holds no secret.
        order_matters: whether it sees one reply before the other. Such a judge asks itself in both orders;
            what it says is then free of a bias to a position, and `Verdict.answers` shows that bias.
    """

    name: str
    order_matters: bool

    @abstractmethod
    def verdicts(
        self,
        prompts: Sequence[Any],
        firsts: Sequence[Reply],
        seconds: Sequence[Reply],
        *,
        progress: Progress | None = None,
    ) -> list[Verdict]:
        """A verdict on each comparison.

        Args:
            prompts: texts, or lists of messages.
            firsts: a reply to each, text or a list of messages.
            seconds: another reply to each.
            progress: called now and then, by judges that take their time.
        """

    def described(self) -> dict[str, Any]:
        """What the verdicts come of, for the file that they are written to; holds no secret."""
        return {"judge": self.name}

    def compare(
        self, prompts: Sequence[Any], firsts: Sequence[Reply], seconds: Sequence[Reply]
    ) -> list[float | None]:
        """`Verdict.preference` of each comparison."""
        return [verdict.preference for verdict in self.verdicts(prompts, firsts, seconds)]


class RewardJudge(Judge):
    """The reply with the higher reward is better; equal rewards are a tie, and so are equal replies.

    These last need saying, since a model's rewards of one text differ in the last digits from batch to batch.
    """

    order_matters = False

    def __init__(self, reward: Reward, name: str) -> None:
        self.reward, self.name = reward, name

    def verdicts(
        self,
        prompts: Sequence[Any],
        firsts: Sequence[Reply],
        seconds: Sequence[Reply],
        *,
        progress: Progress | None = None,
    ) -> list[Verdict]:
        """See `Judge.verdicts`."""
        texts = [list(map(reply_text, side)) for side in (firsts, seconds)]
        rewards = [self.reward(prompts, side) for side in texts]
        return [
            Verdict(0.5 if a == b or x == y else float(x > y))
            for a, b, x, y in zip(*texts, *rewards, strict=True)
        ]


@dataclass(frozen=True)
class EndpointOptions:
    """How an OpenAI-compatible endpoint is asked.

    Attributes:
        model: the model's name there, where the spec does not say it.
        prompt: a file with {prompt}, {first} and {second}, or the name of one that is shipped (`helpfulness`,
            `summary`). {fence} in it becomes a mark that no reply can hold, see `endpoint.fill`.
        key_env: the environment variable with the key, for any endpoint; None for $OPENAI_API_KEY, which goes
            to https://api.openai.com alone, and no key for others.
        concurrency: most requests at a time.
        retries: of a request that met a limit, a server's error or no answer; with growing pauses, or those
            that the server asks for (Retry-After).
        timeout: seconds for one answer.
        settings: of a request, over temperature 0 and max_tokens 512; None takes one out.
        cache_dir: answers are kept in <cache_dir>/judge; None for $DPO_KIT_CACHE or ~/.cache/dpo_kit.
    """

    model: str | None = None
    prompt: str | Path = "helpfulness"
    key_env: str | None = None
    concurrency: int = 8
    retries: int = 6
    timeout: float = 120.0
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    cache_dir: str | Path | None = None


def load_judge(
    spec: str,
    endpoint: EndpointOptions = EndpointOptions(),
    *,
    field: str = "--judge",
) -> Judge:
    """What the command line names.

    Args:
        spec: `reward:SPEC` with what `load_reward` takes; `model:FOLDER`, short for `reward:model:FOLDER`; or
            `http(s)://HOST[:PORT]/v1#MODEL` for an endpoint that speaks OpenAI's chat completions.
        endpoint: how that is asked.
        field: named in errors.

    Raises:
        InputError: the spec is none of these, or what it names cannot be had.
    """
    if spec.startswith(URLS):
        from dpo_kit.evaluation.endpoint import EndpointJudge

        url, _, model = spec.partition("#")
        if model and endpoint.model and model != endpoint.model:
            raise InputError(
                f"'{spec}' names the model '{model}' and --judge-model '{endpoint.model}'", field=field
            )
        name = model or endpoint.model
        if not name:
            raise InputError(
                f"'{spec}' does not say which model",
                field=field,
                mend="Write http://HOST/v1#MODEL, or give --judge-model.",
            )
        return EndpointJudge(url, name, endpoint, field=field)
    kind, _, rest = spec.partition(":")
    if kind == "reward" and rest:
        return RewardJudge(load_reward(rest, field=field), spec)
    if kind == "model" and rest:
        return RewardJudge(load_reward(spec, field=field), spec)
    if spec == "labels":
        raise InputError(
            "the labels of the data know their own pairs only and judge no others",
            field=field,
            mend="--agreement compares every judge with them.",
        )
    raise InputError(
        f"'{spec}' is no judge",
        field=field,
        mend="Known: reward:SPEC (as of --reward), model:FOLDER, http(s)://HOST/v1#MODEL.",
    )


def prompt_text(prompt: Reply) -> str:
    """A prompt as a judge reads it: text as it is, messages as "role: content" with a blank line between."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.get('role')}: {_content(message)}" for message in prompt)


def reply_text(reply: Reply) -> str:
    """A reply as a judge reads it: text as it is, one message's content, several as in `prompt_text`."""
    if isinstance(reply, str):
        return reply
    return _content(reply[0]) if len(reply) == 1 else prompt_text(reply)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    calls = message.get("tool_calls")
    return "\n".join(filter(None, [text, json.dumps(calls, ensure_ascii=False) if calls else ""]))
