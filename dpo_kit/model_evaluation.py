"""What a model is worth, on given pairs and by its own replies (`dpo-kit eval`).

On pairs: how often, and by how much, the chosen reply is preferred, and the DPO loss. On samples: true
reward, sequence KL to the reference, win rates by judges. And how far judges agree with the pairs' labels
and with each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from dpo_kit import __version__
from dpo_kit.errors import DpoKitError, InputError
from dpo_kit.evaluation import load_prompts, load_reward, sample_replies, score_pairs, sequence_kl
from dpo_kit.evaluation.agreement import agreement
from dpo_kit.evaluation.judges import Judge, Reply, Verdict, load_judge, reply_text
from dpo_kit.evaluation.request import EvalRequest
from dpo_kit.evaluation.sampling import Prompt, encode_prompts
from dpo_kit.evaluation.win_rate import position_bias, wilson, win_rate
from dpo_kit.losses import LogProbs, dpo
from dpo_kit.measurement import Measured
from dpo_kit.metrics import WeightedMeans, pair_metrics
from dpo_kit.models import check_length, embedded_tokens, load_model
from dpo_kit.pairs import load_with_report
from dpo_kit.pairs.kinds import PAIRS, kind_of_columns
from dpo_kit.pairs.messages import readable
from dpo_kit.run_folder import write_text
from dpo_kit.tokenization import longest_sequence, tokenize_pairs
from dpo_kit.tokenizer import load_tokenizer

Say = Callable[[str], None]
Row = dict[str, Any]

_LOGPS = ("chosen_logp", "rejected_logp")


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate_model` found.

    Attributes:
        figures: what eval.json holds.
        samples: a row per reply: model, temperature, prompt, reply, tokens, and reward and kl where measured.
        comparisons: a row per verdict: judge, temperature, against, prompt, first, second, preference,
            and answers where the judge saw an order.
    """

    figures: Row
    samples: list[Row]
    comparisons: list[Row]

    def write(self, folder: Path) -> None:
        """eval.json, eval-samples.jsonl and comparisons.jsonl: names that no file of a run's folder has."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("eval-samples.jsonl", self.samples), ("comparisons.jsonl", self.comparisons)):
            write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_text(folder / "eval.json", json.dumps(self.figures, indent=2, ensure_ascii=False) + "\n")


def evaluate_model(request: EvalRequest, say: Say = print) -> Evaluated:
    """Carry a request out.

    Args:
        request: what is asked.
        say: gets lines of progress.

    Returns:
        Figures: `made_with`, the settings, prompts and judges that they come of; and, as far as they were
        asked for:
        - `pairs`: see `pair_figures`;
        - `samples`, a row for each model and temperature: replies, the share finished before the limit of
          tokens, reply_tokens, reward, kl (nats);
        - `win_rates`, a row for each judge, opponent and temperature: the fields of `WinRate`, and of a judge
          that sees an order `position` with those of `PositionBias`;
        - `agreement`, a row for each two of the labels and the judges: the fields of `Agreement`.

    Raises:
        InputError: a request that contradicts itself, or wrong data, model, reward or judge.
        JudgeError: an endpoint that does not answer; what it answered is kept for the next time.
        DpoKitError: a figure that is not finite, as of a model with broken weights.
    """
    request.check()
    return _Evaluation(request, say).run()


def pair_figures(
    policy: Row, reference: Row | None, beta: float, weights: Sequence[float], prompts: int
) -> Row:
    """Figures of P pairs from the columns of `score_pairs`.

    Args:
        policy: under the model.
        reference: under the reference, or None.
        beta: of the implicit reward.
        weights: [P] of the pairs in all means.
        prompts: how many different ones the pairs are of; the interval counts each once, since the pairs of
            a prompt are right or wrong together.

    Returns:
        n, prompts; accuracy (by the implicit reward beta (log pi - log pi_ref), arXiv 2305.18290, equation 5;
        without a reference by log pi; a tie counts one half) with accuracy_low and accuracy_high, Wilson's
        95% interval; with a reference also margin, the mean of the implicit reward's, and loss, that of DPO
        (equation 7), nats.
    """
    sides = [policy] if reference is None else [policy, reference]
    columns = [torch.tensor(s[name], dtype=torch.float64) for s in sides for name in _LOGPS]
    logps = LogProbs.of_pairs(*columns)
    losses = torch.zeros_like(columns[0]) if reference is None else dpo(logps, beta=beta)
    means = WeightedMeans()
    means.add(pair_metrics(logps, losses, beta), torch.tensor(weights, dtype=torch.float64))
    found = means.means()
    accuracy = found["rewards/accuracies"]
    low, high = wilson(accuracy, prompts)
    figures: Row = {
        "n": len(weights),
        "prompts": prompts,
        "by": "log-prob" if reference is None else "implicit reward",
    }
    figures |= {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
    if reference is None:
        return figures
    return figures | {"beta": beta, "margin": found["rewards/margins"], "loss": found["loss"]}


class _Evaluation:
    """One request on its way: what is loaded, and the rows that come out."""

    def __init__(self, request: EvalRequest, say: Say) -> None:
        self.request, self.say = request, say
        # First what can be wrong at once.
        self.judges = [load_judge(spec, request.endpoint) for spec in dict.fromkeys(request.judges)]
        self.reward = load_reward(request.reward, field="--reward") if request.reward else None
        self.rows = self._load_rows() if request.data else None
        self.tokenizer = load_tokenizer(request.tokenizer or request.model)
        self.samples: list[Row] = []
        self.comparisons: list[Row] = []

    def run(self) -> Evaluated:
        """Pairs, then samples, then judges."""
        request = self.request
        figures: Row = {"model": request.model, "reference": request.reference, "data": list(request.data)}
        prompts, chosen = self._prompts() if request.draws else ([], None)
        figures["made_with"] = self._made_with(prompts)
        models = {"policy": self._load(request.model, "MODEL")}
        if request.reference is not None:
            models["reference"] = self._load(request.reference, "--reference")
            self._check_reference(models, request.reference)
        if self.rows is not None:
            figures["pairs"] = self._pairs(self.rows, models)
        if request.agreement:
            figures["agreement"] = self._agreement()
        if request.draws:
            figures |= self._drawn(models, prompts, chosen)
        _require_finite(figures)
        return Evaluated(figures, self.samples, self.comparisons)

    def _made_with(self, prompts: list[Prompt]) -> Row:
        """What another run needs to come to the same figures."""
        sampled_on = {
            "source": None if self.request.prompts is None else str(self.request.prompts),
            "n": len(prompts),
            "sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        }
        found: Row = {"dpo_kit": __version__, **self.request.described()}
        found["prompts"] = sampled_on if prompts else None
        return found | {"judges": [judge.described() for judge in self.judges]}

    def _load_rows(self) -> Dataset:
        rows, report = load_with_report(list(self.request.data), self.request.load)
        self.say(report.summary())
        if (kind := kind_of_columns(rows.column_names)) != PAIRS:
            raise InputError(
                f"expected pairs, and these are {'of no known kind' if kind is None else kind.rows}",
                field="--data",
                mend="Give rows with prompt, chosen and rejected, or prompts alone with --prompts.",
            )
        return rows

    def _load(self, source: str, field: str) -> Any:
        try:
            model: Any = load_model(source, getattr(torch, self.request.dtype))
        except InputError as error:
            raise InputError(error.problem, file=error.file, field=field, mend=error.mend) from error
        return model.cuda() if torch.cuda.is_available() else model

    def _check_reference(self, models: dict[str, Any], reference: str) -> None:
        """Refuse a reference to which the policy's token ids mean something else."""
        problem = None
        if len({embedded_tokens(model) for model in models.values()}) > 1:
            problem = "it has another number of tokens than the model"
        else:
            # One without a tokenizer beside it reads what it is given.
            with contextlib.suppress(InputError):
                if load_tokenizer(reference).get_vocab() != self.tokenizer.get_vocab():
                    problem = "the tokenizer beside it is another one than the model's"
        if problem:
            raise InputError(problem, file=reference, field="--reference")

    def _pairs(self, rows: Dataset, models: dict[str, Any]) -> Row:
        tokenized = tokenize_pairs(
            rows,
            self.tokenizer,
            max_length=self.request.max_length,
            chat_template_kwargs=self.request.chat_template_kwargs,
        )
        for line in tokenized.account():
            self.say(line)
        data = tokenized.dataset
        scores: dict[str, Row] = {}
        for name, model in models.items():
            check_length(model, self.request.max_length, longest_sequence(data)[0], field="--max-length")
            self.say(f"scoring {len(data)} pairs with the {name}")
            scores[name], (_, reason) = score_pairs(model, data, token_budget=self.request.tokens)
            if reason:
                self.say(f"{reason}; separate padded sequences were used")
        weights = [1.0] * len(data)
        if "weight" in data.column_names:
            weights = [1.0 if w is None else w for w in data["weight"]]
        prompts = len(set(map(tuple, data["prompt_ids"])))
        return pair_figures(
            scores["policy"], scores.get("reference"), self.request.beta_or_default, weights, prompts
        )

    def _prompts(self) -> tuple[list[Prompt], list[Reply] | None]:
        """What is sampled on, and the chosen reply to each where the prompts are the data's."""
        request = self.request
        if request.prompts is not None:
            return load_prompts(request.prompts, request.max_prompts), None
        first: dict[str, Row] = {}
        assert self.rows is not None
        for row in self.rows:
            if row.get("tools") or row.get("chat_template_kwargs"):
                raise InputError(
                    f"{row['source']} has its own tools or chat_template_kwargs; samples are drawn without",
                    field="--data",
                    mend="Give --samples 0, or prompts without them with --prompts.",
                )
            first.setdefault(json.dumps(row["prompt"]), row)
            if request.max_prompts is not None and len(first) == request.max_prompts:
                break
        return [_plain(row["prompt"]) for row in first.values()], [
            _plain(row["chosen"]) for row in first.values()
        ]

    def _drawn(self, models: dict[str, Any], prompts: list[Prompt], chosen: list[Reply] | None) -> Row:
        """Figures of samples, and win rates."""
        request, found = self.request, []
        if len(prompts) == request.max_prompts:
            self.say(f"of the prompts the first {len(prompts)} (--max-prompts)")
        encoded, _ = encode_prompts(prompts, self.tokenizer, request.chat_template_kwargs)
        longest = max(map(len, encoded)) + request.max_new_tokens
        for model in models.values():
            check_length(model, request.max_new_tokens, longest, field="--max-new-tokens")
        drawn: dict[tuple[str, float], Measured] = {}
        for temperature in dict.fromkeys(request.temperatures):
            for name in models:
                key = name, self._temperature(name, temperature)
                if key not in drawn:
                    drawn[key] = self._measure(models, *key, prompts)
                    found.append({"model": name, "temperature": key[1], **_means(drawn[key])})
                    head = {"model": name, "temperature": key[1]}
                    self.samples += [head | line for line in drawn[key].lines()]
        if chosen is not None and self.reward is not None:
            rewards = self.reward(prompts, list(map(reply_text, chosen)))
            mean = sum(rewards) / len(rewards)
            found.append({"model": "chosen", "temperature": None, "replies": len(chosen), "reward": mean})
        rates = self._win_rates(drawn, chosen) if self.judges else []
        return {"samples": found} | ({"win_rates": rates} if rates else {})

    def _win_rates(self, drawn: dict[tuple[str, float], Measured], chosen: list[Reply] | None) -> list[Row]:
        request, rates = self.request, []
        for temperature in dict.fromkeys(request.temperatures):
            own = drawn["policy", temperature].samples
            for against in request.opponents():
                other = self._temperature(against, temperature) if against == "reference" else None
                theirs: Sequence[Reply]
                if against == "reference":
                    theirs = [sample.reply for sample in drawn[against, other or 0.0].samples]
                else:
                    assert chosen is not None
                    theirs = [reply for reply in chosen for _ in range(request.samples)]
                head = {"temperature": temperature, "against": against, "against_temperature": other}
                asked = [s.prompt for s in own], [s.reply for s in own], theirs
                rates += [self._win_rate(judge, head, *asked) for judge in self.judges]
        return rates

    def _temperature(self, name: str, temperature: float) -> float:
        fixed = self.request.reference_temperature
        return temperature if name == "policy" or fixed is None else fixed

    def _measure(
        self, models: dict[str, Any], name: str, temperature: float, prompts: list[Prompt]
    ) -> Measured:
        request = self.request
        self.say(f"sampling {request.samples * len(prompts)} replies of the {name} at {temperature:g}")
        samples = sample_replies(
            models[name],
            self.tokenizer,
            prompts,
            samples=request.samples,
            max_new_tokens=request.max_new_tokens,
            temperature=temperature,
            top_p=request.top_p,
            batch_size=request.batch_size,
            seed=request.seed,
            chat_template_kwargs=request.chat_template_kwargs,
        )
        rewards = (
            self.reward([s.prompt for s in samples], [s.reply for s in samples]) if self.reward else None
        )
        # Along replies drawn otherwise the sum is no KL of the policy as it is.
        as_it_is = temperature == request.top_p == 1
        has_kl = name == "policy" and as_it_is and "reference" in models
        kls = sequence_kl(models[name], models["reference"], samples).tolist() if has_kl else None
        return Measured(samples, rewards, kls)

    def _win_rate(
        self, judge: Judge, head: Row, prompts: list[Prompt], own: Sequence[Reply], theirs: Sequence[Reply]
    ) -> Row:
        self.say(f"{judge.name}: {len(own)} comparisons with {head['against']}, at {head['temperature']:g}")
        verdicts = self._judge(judge, head, prompts, own, theirs)
        rate = win_rate([v.preference for v in verdicts], [json.dumps(prompt) for prompt in prompts])
        return {"judge": judge.name, **head, **asdict(rate)} | _position(verdicts)

    def _judge(
        self, judge: Judge, head: Row, prompts: list[Prompt], own: Sequence[Reply], theirs: Sequence[Reply]
    ) -> list[Verdict]:
        def progress(done: int, wanted: int) -> None:
            if done % 100 == 0 or done == wanted:
                self.say(f"{judge.name}: {done} of {wanted} answers")

        verdicts = judge.verdicts(prompts, own, theirs, progress=progress)
        for prompt, first, second, verdict in zip(prompts, own, theirs, verdicts, strict=True):
            row = {"judge": judge.name, **head, "prompt": prompt, "first": first, "second": second}
            row["preference"] = verdict.preference
            self.comparisons.append(row | ({"answers": verdict.answers} if verdict.answers else {}))
        return verdicts

    def _agreement(self) -> list[Row]:
        """Labels and judges, each two of them, on the pairs of the first `max_prompts` prompts."""
        assert self.rows is not None
        seen: dict[str, None] = {}
        pairs = []
        for row in self.rows:
            seen[json.dumps(row["prompt"])] = None
            if self.request.max_prompts is not None and len(seen) > self.request.max_prompts:
                break
            pairs.append([_plain(row[name]) for name in ("prompt", "chosen", "rejected")])
        prompts, chosen, rejected = map(list, zip(*pairs, strict=True))
        said: dict[str, list[Verdict]] = {"labels": [Verdict(1.0)] * len(pairs)}
        head = {"temperature": None, "against": "rejected", "against_temperature": None}
        for judge in self.judges:
            self.say(f"{judge.name}: {len(pairs)} pairs of the data")
            said[judge.name] = self._judge(judge, head, prompts, chosen, rejected)
        preferences = {name: [v.preference for v in verdicts] for name, verdicts in said.items()}
        return [
            {"first": a, "second": b, **asdict(agreement(preferences[a], preferences[b]))}
            | (_position(said[b]) if a == "labels" else {})
            for a, b in combinations(said, 2)
        ]


def _require_finite(value: Any, place: str = "") -> None:
    """Raise at the first number that is none: JSON has no word for it, and a mean of it says nothing."""
    if isinstance(value, float) and not math.isfinite(value):
        raise DpoKitError(f"{place} is {value}: are the weights finite, and is --dtype wide enough?")
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        _require_finite(part, f"{place}.{key}" if place else str(key))


def _means(measured: Measured) -> Row:
    replies = len(measured.samples)
    finished = sum(sample.finished for sample in measured.samples) / replies
    return {"replies": replies, "finished": finished, **measured.means()}


def _position(verdicts: Sequence[Verdict]) -> Row:
    bias = position_bias(verdicts)
    return {} if bias is None else {"position": asdict(bias)}


def _plain(part: Any) -> Any:
    """Text, or messages as plain dicts, whatever form a data set keeps them in."""
    return part if isinstance(part, str) else readable(part)
