"""A judge behind an endpoint that speaks OpenAI's chat completions: asked in both orders, answers kept.

The key is read from the environment and goes into the request's header and nowhere else: $OPENAI_API_KEY to
OpenAI alone, any other variable to the endpoints of a command that names it.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import math
import os
import re
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dpo_kit.cache_folder import cache_folder
from dpo_kit.errors import DpoKitError, DpoKitWarning, InputError
from dpo_kit.evaluation.judges import (
    DEFAULT_KEY,
    EndpointOptions,
    Judge,
    Progress,
    Reply,
    Verdict,
    prompt_text,
    reply_text,
)
from dpo_kit.shown_text import holds_secret, without_secrets

SHIPPED = Path(__file__).parent / "prompts"
_SETTINGS = {"temperature": 0.0, "max_tokens": 512}
_PLACEHOLDERS = ("prompt", "first", "second")
_REMINDER = "\n\nEnd with one line and nothing after it: Preferred: A, Preferred: B, or Preferred: tie"

_AROUND = r"[ \t*_#>\"'`()\[\].]*"
_VERDICT = re.compile(rf"^{_AROUND}preferred{_AROUND}:{_AROUND}(a|b|tie){_AROUND}$", re.I | re.M)
_BARE = re.compile(rf"{_AROUND}(a|b|tie){_AROUND}", re.I)
# Thoughts that were cut off have no end.
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.S)

_OPENAI = "api.openai.com"
_OF_KEYS = ("api_key", "extra_headers", "extra_query")
# A shorter key is no secret, and its letters stand in ordinary words.
_SHORTEST_SECRET = 8


_NO_KEY = f"No key was sent: name the variable that holds it, as in --judge-key-env {DEFAULT_KEY}."


class JudgeError(DpoKitError):
    """The endpoint gave no answer that can be used; exit status 1."""


class EndpointJudge(Judge):
    """Asks a model which of two replies is better, once in each order.

    Both answers alike are a win or a loss; answers that differ are a tie (and, where both name the same
    position, what `win_rate.position_bias` counts). Equal replies are a tie that nobody is asked about. An
    answer without a line `Preferred: A`, `B` or `tie`, or with several that differ, is asked for once more
    with a reminder; then the comparison has no verdict.

    An answer that can be read is appended at once to <cache>/judge/<endpoint and model>.jsonl under a digest
    of all that was asked, and never asked for again; so a run that was stopped goes on where it was. One that
    cannot be read (empty, refused, cut off) is not kept: the next run asks again.
    """

    order_matters = True

    def __init__(self, url: str, model: str, options: EndpointOptions, *, field: str = "--judge") -> None:
        """
        Args:
            url: the base, as in http://localhost:8000/v1.
            model: its name there.
            options: how it is asked.
            field: named in errors.

        Raises:
            InputError: the openai package or the key is missing, or URL, prompt file or options are wrong.
        """
        _check_url(url, field)
        if options.concurrency < 1 or options.retries < 0 or not 0 < options.timeout < math.inf:
            raise InputError(
                "an endpoint needs a concurrency of 1 or more, retries of 0 or more and a positive timeout",
                field=field,
            )
        self.url, self.model, self.options = url.rstrip("/"), model, options
        self.name = f"{self.url}#{model}"
        self.asked = 0
        self._template = load_template(options.prompt)
        _check_settings(options.settings)
        settings = {**_SETTINGS, **options.settings}
        self._settings = {name: value for name, value in settings.items() if value is not None}
        self._key = _key(self.url, options.key_env)
        self._client = _client(self.url, self._key, options)
        self._answers = _Answers(self.url, model, options.cache_dir)

    def verdicts(
        self,
        prompts: Sequence[Any],
        firsts: Sequence[Reply],
        seconds: Sequence[Reply],
        *,
        progress: Progress | None = None,
    ) -> list[Verdict]:
        """See `Judge.verdicts`.

        Raises:
            InputError: the endpoint refuses the request (key, model, settings).
            JudgeError: it does not answer, after all retries. Answers that came are kept.
        """
        questions: list[tuple[str, str] | None] = []
        for prompt, first, second in zip(prompts, firsts, seconds, strict=True):
            asked, a, b = prompt_text(prompt), reply_text(first), reply_text(second)
            both = fill(self._template, asked, a, b), fill(self._template, asked, b, a)
            questions.append(None if a.strip() == b.strip() else both)
        texts = [text for both in questions if both is not None for text in both]
        read = self._ask(texts, "", progress)
        read |= self._ask([text for text, verdict in read.items() if verdict is None], _REMINDER, progress)
        return [
            Verdict(0.5) if both is None else _combined(read[both[0]], read[both[1]]) for both in questions
        ]

    def described(self) -> dict[str, Any]:
        """See `Judge.described`: also the prompt, with its digest, and the settings of a request."""
        text = "".join(f"{{{piece}}}" if i % 2 else piece for i, piece in enumerate(self._template))
        digest = hashlib.sha256(text.encode()).hexdigest()
        prompt = {"prompt": str(self.options.prompt), "prompt_sha256": digest}
        return super().described() | prompt | {"settings": self._settings}

    def _ask(self, texts: Sequence[str], reminder: str, progress: Progress | None) -> dict[str, str | None]:
        """The verdict on each text; those without one are asked for, each once and with the reminder."""
        keys = {text: self._digest(text) for text in texts}
        missing = [text for text in keys if keys[text] not in self._answers.verdicts]
        done = len(keys) - len(missing)
        pool = ThreadPoolExecutor(self.options.concurrency, thread_name_prefix="judge")
        try:
            asked = [pool.submit(self._answer, text + reminder, keys[text]) for text in missing]
            for future in as_completed(asked):
                future.result()
                done += 1
                if progress is not None:
                    progress(done, len(keys))
        finally:
            # What is under way is waited for, since its answer is kept; nothing new is begun.
            pool.shutdown(cancel_futures=True)
        return {text: self._answers.verdicts.get(key) for text, key in keys.items()}

    def _answer(self, text: str, key: str) -> None:
        import openai

        try:
            completion: Any = self._client.chat.completions.create(
                model=self.model, messages=_messages(text), **self._settings
            )
        except openai.APIStatusError as error:
            raise self._refused(error.status_code, str(error)) from None
        except openai.OpenAIError as error:
            raise JudgeError(self._clean(f"{self.url} does not answer: {error}")) from None
        choices = getattr(completion, "choices", None)
        if not choices:
            raise JudgeError(f"{self.url} answers, but not as chat completions do (there are no choices)")
        self.asked += 1
        answer = self._clean(choices[0].message.content or "")
        if (verdict := parse(answer)) is not None:
            self._answers.keep(key, answer, verdict)

    def _refused(self, status: int, problem: str) -> DpoKitError:
        problem = self._clean(problem)
        if status in (408, 409, 429) or status >= 500:
            return JudgeError(
                f"{self.url} still fails, after up to {self.options.retries} retries: {problem}. "
                "The answers that came are kept: the same command goes on from them."
            )
        variable = f"${self.options.key_env or DEFAULT_KEY}"
        mends = {
            401: f"Is the key in {variable} right?" if self._key else _NO_KEY,
            403: f"Is the key in {variable} one for this model?" if self._key else _NO_KEY,
            404: f"Is '{self.model}' a model of it, and {self.url} its base, as in http://HOST/v1?",
        }
        return InputError(
            f"{self.name} refuses the request: {problem}", field="--judge", mend=mends.get(status)
        )

    def _clean(self, text: str) -> str:
        """Without the key, which a server may send back."""
        text = text.replace(self._key, "[key]") if len(self._key) >= _SHORTEST_SECRET else text
        return without_secrets(text)

    def _digest(self, text: str) -> str:
        asked = [self.url, self.model, _messages(text), self._settings]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class _Answers:
    """Answers that could be read: verdicts by digest in memory, whole in a file that is only appended to."""

    def __init__(self, url: str, model: str, cache_dir: str | Path | None) -> None:
        name = hashlib.sha256(f"{url}\n{model}".encode()).hexdigest()[:16]
        self._file = cache_folder(cache_dir, "judge") / f"{name}.jsonl"
        self._lock = threading.Lock()
        self.verdicts: dict[str, str] = {}
        if self._file.exists():
            kept = {key: parse(answer) for key, answer in _kept(self._file.read_bytes().split(b"\n"))}
            self.verdicts = {key: verdict for key, verdict in kept.items() if verdict is not None}

    def keep(self, key: str, answer: str, verdict: str) -> None:
        """Append one, whole or, where the machine dies, not at all as far as `_kept` can see."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        # The newline before ends a line that was torn; empty lines mean nothing.
        line = b"\n" + json.dumps({"key": key, "answer": answer}).encode() + b"\n"
        with self._lock:
            descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
            self.verdicts[key] = verdict


