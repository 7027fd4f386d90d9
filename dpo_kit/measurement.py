"""What a run measures beside training: held-out pairs, and samples on the way: their reward, the KL."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from dpo_kit import ranks
from dpo_kit.errors import InputError
from dpo_kit.evaluation import load_prompts, load_reward
from dpo_kit.evaluation.kl import sequence_kl
from dpo_kit.evaluation.rewards import Reward
from dpo_kit.evaluation.sampling import Prompt, Sample, encode_prompts, sample_replies
from dpo_kit.json_lines import read_lines, write_lines
from dpo_kit.losses import make_objective
from dpo_kit.models import check_length
from dpo_kit.recipe import Recipe
from dpo_kit.trainer import PreferenceTrainer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """Replies of a policy on the held-out prompts, and what they are worth.

    Attributes:
        samples: the replies.
        rewards: the true reward of each; None where there is none.
        kls: the sequence KL to the reference along each, nats; None where it was not asked for.
    """

    samples: list[Sample] = field(default_factory=list)
    rewards: list[float] | None = None
    kls: list[float] | None = None

    def means(self) -> dict[str, float]:
        """reward, kl (nats) and reply_tokens, as far as they were measured."""
        lengths = [len(sample.reply_ids) for sample in self.samples]
        columns: dict[str, Any] = {"reward": self.rewards, "kl": self.kls, "reply_tokens": lengths}
        return {name: sum(values) / len(values) for name, values in columns.items() if values}

    def lines(self) -> list[dict[str, Any]]:
        """One object a reply: prompt, reply, tokens, and reward and kl where there are any."""
        found = []
        for i, sample in enumerate(self.samples):
            line: dict[str, Any] = {"prompt": sample.prompt, "reply": sample.reply}
            line["tokens"] = len(sample.reply_ids)
            line |= {"reward": self.rewards[i]} if self.rewards is not None else {}
            found.append(line | ({"kl": self.kls[i]} if self.kls is not None else {}))
        return found


@dataclass
class Samples:
    """How replies on the held-out prompts are drawn and what is measured of them.

    Attributes:
        recipe: says how they are drawn.
        prompts: none where the recipe names none: then nothing is sampled.
        reward: the true reward, or None.
    """

    recipe: Recipe
    prompts: list[Prompt]
    reward: Reward | None

    @classmethod
    def of(cls, recipe: Recipe) -> Samples:
        """What a recipe asks for.

        Raises:
            InputError: prompts or reward cannot be loaded, or it trains a reward model.
        """
        section = recipe.eval
        if section.prompts and make_objective(recipe.loss).needs_rewards:
            raise InputError("a reward model writes no replies", field="eval.prompts", mend="Set it to null.")
        prompts = load_prompts(section.prompts, section.max_prompts) if section.prompts else []
        return cls(recipe, prompts, load_reward(section.reward) if section.reward else None)

    def check_lengths(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse prompts and replies that the model has no positions for."""
        if not self.prompts:
            return
        encoded, _ = encode_prompts(self.prompts, tokenizer, self.recipe.data.chat_template_kwargs)
        new = self.recipe.eval.max_new_tokens
        check_length(model, new, max(map(len, encoded)) + new, field="eval.max_new_tokens")

    def measure(self, model: Any, tokenizer: PreTrainedTokenizerBase, reference: Any = None) -> Measured:
        """Replies of a model, their reward, and their KL to a reference where one is given.

        The KL is of the policy as it is, so only of samples at temperature 1 and top_p 1.
        """
        if not self.prompts:
            return Measured()
        section = self.recipe.eval
        drawn = sample_replies(
            model,
            tokenizer,
            self.prompts,
            samples=section.samples,
            max_new_tokens=section.max_new_tokens,
            temperature=section.temperature,
            top_p=section.top_p,
            batch_size=section.batch_size,
            seed=section.seed,
            chat_template_kwargs=self.recipe.data.chat_template_kwargs,
        )
        kls = None
        if reference is not None and self.has_kl:
            kls = sequence_kl(model, reference, drawn).tolist()
        rewards = None
        if self.reward and ranks.is_first():
            rewards = self.reward([s.prompt for s in drawn], [s.reply for s in drawn])
        return Measured(drawn, rewards, kls)

    @property
    def each_prompt(self) -> list[Prompt]:
        """The prompt of each reply."""
        return [prompt for prompt in self.prompts for _ in range(self.recipe.eval.samples)]

    @property
    def has_kl(self) -> bool:
        """Whether the replies are drawn from the policy itself, and not from a sharpened one."""
        return self.recipe.eval.temperature == 1.0 and self.recipe.eval.top_p == 1.0


