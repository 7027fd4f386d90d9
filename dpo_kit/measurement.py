"""What a run measures beside training: held-out pairs, samples before and after, their reward, the KL."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dpo_kit.errors import InputError
from dpo_kit.evaluation import load_prompts, load_reward
from dpo_kit.evaluation.kl import sequence_kl
from dpo_kit.evaluation.rewards import RewardFunction
from dpo_kit.evaluation.sampling import Prompt, Sample, encode_prompts, sample_replies
from dpo_kit.losses import make_objective
from dpo_kit.models import check_length
from dpo_kit.recipe import Recipe
from dpo_kit.run_folder import write_text
from dpo_kit.trainer import PreferenceTrainer

Say = Callable[[str], None]


@dataclass
class Samples:
    """Replies on the held-out prompts, before and after training.

    Attributes:
        recipe: says how they are drawn.
        prompts: none where the recipe names none: then nothing is sampled.
        reward: the true reward, or None.
    """

    recipe: Recipe
    prompts: list[Prompt]
    reward: RewardFunction | None
    before: list[Sample] = field(default_factory=list)
    after: list[Sample] = field(default_factory=list)

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

    def draw(self, model: Any, tokenizer: PreTrainedTokenizerBase, say: Say, when: str) -> list[Sample]:
        """A model's replies; `when` is "before" or "after"."""
        if not self.prompts:
            return []
        section = self.recipe.eval
        say(f"sampling on {len(self.prompts)} held-out prompts, {when}")
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
        setattr(self, when, drawn)
        return drawn

    def measure(self, trained: Any, load_start: Callable[[], Any], folder: Path) -> dict[str, Any]:
        """True reward and KL of the replies after training; they go into FOLDER/samples.jsonl.

        Args:
            trained: drew the replies after.
            load_start: gives the policy as it was before; called after training, so that there is no second
                model in memory while the policy is trained.
            folder: of the run.
        """
        if not self.prompts:
            return {}
        figures: dict[str, Any] = {}
        if self.recipe.eval.temperature == 1.0 and self.recipe.eval.top_p == 1.0:
            figures["eval/kl"] = float(sequence_kl(trained, load_start(), self.after).mean())
        rewards = self._rewards()
        for name, values in rewards.items():
            figures[f"eval/reward_{name}"] = sum(values) / len(values)
        lines = []
        for i, (before, after) in enumerate(zip(self.before, self.after, strict=True)):
            line = {"prompt": before.prompt, "before": before.reply, "after": after.reply}
            lines.append(line | {f"reward_{name}": values[i] for name, values in rewards.items()})
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(folder / "samples.jsonl", text)
        return figures

    def _rewards(self) -> dict[str, list[float]]:
        """The true reward of prompt and reply, before and after."""
        if self.reward is None:
            return {}
        found = {}
        for name, samples in (("before", self.before), ("after", self.after)):
            texts = (s.prompt + s.reply if isinstance(s.prompt, str) else s.reply for s in samples)
            found[name] = [self.reward(text) for text in texts]
        return found


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
