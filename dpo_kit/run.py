"""Carry a recipe out: load, train, evaluate, report. What is left is the run folder.

recipe.yaml environment.json metrics.jsonl summary.json samples.jsonl checkpoints/ model/
report.html plots/, and sft/ where the policy was made from a corpus
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_kit import ranks
from dpo_kit.adapter_folders import saves
from dpo_kit.adapters import new_adapter, put_adapter
from dpo_kit.checkpoints import newest_checkpoint
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import InputError
from dpo_kit.losses import make_objective
from dpo_kit.measurement import Samples, SampleTracker, Say, held_out_figures, sample_figures
from dpo_kit.models import check_length, embedded_tokens, load_model, load_reward_model
from dpo_kit.pairs import load_with_report
from dpo_kit.recipe import Recipe
from dpo_kit.reference import CachedReference, NoReference
from dpo_kit.run_folder import peak_memory_bytes
from dpo_kit.run_output import RunResult, close_run, finished_run, open_folder, write_origin
from dpo_kit.start import check_start, is_made, make_start, started
from dpo_kit.tokenization import TokenizedPairs, longest_sequence, tokenize_pairs
from dpo_kit.tokenizer import load_tokenizer
from dpo_kit.trainer import PreferenceTrainer


def run_recipe(recipe: Recipe, *, resume: bool = False, say: Say = print) -> RunResult:
    """Train as a recipe says, evaluate, and write the run folder.

    Args:
        recipe: checked.
        resume: go on from the newest checkpoint, or start where there is none. Without it an earlier
            run in the same folder is put aside under another name, never overwritten.
        say: gets lines of progress.

    Raises:
        InputError: data, model and recipe do not fit together.
        TrainingError: training had to stop.
    """
    config = recipe.training_config()
    say = ranks.first_only(say)
    folder = Path(str(config.output_dir))
    resolved = recipe.resolved(config)
    if resume and (finished := finished_run(recipe, folder, resolved, say)):
        return finished
    # What can be wrong with the input is found before an earlier run is put aside and anything written.
    _check_apart(recipe, folder)
    check_start(recipe)
    parts = None if started(recipe, folder) is not recipe else _prepared(recipe, config, say)
    ranks.wait()
    with open_folder(folder, resume, say):
        figures: dict[str, Any] = {}
        if parts is None:
            figures |= make_start(recipe, folder, say)
            recipe = started(recipe, folder)
            parts = _prepared(recipe, config, say)
        return _carry_out(recipe, resolved, config, parts, figures, resume, say)


def _check_apart(recipe: Recipe, folder: Path) -> None:
    """Refuse a recipe that starts from what lies in its run's own folder, which would be put aside with it.

    Raises:
        InputError: naming the key.
    """
    model, reference = recipe.model, recipe.reference
    named = {"model.adapter": model.adapter, "model.path": model.path, "model.tokenizer": model.tokenizer}
    named |= {"reference.path": reference.path, "reference.adapter": reference.adapter}
    for field, place in named.items():
        if (
            place is not None
            and Path(place).is_dir()
            and Path(place).resolve().is_relative_to(folder.resolve())
        ):
            raise InputError(
                "it lies in the run's own folder, which the run is to write",
                file=place,
                field=field,
                mend="Name another folder as train.output_dir.",
            )


def _prepared(recipe: Recipe, config: PreferenceConfig, say: Say) -> tuple[Any, ...]:
    """Samples, policy, tokenizer, tokenised data and trainer; see `prepare`."""
    samples = Samples.of(recipe)
    return samples, *prepare(recipe, config, read_pairs(recipe, say), say, samples)


def _carry_out(
    recipe: Recipe,
    resolved: dict[str, Any],
    config: PreferenceConfig,
    parts: tuple[Any, ...],
    figures: dict[str, Any],
    resume: bool,
    say: Say,
) -> RunResult:
    """What comes after the start, in a folder that is open."""
    samples, policy, tokenizer, data, trainer = parts
    folder = Path(str(config.output_dir))
    write_origin(folder, resolved, config, policy, {s: d and d.dataset for s, d in data.items()})
    checkpoint = newest_checkpoint(folder) if resume else None
    if checkpoint is not None:
        say(f"going on from {checkpoint}")
    tracker = _track(recipe, trainer, tokenizer, samples, folder, say)
    # The policy is not trained yet, nor is the checkpoint loaded that the run goes on from.
    if checkpoint is None:
        tracker.measure(0)
    else:
        tracker.before()
    trainer.add_callback(tracker)
    figures |= _fill(trainer, say)
    figures |= _train(trainer, checkpoint, say)
    if data["eval"] is not None:
        figures |= held_out_figures(trainer, data["eval"].dataset)
    if ranks.is_first():
        figures |= sample_figures(folder, trainer.state.global_step)
    return close_run(recipe, folder, resolved, figures, trainer.save_model, say)


def prepare(
    recipe: Recipe,
    config: PreferenceConfig,
    rows: dict[str, Dataset | None],
    say: Say,
    samples: Samples | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, TokenizedPairs | None], PreferenceTrainer]:
    """Policy, tokenizer, tokenised data and trainer, checked against each other."""
    policy, tokenizer = load_start(recipe, say)
    with ranks.in_turns():
        data = {split: _tokenize(recipe, found, tokenizer, say) for split, found in rows.items()}
    longest = max(longest_sequence(found.dataset)[0] for found in data.values() if found is not None)
    check_length(policy, config.max_length, longest)
    if samples is not None:
        samples.check_lengths(policy, tokenizer)
    return policy, tokenizer, data, _make_trainer(recipe, config, policy, tokenizer, data)


def read_pairs(recipe: Recipe, say: Say) -> dict[str, Dataset | None]:
    """Rows to train on and to evaluate; a rank that comes later finds what the first one has kept."""
    with ranks.in_turns():
        return {split: read_pairs_of(recipe, split, say) for split in ("train", "eval")}


def read_pairs_of(recipe: Recipe, split: str, say: Say) -> Dataset | None:
    """The usable pairs of "train" or "eval", the others accounted for; None where the recipe names none."""
    sources = getattr(recipe.data, split)
    if not sources:
        return None
    rows, report = load_with_report(sources, recipe.load_options())
    assert report.kind is not None
    say(f"{split}: {report.made} {report.kind.rows} of {report.kept} of {report.read} rows")
    if report.problems or report.worth_knowing() or any(source.unused_columns for source in report.sources):
        say(report.summary())
    return rows


def load_start(
    recipe: Recipe, say: Say = lambda line: None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy before the first preference step, and its tokenizer."""
    named = str(recipe.model.tokenizer or recipe.model.path)
    tokenizer = load_tokenizer(named, **recipe.tokenizer_options())
    source, adapter = recipe.model.path or recipe.model.config, recipe.model.adapter
    assert source is not None
    dtype, seed = getattr(torch, recipe.model.dtype), int(recipe.train.get("seed", 42))
    if make_objective(recipe.loss).needs_rewards:
        policy, about = load_reward_model(source, dtype, seed, **recipe.loading_options())
        if about and not (adapter and saves(adapter, "score")):
            say(about)
    else:
        policy = load_model(source, dtype, seed, **recipe.loading_options())
    if adapter is not None:
        policy = put_adapter(policy, adapter, trainable=True)
    rows = embedded_tokens(policy)
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}",
            field="model.tokenizer",
            mend="Use the model's own tokenizer, or a configuration with a larger vocab_size.",
        )
    return policy, tokenizer