def _kept(lines: Iterable[bytes]) -> Iterable[tuple[str, str]]:
    """What can be read; a torn line is an answer that is asked for again."""
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            yield str(row["key"]), str(row["answer"])


def load_template(prompt: str | Path) -> list[str]:
    """A prompt file, cut at its placeholders.

    Args:
        prompt: a file, or the name of one that is shipped.

    Returns:
        Text, name of a placeholder, text, ... and text at the end.

    Raises:
        InputError: it cannot be read, lacks a placeholder, or does not ask for the line that is read.
    """
    shipped = SHIPPED / f"{prompt}.txt"
    file = shipped if shipped.exists() and not Path(prompt).exists() else Path(prompt)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.txt")))
        problem = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"the prompt cannot be read: {problem}",
            file=file,
            field="--judge-prompt",
            mend=f"Name a file, or one of: {names}.",
        ) from None
    pieces = re.split(r"\{(prompt|first|second|fence)\}", text)
    if lacking := [name for name in _PLACEHOLDERS if name not in pieces[1::2]]:
        wanted = ", ".join(f"{{{name}}}" for name in lacking)
        raise InputError(f"there is no {wanted} in it", file=file, field="--judge-prompt")
    if "preferred:" not in text.lower():
        raise InputError(
            "it does not ask for the line that the verdict is read from",
            file=file,
            field="--judge-prompt",
            mend="Let it ask for a line 'Preferred: A', 'Preferred: B' or 'Preferred: tie'.",
        )
    return pieces


