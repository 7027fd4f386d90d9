"""What the runs that sample replies to learn from share: PPO's and RLOO's, each through a trainer of TRL.

Start, prompts, measurements and run folder are those of `dpo-kit train`:
recipe.yaml environment.json metrics.jsonl summary.json samples.jsonl evaluations/ model/ report.html plots/,
sft/ and pairs/ where the recipe has them made, and reward_model/ where the reward is learned first.
The trainers and their settings are in `ppo_run` and `rloo_run`.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from dpo_kit.callbacks import METRICS_FILE
from dpo_kit.checkpoint_folders import free_name
from dpo_kit.comparison.cost_meter import CostMeter
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import InputError
from dpo_kit.evaluation import Reward, load_reward
from dpo_kit.evaluation.sampling import encode_prompts
from dpo_kit.losses import make_objective
from dpo_kit.measurement import Samples, SampleTracker, Say, sample_figures
from dpo_kit.models import check_length
from dpo_kit.recipe import Recipe
from dpo_kit.run import load_start, read_pairs_of
from dpo_kit.run_folder import digest_recipe, peak_memory_bytes
from dpo_kit.run_output import RunResult, close_run, finished_run, open_folder, write_origin
from dpo_kit.start import check_start, make_start, started
from dpo_kit.texts import Prompt
from dpo_kit.yaml_file import read_yaml

# What a run starts from; the next one in the folder may start from it too.
_SHARED = ("sft", "pairs", "reward_model")


@dataclass
class RolloutRun:
    """A run that is ready to train.

    Attributes:
        recipe: one that has its policy and pairs (`dpo_kit.start.started`).
        folder: of the run.
        settings: of TRL's trainer.
        policy: as it is before training; what is trained once `learn` has it.
        prompts: of the training pairs, the distinct ones: ids -> prompt.
        ends: tokens that end a reply.
        samples: what is measured.
        reward: of texts; None where a reward model is learned.
    """

    recipe: Recipe
    folder: Path
    settings: Any
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: dict[tuple[int, ...], Prompt]
    ends: list[int]
    samples: Samples
    reward: Reward | None
    say: Say
    meter: CostMeter = field(default_factory=CostMeter)

    def learn(
        self,
        trainer: Any,
        policy: Callable[[], Any],
        callbacks: Iterable[TrainerCallback],
        log: Callable[[dict[str, Any]], None],
        first: Callable[[], dict[str, Any]] = dict,
    ) -> dict[str, Any]:
        """Train, and measure before, on the way and at the end.

        Args:
            trainer: TRL's, with the models that the meter watches.
            policy: gives the policy in training, in the precision of its weights.
            callbacks: in this order, those that write and measure behind them.
            log: takes a line of metrics.
            first: what is done before training and counts as its cost; its figures.

        Returns:
            Figures for summary.json.
        """
        tracker = SampleTracker(
            self.samples,
            policy=policy,
            tokenizer=self.tokenizer,
            load_reference=lambda: load_start(self.recipe)[0].to(trainer.args.device).eval(),
            folder=self.folder,
            log=log,
            cost=self.meter.figures,
            pause=self.meter.paused,
            say=self.say,
        )
        for callback in (*callbacks, tracker):
            trainer.add_callback(callback)
        tracker.measure(0)
        self.meter.start()
        figures = first()
        self.say("training on sampled replies")
        trainer.train()
        self.meter.stop()
        return figures | {
            "train_runtime": self.meter.seconds,
            "steps": trainer.state.global_step,
            "tokens": self.meter.tokens,
            "tokens_sampled": self.meter.tokens_sampled,
            "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
            **sample_figures(self.folder, trainer.state.global_step),
        }


@dataclass(frozen=True)
class Method:
    """What tells one such method from another.

    Attributes:
        name: as in `dpo_kit.comparison.NAME`, the bridge to TRL; ends the run folder's default name.
        check: refuses a recipe that the method cannot carry out; (bridge, recipe).
        settings: of TRL's trainer; (bridge, recipe, section train).
        reply_tokens: the longest reply of these settings, and the recipe's key for it.
        train: trains `policy` of a run, and leaves there what is to be saved; (bridge, run) -> figures.
    """

    name: str
    check: Callable[[ModuleType, Recipe], None]
    settings: Callable[[ModuleType, Recipe, PreferenceConfig], Any]
    reply_tokens: Callable[[Any], tuple[int, str]]
    train: Callable[[ModuleType, RolloutRun], dict[str, Any]]


def carry_out(method: Method, recipe: Recipe, resume: bool, say: Say) -> RunResult:
    """Train the policy of a recipe on the prompts of its pairs, and write the run folder.

    Args:
        method: how.
        recipe: checked.
        resume: leave a finished run of this very recipe as it is; one that was cut off begins anew, since
            these trainers cannot go on, but what it starts from (sft/, pairs/, reward_model/) is kept; so it
            is where the folder holds a run of another recipe, whose own files are put aside. Without it all
            of an earlier run is put aside.
        say: gets lines of progress.

    Raises:
        InputError: data, models and recipe do not fit together, or TRL is not installed.
        TrainingError: figures or weights are not finite any more.
    """
    bridge = _bridge(method.name)
    folder = Path(recipe.ppo.output_dir or f"{recipe.training_config().output_dir}-{method.name}")
    recipe = recipe.model_copy(update={"train": recipe.train | {"output_dir": str(folder)}})
    config = recipe.training_config()
    resolved = recipe.resolved(config)
    if resume and (finished := finished_run(recipe, folder, resolved, say)):
        return finished
    # What can be wrong with the input is found before an earlier run is put aside and anything written.
    _check(method, bridge, recipe, config)
    settings = method.settings(bridge, recipe, config)
    samples, reward = Samples.of(recipe), text_reward(recipe)
    run = None
    if started(recipe, folder) is recipe:
        run = _prepare(method, recipe, folder, settings, samples, reward, say)
    with open_folder(folder, resume, say):
        _clear(folder, resolved, say)
        figures: dict[str, Any] = {}
        if run is None:
            figures |= make_start(recipe, folder, say)
            recipe = started(recipe, folder)
            run = _prepare(method, recipe, folder, settings, Samples.of(recipe), reward, say)
        return _train(method, bridge, run, figures, resolved, say)


def _train(
    method: Method, bridge: Any, run: RolloutRun, figures: dict[str, Any], resolved: dict[str, Any], say: Say
) -> RunResult:
    """What comes after the start, in a folder that is open."""
    recipe, folder = run.recipe, run.folder
    config = recipe.training_config()
    prompts = Dataset.from_dict({"prompt_ids": [list(ids) for ids in run.prompts]})
    write_origin(folder, resolved, config, run.policy, {"train": prompts})
    # What the policy was published with does not bend its samples; it is saved with it again.
    own, run.policy.generation_config = run.policy.generation_config, GenerationConfig()
    figures |= method.train(bridge, run)
    run.policy.generation_config = own

    def save(place: str) -> None:
        run.policy.save_pretrained(place)
        run.tokenizer.save_pretrained(place)

    return close_run(recipe, folder, resolved, figures, save, say)


def check_ahead(method: Method, recipe: Recipe) -> None:
    """Refuse what `carry_out` would refuse before it loads rewards and reads data, models and prompts.

    Raises:
        InputError: TRL is not installed, or the settings are wrong.
    """
    bridge, config = _bridge(method.name), recipe.training_config()
    _check(method, bridge, recipe, config)
    method.settings(bridge, recipe, config)


def _bridge(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"dpo_kit.comparison.{name}")
    except (ImportError, RuntimeError) as error:
        # TRL turns an import of its own that fails into a RuntimeError: its RLOO needs requests, undeclared.
        if isinstance(error, ImportError) and not (error.name or "").startswith("trl"):
            raise
        raise InputError(
            f"TRL's {name.upper()} cannot be imported ({str(error).strip().splitlines()[-1]})",
            mend='It is in trl 1.12: pip install "trl>=1.12,<1.13" requests, or dpo-kit[ppo].',
        ) from error


def _check(method: Method, bridge: ModuleType, recipe: Recipe, config: PreferenceConfig) -> None:
    name = method.name.upper()
    if make_objective(recipe.loss).needs_rewards:
        raise InputError(f"{name} trains no reward model", field="loss", mend="Set reward_model.loss to it.")
    if recipe.model.adapter is not None:
        raise InputError(
            f"{name} trains no adapter further",
            field="model.adapter",
            mend="Merge it (dpo-kit merge), and train a new one on what that gives (model.lora).",
        )
    if config.world_size > 1:
        raise InputError(f"{name} runs in one process, and there are {config.world_size}", field="ppo")
    method.check(bridge, recipe)
    check_start(recipe)


def text_reward(recipe: Recipe) -> Reward | None:
    """What `ppo.reward` names; None where a reward model is learned.

    Raises:
        InputError: it cannot be loaded, or the recipe has no true reward.
    """
    spec = recipe.ppo.reward
    if spec == "model":
        return None
    if spec != "true":
        return load_reward(spec, field="ppo.reward")
    if recipe.eval.reward is None:
        raise InputError(
            "the recipe names no true reward",
            field="ppo.reward",
            mend="Set eval.reward, or ppo.reward: model.",
        )
    return load_reward(recipe.eval.reward)


def _clear(folder: Path, resolved: dict[str, Any], say: Say) -> None:
    """Leave nothing of another run in the folder but what runs start from."""
    if _is_of_another(folder, resolved):
        say(f"what a run of another recipe left in {folder} is now {_put_own_aside(folder)}")
    if (folder / METRICS_FILE).exists():
        say("a run that samples to learn cannot go on in the middle: training begins anew")
        (folder / METRICS_FILE).unlink()
    shutil.rmtree(folder / "evaluations", ignore_errors=True)


def _is_of_another(folder: Path, resolved: dict[str, Any]) -> bool:
    """Whether a run of another recipe lies there, finished or not, or a finished one of any."""
    if (folder / "summary.json").exists():
        return True
    written = folder / "recipe.yaml"
    if not written.exists():
        return False
    return digest_recipe(read_yaml(written)[0]) != digest_recipe(resolved)


def _put_own_aside(folder: Path) -> Path:
    """Move all but what runs start from to the first free name.N, recipe.yaml last: it tells whose it is."""
    aside = free_name(folder)
    aside.mkdir()
    for part in sorted(folder.iterdir(), key=lambda part: part.name == "recipe.yaml"):
        if part.name not in _SHARED:
            part.rename(aside / part.name)
    return aside


def _prepare(
    method: Method,
    recipe: Recipe,
    folder: Path,
    settings: Any,
    samples: Samples,
    reward: Reward | None,
    say: Say,
) -> RolloutRun:
    """Policy, tokenizer and the prompts to train on, checked against each other."""
    rows = read_pairs_of(recipe, "train", say)
    assert rows is not None
    policy, tokenizer = load_start(recipe, say)
    samples.check_lengths(policy, tokenizer)
    length, key = method.reply_tokens(settings)
    prompts, ends = _distinct_prompts(recipe, rows, tokenizer, length, say)
    check_length(policy, length, max(map(len, prompts)) + length, field=key)
    return RolloutRun(recipe, folder, settings, policy, tokenizer, prompts, ends, samples, reward, say)


def _distinct_prompts(
    recipe: Recipe, rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, say: Say
) -> tuple[dict[tuple[int, ...], Prompt], list[int]]:
    """The different prompts of the pairs, by their ids, and the tokens that end a reply."""
    section = recipe.data
    prompts = list({json.dumps(prompt): prompt for prompt in rows["prompt"]}.values())
    encoded, ends = encode_prompts(prompts, tokenizer, section.chat_template_kwargs)
    found: dict[tuple[int, ...], Prompt] = {}
    for ids, prompt in zip(encoded, prompts, strict=True):
        found.setdefault(tuple(ids), prompt)
    limit = section.max_length
    fit = {ids: p for ids, p in found.items() if ids and (limit is None or len(ids) + length <= limit)}
    if len(fit) < len(found):
        say(
            f"{len(found) - len(fit)} of {len(found)} prompts are left out: empty, or longer than "
            f"data.max_length with a reply of {length} tokens"
        )
    if not fit:
        raise InputError("no prompt is left to train on", field="data.max_length", mend="Raise it.")
    say(f"{len(fit)} different prompts")
    return fit, ends