class SampleTracker(TrainerCallback):
    """Measures samples before training (`before`), every so many steps, and at the end.

    Each measurement is logged (`eval_reward`, `eval_kl`, `eval_reply_tokens`, and what `cost` tells), so that
    it stands in metrics.jsonl, and its replies go into FOLDER/evaluations/step-N.jsonl.

    Args:
        samples: how they are drawn.
        policy: gives the policy in training, unwrapped.
        tokenizer: the policy's.
        load_reference: gives the policy as it was at the start; called when it is needed.
        folder: of the run.
        log: takes a line of metrics; the trainer's.
        cost: figures of the work done so far, e.g. seconds and tokens.
        pause: a context within which the trainer's clock stands.
        say: gets lines of progress.
        together: whether all ranks must draw, each the same, since the policy's passes are theirs together.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        policy: Callable[[], Any],
        tokenizer: PreTrainedTokenizerBase,
        load_reference: Callable[[], Any],
        folder: Path,
        log: Callable[[dict[str, Any]], None],
        cost: Callable[[], dict[str, float]],
        pause: Callable[[], AbstractContextManager[Any]],
        say: Say,
        together: Callable[[], bool] = lambda: False,
    ) -> None:
        self.samples, self.folder, self._together = samples, folder, together
        self._policy, self._tokenizer, self._load_reference = policy, tokenizer, load_reference
        self._log, self._cost, self._pause, self._say = log, cost, pause, say
        self._reference: Any = None
        self._last: int | None = None

    def before(self) -> None:
        """Measure the policy before it is trained; a resumed run has that, unless its prompts changed."""
        path = self._place(0)
        lacks = not path.exists() or [line["prompt"] for line in read_lines(path)] != self.samples.each_prompt
        if ranks.broadcast(lacks):
            self.measure(0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Know what the run that is resumed has measured."""
        measured = (line.get("step") for line in state.log_history if "eval_reply_tokens" in line)
        if state.global_step in measured:
            self._last = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure where it is time."""
        every = self.samples.recipe.eval.every
        if (every and state.global_step % every == 0) or state.global_step >= state.max_steps:
            # Logging what is measured would have the trainer forget its own line of this step.
            due = control.should_log
            self.measure(state.global_step)
            control.should_log = due

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure the last policy, where training ended before its last step."""
        if state.global_step != self._last:
            self.measure(state.global_step)

    def measure(self, step: int) -> None:
        """Draw, measure, log and write: the first rank, or all alike where the policy is in shards."""
        self._last = step
        if not self.samples.prompts:
            return
        cost = self._cost()
        with self._pause():
            if ranks.is_first() or self._together():
                self._measure(step, cost)
            ranks.wait()

    def _measure(self, step: int, cost: dict[str, float]) -> None:
        self._say(f"sampling on {len(self.samples.prompts)} held-out prompts, step {step}")
        # A second model is in memory only where it is needed between two steps.
        if step > 0 and self._reference is None and self.samples.has_kl:
            self._reference = self._load_reference()
        found = self.samples.measure(self._policy(), self._tokenizer, self._reference)
        if step == 0 and self.samples.has_kl:
            found = replace(found, kls=[0.0] * len(found.samples))
        if not ranks.is_first():
            return
        self._place(step).parent.mkdir(parents=True, exist_ok=True)
        write_lines(self._place(step), found.lines())
        self._log({f"eval_{name}": value for name, value in found.means().items()} | cost)

    def _place(self, step: int) -> Path:
        return evaluation_file(self.folder, step)


def evaluation_file(folder: Path, step: int) -> Path:
    """Where a run keeps the replies that it measured at a step."""
    return folder / "evaluations" / f"step-{step}.jsonl"


def sample_figures(folder: Path, last: int) -> dict[str, float]:
    """Reward before and after, and KL, by the names of summary.json; writes FOLDER/samples.jsonl.

    Args:
        folder: a run's, in which a `SampleTracker` has measured.
        last: the last step.
    """
    places = [evaluation_file(folder, step) for step in (0, last)]
    if not all(place.exists() for place in places):
        return {}
    before, after = map(read_lines, places)
    lines = []
    for old, new in zip(before, after, strict=True):
        line = {"prompt": old["prompt"], "before": old["reply"], "after": new["reply"]}
        if "reward" in new:
            line |= {"reward_before": old["reward"], "reward_after": new["reward"]}
        lines.append(line)
    write_lines(folder / "samples.jsonl", lines)
    columns: dict[str, list[Any]] = {
        "eval/kl": [line.get("kl") for line in after],
        "eval/reward_before": [line.get("reward_before") for line in lines],
        "eval/reward_after": [line.get("reward_after") for line in lines],
    }
    return {name: sum(values) / len(values) for name, values in columns.items() if None not in values}


def held_out_figures(trainer: PreferenceTrainer, held_out: Dataset) -> dict[str, Any]:
    """Metrics of the held-out pairs, by the names of summary.json."""
    metrics = trainer.evaluate()
    figures = {f"eval/{k[len('eval_') :]}": v for k, v in metrics.items() if k.startswith("eval_")}
    if "eval/rewards/accuracies" in figures:
        figures["eval/accuracy"] = figures["eval/rewards/accuracies"]
    if (ceiling := _ceiling(held_out)) is not None:
        figures["eval/accuracy_ceiling"] = ceiling
    return figures


def _ceiling(dataset: Dataset) -> float | None:
    """Accuracy of the data's own score difference on its own labels: no better rule is known."""
    if "margin" not in dataset.column_names:
        return None
    margins = [m for m in dataset["margin"] if m is not None]
    return sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins) / len(margins) if margins else None