def _tokenize(
    recipe: Recipe, rows: Dataset | None, tokenizer: PreTrainedTokenizerBase, say: Say
) -> TokenizedPairs | None:
    if rows is None:
        return None
    section = recipe.data
    found = tokenize_pairs(
        rows,
        tokenizer,
        max_length=section.max_length,
        overlong=section.overlong,
        chat_template_kwargs=section.chat_template_kwargs,
        num_proc=section.num_proc,
        cache_dir=section.cache_dir,
    )
    for line in found.account():
        say(line)
    return found


def lora_config(recipe: Recipe) -> Any:
    """peft's configuration of the policy's new adapter, of whatever kind; None where it has none."""
    rewards = make_objective(recipe.loss).needs_rewards
    return new_adapter(recipe.model.lora, recipe.model.peft, rewards=rewards)


def _make_trainer(
    recipe: Recipe,
    config: PreferenceConfig,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: dict[str, TokenizedPairs | None],
) -> PreferenceTrainer:
    lora = lora_config(recipe)
    train, held_out = data["train"], data["eval"]
    try:
        return PreferenceTrainer(
            policy,
            recipe.reference.path,
            config,
            train.dataset if train else None,
            held_out.dataset if held_out else None,
            processing_class=tokenizer,
            peft_config=lora,
        )
    except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
        # What transformers and peft refuse of the settings handed on to them.
        field = "train or the model's adapter" if lora else "train"
        raise InputError(str(error).strip().splitlines()[0], field=field) from error


