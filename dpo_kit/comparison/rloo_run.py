"""Carry a recipe out by RLOO through TRL, on the prompts of the pairs; folder and measurements as for PPO.

Of the section ppo, `reward`, `output_dir` and `settings` are read, the last as fields of TRL's RLOOConfig;
how far the policy goes is set by its `beta`. Rewards are taken as they are: the baseline of the prompt's
other replies takes their mean out, and `normalize_advantages` their scale.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset
from transformers import GenerationConfig, set_seed

from dpo_kit.callbacks import METRICS_FILE, MetricsFile
from dpo_kit.comparison.cost_meter import CostMeter
from dpo_kit.comparison.reward_model import trained_reward_model
from dpo_kit.errors import InputError
from dpo_kit.evaluation import Reward, load_reward
from dpo_kit.evaluation.reward_models import LearnedReward
from dpo_kit.evaluation.rewards import CheckedReward
from dpo_kit.evaluation.sampling import Prompt, encode_prompts
from dpo_kit.measurement import Samples, SampleTracker, Say, sample_figures
from dpo_kit.models import check_length
from dpo_kit.recipe import Recipe
from dpo_kit.run import (
    RunResult,
    close_run,
    finished_run,
    load_start,
    lora_config,
    open_folder,
    read_pairs_of,
    write_origin,
)
from dpo_kit.run_folder import peak_memory_bytes
from dpo_kit.start import check_start, make_start, started


def run_rloo(recipe: Recipe, *, resume: bool = False, say: Say = print) -> RunResult:
    """Train the policy of a recipe by RLOO, and write the run folder.

    `loss`, and of `train` the learning rate, batch and steps, are of no account here: see `rloo.make_config`.

    Args:
        recipe: checked.
        resume: leave a finished run of this very recipe as it is; one that was cut off begins anew, but what
            it starts from is kept. Without it an earlier run is put aside.
        say: gets lines of progress.

    Raises:
        InputError: data, models and recipe do not fit together, or TRL is not installed.
        TrainingError: figures or weights are not finite any more.
    """
    rloo = _trl()
    folder = Path(recipe.ppo.output_dir or f"{recipe.training_config().output_dir}-rloo")
    recipe = recipe.model_copy(update={"train": recipe.train | {"output_dir": str(folder)}})
    config = recipe.training_config()
    resolved = recipe.resolved(config)
    if resume and (finished := finished_run(folder, resolved, say)):
        return finished
    if recipe.ppo.target_kl is not None:
        raise InputError("RLOO steers to no KL", field="ppo.target_kl", mend="Set beta in ppo.settings.")
    settings = rloo.make_config(recipe.ppo.settings, config, recipe.eval.max_new_tokens)
    check_start(recipe)
    _open(folder, resume, say)
    figures: dict[str, Any] = {}
    if started(recipe, folder) is not recipe:
        figures |= make_start(recipe, folder, say)
        recipe = started(recipe, folder)
    set_seed(settings.seed)
    policy, tokenizer = load_start(recipe, say)
    samples = Samples.of(recipe)
    samples.check_lengths(policy, tokenizer)
    prompts, ids, ends = _prompts(recipe, tokenizer, say)
    longest = max(map(len, ids)) + recipe.eval.max_new_tokens
    check_length(policy, recipe.eval.max_new_tokens, longest, field="eval.max_new_tokens")
    write_origin(folder, resolved, config, policy, {"train": Dataset.from_dict({"prompt_ids": ids})})
    reward, meter = _reward(recipe, folder, say), CostMeter()
    own, policy.generation_config = policy.generation_config, GenerationConfig()
    trainer = rloo.Trainer(
        settings,
        policy,
        tokenizer,
        prompts=ids,
        ends=ends,
        reward=lambda numbers, replies: reward([prompts[n] for n in numbers], replies),
        meter=meter,
        peft_config=lora_config(recipe),
    )
    figures |= _train(rloo, trainer, recipe, samples, reward, meter, folder, say)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    policy.generation_config = own

    def save(place: str) -> None:
        policy.save_pretrained(place)
        tokenizer.save_pretrained(place)

    return close_run(recipe, folder, resolved, figures, save, say)


def _open(folder: Path, resume: bool, say: Say) -> None:
    open_folder(folder, resume, say)
    if (folder / METRICS_FILE).exists():
        say("a run by RLOO cannot go on in the middle: training begins anew")
        (folder / METRICS_FILE).unlink()
    shutil.rmtree(folder / "evaluations", ignore_errors=True)


def _trl() -> ModuleType:
    try:
        from dpo_kit.comparison import rloo
    except (ImportError, RuntimeError) as error:
        # TRL turns an import of its own that fails into a RuntimeError: its RLOO needs requests, undeclared.
        if isinstance(error, ImportError) and not (error.name or "").startswith("trl"):
            raise
        reason = str(error).strip().splitlines()[-1]
        mend = 'It is in trl 1.12, and needs requests: pip install "trl>=1.12,<1.13" requests.'
        raise InputError(f"TRL's RLOO cannot be imported ({reason})", mend=mend) from error
    return rloo


def _prompts(recipe: Recipe, tokenizer: Any, say: Say) -> tuple[list[Prompt], list[list[int]], list[int]]:
    """The different prompts of the pairs, their ids, and the tokens that end a reply."""
    rows = read_pairs_of(recipe, "train", say)
    assert rows is not None
    prompts = list({json.dumps(prompt): prompt for prompt in rows["prompt"]}.values())
    ids, ends = encode_prompts(prompts, tokenizer, recipe.data.chat_template_kwargs)
    room = (recipe.data.max_length or 10**9) - recipe.eval.max_new_tokens
    fits = [i for i, prompt in enumerate(ids) if 0 < len(prompt) <= room]
    if len(fits) < len(ids):
        left_out = len(ids) - len(fits)
        say(f"{left_out} of {len(ids)} prompts are left out: empty, or too long for data.max_length")
    if not fits:
        raise InputError("no prompt is left to train on", field="data.max_length", mend="Raise it.")
    return [prompts[i] for i in fits], [ids[i] for i in fits], ends


def _reward(recipe: Recipe, folder: Path, say: Say) -> Reward:
    spec = recipe.ppo.reward
    if spec == "model":
        learned = trained_reward_model(recipe, folder / "reward_model", say)
        return load_reward(f"model:{learned}", field="reward_model.path")
    if spec != "true":
        return load_reward(spec, field="ppo.reward")
    if recipe.eval.reward is None:
        mend = "Set eval.reward, or ppo.reward: model."
        raise InputError("the recipe names no true reward", field="ppo.reward", mend=mend)
    return load_reward(recipe.eval.reward)


def _train(
    rloo: ModuleType,
    trainer: Any,
    recipe: Recipe,
    samples: Samples,
    reward: Reward,
    meter: CostMeter,
    folder: Path,
    say: Say,
) -> dict[str, Any]:
    """Train and measure; what came of it."""
    inner = reward.inner if isinstance(reward, CheckedReward) else reward
    learned = inner.model if isinstance(inner, LearnedReward) else None
    for model in (trainer.accelerator.unwrap_model(trainer.model), trainer.ref_model, learned):
        if model is not None:
            meter.watch(model)
    tracker = SampleTracker(
        samples,
        policy=lambda: trainer.accelerator.unwrap_model(trainer.model),
        tokenizer=trainer.processing_class,
        load_reference=lambda: load_start(recipe)[0].to(trainer.args.device).eval(),
        folder=folder,
        log=trainer.log_measured,
        cost=meter.figures,
        pause=meter.paused,
        say=say,
    )
    for callback in (rloo.Guard(), MetricsFile(), tracker):
        trainer.add_callback(callback)
    tracker.before()
    meter.start()
    say("training by RLOO")
    trainer.train()
    meter.stop()
    return {
        "train_runtime": meter.seconds,
        "steps": trainer.state.global_step,
        "tokens": meter.tokens,
        "tokens_sampled": meter.tokens_sampled,
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
        **sample_figures(folder, trainer.state.global_step),
    }
