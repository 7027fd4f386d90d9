"""Carry a recipe out: load, train, evaluate, report. What is left is the run folder.

recipe.yaml environment.json metrics.jsonl summary.json samples.jsonl checkpoints/ model/
report.html plots/, and sft/ where the policy was made from a corpus
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_kit.checkpoints import newest_checkpoint
from dpo_kit.config import PreferenceConfig
from dpo_kit.errors import DpoKitWarning, InputError
from dpo_kit.losses import make_objective
from dpo_kit.measurement import Samples, SampleTracker, Say, held_out_figures, sample_figures
from dpo_kit.models import check_length, embedded_tokens, load_model, load_reward_model
from dpo_kit.pairs import load_with_report
from dpo_kit.recipe import Recipe
from dpo_kit.reference import CachedReference, NoReference
from dpo_kit.run_folder import (
    check_same_run,
    describe_environment,
    digest_recipe,
    is_finished,
    make_room,
    peak_memory_bytes,
    replace_folder,
    write_text,
)
from dpo_kit.start import check_start, is_made, make_start, started
from dpo_kit.tokenization import TokenizedPairs, longest_sequence, tokenize_pairs
from dpo_kit.tokenizer import load_tokenizer
from dpo_kit.trainer import PreferenceTrainer


@dataclass
class RunResult:
    """What a run came to.

    Attributes:
        folder: the run folder.
        summary: what summary.json holds.
        page: the report, where one was made.
    """

    folder: Path
    summary: dict[str, Any]
    page: Path | None = None


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
    folder = Path(str(config.output_dir))
    resolved = recipe.resolved(config)
    if resume and (finished := finished_run(folder, resolved, say)):
        return finished
    # What can be wrong with the input is found before an earlier run is put aside and anything written.
    check_start(recipe)
    samples = Samples.of(recipe)
    rows = {split: read_pairs_of(recipe, split, say) for split in ("train", "eval")}
    figures: dict[str, Any] = {}
    if started(recipe, folder) is recipe:
        parts = prepare(recipe, config, rows, say, samples)
        open_folder(folder, resume, say)
    else:
        open_folder(folder, resume, say)
        figures |= make_start(recipe, folder, say)
        recipe, made_pairs = started(recipe, folder), recipe.candidates is not None
        if made_pairs:
            samples = Samples.of(recipe)
            rows = {split: read_pairs_of(recipe, split, say) for split in ("train", "eval")}
        parts = prepare(recipe, config, rows, say, samples)
    policy, tokenizer, data, trainer = parts
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
    figures |= sample_figures(folder, trainer.state.global_step)
    return close_run(recipe, folder, resolved, figures, trainer.save_model, say)


def finished_run(folder: Path, resolved: dict[str, Any], say: Say) -> RunResult | None:
    """What a resume finds done already: all of the run, or nothing.

    Raises:
        InputError: the folder holds a run of another recipe, or no run.
    """
    check_same_run(folder, resolved)
    if not is_finished(folder, resolved):
        return None
    say(f"the run in {folder} is finished")
    page = folder / "report.html"
    summary = json.loads((folder / "summary.json").read_text())
    return RunResult(folder, summary, page if page.exists() else None)


def write_origin(
    folder: Path,
    resolved: dict[str, Any],
    config: PreferenceConfig,
    policy: PreTrainedModel,
    data: dict[str, Dataset | None],
) -> dict[str, Any]:
    """Write recipe.yaml and environment.json, what the run is made from, and in; what the latter holds."""
    write_text(folder / "recipe.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
    environment = describe_environment(config, policy, data)
    write_text(folder / "environment.json", json.dumps(environment, indent=2))
    return environment


def close_run(
    recipe: Recipe,
    folder: Path,
    resolved: dict[str, Any],
    figures: dict[str, Any],
    save_model: Callable[[str], None],
    say: Say,
) -> RunResult:
    """model/, summary.json with the figures, and the report: what makes a run whole."""
    written = folder / ".model.writing"
    save_model(str(written))
    replace_folder(written, folder / "model")
    figures["recipe"] = digest_recipe(resolved)
    write_text(folder / "summary.json", json.dumps(figures, indent=2))
    return RunResult(folder, figures, _report(recipe, folder, say))


def open_folder(folder: Path, resume: bool, say: Say) -> None:
    """The run folder, without what an earlier run left there unless this one goes on from it."""
    try:
        if not resume and (moved := make_room(folder)):
            say(f"the earlier run in {folder} is now {moved}")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(str(error.strerror), file=folder, field="train.output_dir") from error


def prepare(
    recipe: Recipe,
    config: PreferenceConfig,
    rows: dict[str, Dataset | None],
    say: Say,
    samples: Samples | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, TokenizedPairs | None], PreferenceTrainer]:
    """Policy, tokenizer, tokenised data and trainer, checked against each other."""
    policy, tokenizer = load_start(recipe, say)
    data = {split: _tokenize(recipe, found, tokenizer, say) for split, found in rows.items()}
    longest = max(longest_sequence(found.dataset)[0] for found in data.values() if found is not None)
    check_length(policy, config.max_length, longest)
    if samples is not None:
        samples.check_lengths(policy, tokenizer)
    return policy, tokenizer, data, _make_trainer(recipe, config, policy, tokenizer, data)


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
    tokenizer = load_tokenizer(str(recipe.model.tokenizer or recipe.model.path))
    source = recipe.model.path or recipe.model.config
    assert source is not None
    dtype, seed = getattr(torch, recipe.model.dtype), int(recipe.train.get("seed", 42))
    if make_objective(recipe.loss).needs_rewards:
        policy, about = load_reward_model(source, dtype, seed)
        if about:
            say(about)
    else:
        policy = load_model(source, dtype, seed)
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
    """peft's configuration of the policy's adapter; None where it has none."""
    if recipe.model.lora is None:
        return None
    from peft import LoraConfig

    try:
        task = "SEQ_CLS" if make_objective(recipe.loss).needs_rewards else "CAUSAL_LM"
        return LoraConfig(**({"task_type": task} | recipe.model.lora))
    except (TypeError, ValueError) as error:
        raise InputError(str(error), field="model.lora") from error


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
        field = "train or model.lora" if lora else "train"
        raise InputError(str(error).strip().splitlines()[0], field=field) from error


def fill_cache(recipe: Recipe, *, say: Say = print) -> dict[str, Any]:
    """Compute what the cached reference of a recipe lacks; nothing is trained. Ranks share the work.

    Returns:
        reference_computed, the sequences that this process computed, and reference_runtime, seconds.

    Raises:
        InputError: data, model and recipe do not fit together, or the recipe's reference is not cached.
    """
    config = recipe.training_config()
    folder = Path(str(config.output_dir))
    recipe, whole = started(recipe, folder), recipe
    if recipe is not whole and not is_made(whole, folder):
        raise InputError(
            "what the run starts from is made by the run, and is not there yet",
            file=folder,
            mend="Train once: dpo-kit train fills the cache as well.",
        )
    rows = {split: read_pairs_of(recipe, split, say) for split in ("train", "eval")}
    *_, trainer = prepare(recipe, config, rows, say)
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
        return cost | {"tokens": cost["tokens"] + trainer.filled.tokens}
    forwards = 1 if isinstance(trainer.reference, NoReference) else 2
    return cost | {"tokens": cost["tokens"] * forwards}


def _fill(trainer: PreferenceTrainer, say: Say) -> dict[str, Any]:
    if not isinstance(trainer.reference, CachedReference):
        return {}
    trainer.fill_reference()
    filled = trainer.filled
    say(f"reference: {filled.computed} sequences computed in {filled.seconds:.1f} s, the others were known")
    return {
        "reference_computed": filled.computed,
        "reference_runtime": filled.seconds,
        "reference_tokens": filled.tokens,
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


def _report(recipe: Recipe, folder: Path, say: Say) -> Path | None:
    if not recipe.report.enabled:
        return None
    from dpo_kit.report import write_report

    try:
        return write_report(folder)
    except InputError as error:
        # The run itself is whole; a picture library that is not there must not turn it into a failure.
        warnings.warn(f"no report was made: {error}", DpoKitWarning, stacklevel=2)
        return None