def fill(template: Sequence[str], prompt: str, first: str, second: str) -> str:
    """A template of `load_template` with its texts put in; what looks like a placeholder in them stays.

    `{fence}` is a digest of the three texts, which none of them can hold: a mark by which the template's own
    headings are told from those that a reply makes up. The same question has the same, for the cache.
    """
    values = {"prompt": prompt, "first": first, "second": second}
    values["fence"] = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
    return "".join(
        values[piece].strip() if place % 2 else piece for place, piece in enumerate(template)
    ).strip()


def parse(answer: str) -> str | None:
    """ "A", "B" or "tie"; None where the answer says none of them, or several."""
    answer = _THOUGHTS.sub("", answer)
    found = {verdict.lower() for verdict in _VERDICT.findall(answer)}
    if not found and (bare := _BARE.fullmatch(answer.strip())):
        found = {bare[1].lower()}
    if len(found) != 1:
        return None
    verdict = found.pop()
    return verdict if verdict == "tie" else verdict.upper()


def _combined(first_shown: str | None, second_shown: str | None) -> Verdict:
    """The answers with the first reply shown first, and with the second."""
    answers = (first_shown, second_shown)
    if None in answers:
        return Verdict(None, answers)
    return Verdict(
        {("A", "B"): 1.0, ("B", "A"): 0.0}.get((str(first_shown), str(second_shown)), 0.5), answers
    )


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _check_url(url: str, field: str) -> None:
    parts = urlsplit(url)
    if not parts.hostname:
        raise InputError("this URL names no host", field=field, mend="As in http://localhost:8000/v1#MODEL")
    if parts.username or parts.password or parts.query:
        # What stands in a URL is written into logs and results.
        raise InputError(
            "this URL holds more than an address",
            field=field,
            mend=f"Give the key in the environment, as ${DEFAULT_KEY} or with --judge-key-env.",
        )


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what may hold a key: settings are written beside the results, and tell answers apart."""
    for name, value in settings.items():
        if name in _OF_KEYS or holds_secret(f"{name} {value}"):
            raise InputError(
                f"'{name}' may hold a key, and settings are written beside the results",
                field="--judge-setting",
                mend=f"Give the key in the environment, as ${DEFAULT_KEY} or with --judge-key-env.",
            )


def _key(url: str, key_env: str | None) -> str:
    """The key for this endpoint, or nothing: what is meant for OpenAI is sent to nobody else unasked."""
    parts = urlsplit(url)
    if key_env is None:
        is_openai = parts.hostname == _OPENAI and parts.scheme == "https"
        return os.environ.get(DEFAULT_KEY, "") if is_openai else ""
    key = os.environ.get(key_env, "")
    if not key:
        raise InputError(f"${key_env} is not set", field="--judge-key-env")
    if parts.scheme != "https" and not _is_loopback(str(parts.hostname)):
        message = (
            f"the key in ${key_env} goes to {parts.hostname} over plain http, for all on the way to read"
        )
        warnings.warn(message, DpoKitWarning, stacklevel=4)
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _client(url: str, key: str, options: EndpointOptions) -> Any:
    try:
        import openai
    except ImportError:
        raise InputError(
            "an endpoint is asked through the openai package, which is not installed",
            field="--judge",
            mend="pip install 'dpo-kit[judge]'",
        ) from None
    # The package insists on a key; an endpoint that wants none does not look at it.
    return openai.OpenAI(
        base_url=url, api_key=key or "none", max_retries=options.retries, timeout=options.timeout
    )