def fill_cache(recipe: Recipe, *, say: Say = print) -> dict[str, Any]:
    """Compute what the cached reference of a recipe lacks; nothing is trained. Ranks share the work.

    Returns:
        reference_computed, the sequences that all ranks computed, and reference_runtime, seconds.

    Raises:
        InputError: data, model and recipe do not fit together, or the recipe's reference is not cached.
    """
    config = recipe.training_config()
    say = ranks.first_only(say)
    folder = Path(str(config.output_dir))
    recipe, whole = started(recipe, folder), recipe
    if recipe is not whole and not is_made(whole, folder):
        raise InputError(
            "what the run starts from is made by the run, and is not there yet",
            file=folder,
            mend="Train once: dpo-kit train fills the cache as well.",
        )
    *_, trainer = prepare(recipe, config, read_pairs(recipe, say), say)
    if not isinstance(trainer.reference, CachedReference):
        raise InputError(
            "this recipe's reference is not kept on disk",
            field="reference.mode",
            mend="Set it to cached; a loss that looks at no reference, or at whole distributions, has none.",
        )
    return _fill(trainer, say)


def _track(
    recipe: Recipe,
    trainer: PreferenceTrainer,
    tokenizer: PreTrainedTokenizerBase,
    samples: Samples,
    folder: Path,
    say: Say,
) -> SampleTracker:
    return SampleTracker(
        samples,
        policy=lambda: plain_policy(trainer),
        tokenizer=tokenizer,
        load_reference=lambda: load_start(recipe)[0].to(trainer.args.device).eval(),  # type: ignore[arg-type]
        folder=folder,
        log=trainer.log,
        cost=lambda: _cost(trainer),
        pause=trainer.clock_stopped,
        say=say,
        together=lambda: trainer.is_fsdp_enabled,
    )


def plain_policy(trainer: Any) -> Any:
    """A trainer's policy as it is saved: without wrappers, and in the precision of its weights.

    In bf16 the same weights give other figures than a reference in fp32. accelerate puts autocast into the
    model, and `unwrap_model` takes it away for good, from training too: hence another object on the weights.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if "_original_forward" not in vars(model):
        return model
    plain = copy.copy(model)
    plain.forward = vars(plain).pop("_original_forward")
    return plain


def _cost(trainer: PreferenceTrainer) -> dict[str, float]:
    """Seconds of training so far, and tokens through the policy or, before and beside it, the reference."""
    cost = trainer.cost()
    if isinstance(trainer.reference, CachedReference):
        return cost | {"tokens": cost["tokens"] + sum(ranks.gather(trainer.filled.tokens))}
    forwards = 1 if isinstance(trainer.reference, NoReference) else 2
    return cost | {"tokens": cost["tokens"] * forwards}


def _fill(trainer: PreferenceTrainer, say: Say) -> dict[str, Any]:
    if not isinstance(trainer.reference, CachedReference):
        return {}
    trainer.fill_reference()
    filled = trainer.filled
    computed, tokens = (sum(ranks.gather(count)) for count in (filled.computed, filled.tokens))
    say(f"reference: {computed} sequences computed in {filled.seconds:.1f} s, the others were known")
    return {
        "reference_computed": computed,
        "reference_runtime": filled.seconds,
        "reference_tokens": tokens,
    }


def _train(trainer: PreferenceTrainer, checkpoint: Path | None, say: Say) -> dict[str, Any]:
    if trainer.eval_dataset is not None and checkpoint is None:
        # The first point of the held-out curves: the policy before it was trained.
        trainer.evaluate()
    say("training on the pairs")
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    runtime = trainer.train_seconds
    return {
        "train_runtime": runtime,
        "train_loss": float(result.metrics["train_loss"]),
        "steps": trainer.state.global_step,
        "pairs_per_second": trainer.pairs_seen / runtime,
        "tokens": int(_cost(trainer)["tokens"]),
        "tokens_saved_share": trainer.tokens_saved_share,
        "layout": trainer.layout,
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
    }
