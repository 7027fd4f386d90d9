"""The sections of a recipe: every key typed, documented, with its default; `recipe.py` has the whole."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, field_validator

from dpo_kit.adapter_folders import base_of
from dpo_kit.adapters import check_one_adapter
from dpo_kit.pairs import LoadOptions
from dpo_kit.tokenizer import has_tokenizer

SourceList = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""Sources of rows or texts; one may stand alone."""


class Section(BaseModel):
    """A part of a recipe; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """The policy to start from: `path` or `config`, one of the two."""

    path: str | None = Field(None, description="folder or hub id of a causal LM")
    config: dict[str, Any] | None = Field(None, description="configuration with model_type: random weights")
    tokenizer: str | None = Field(None, description="folder or hub id; default: beside the model")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="of the weights"
    )
    lora: dict[str, Any] | None = Field(None, description="fields of peft's LoraConfig")
    peft: dict[str, Any] | None = Field(
        None, description="another kind of adapter: peft_type and the fields of its configuration in peft"
    )
    adapter: str | None = Field(None, description="folder of an adapter to train further")
    quantization: Literal["4bit", "8bit"] | dict[str, Any] | None = Field(
        None,
        description="of the frozen base below an adapter: 4bit (nf4, double), 8bit (LLM.int8), or fields of "
        "transformers' BitsAndBytesConfig",
    )
    trust_remote_code: bool = Field(
        False, description="run the code that the model's own folder or hub repository brings"
    )


def with_base(section: ModelSection, has_sft: bool) -> ModelSection:
    """The section that says where an adapter that is trained further has its base model and tokenizer.

    Args:
        section: as it was read.
        has_sft: whether the recipe trains the base model first.

    Raises:
        InputError: more than one adapter, one on a base that SFT would change, or one without its base.
    """
    check_one_adapter(section.model_dump(), has_sft=has_sft)
    if section.adapter is None:
        return section
    found: dict[str, Any] = {}
    if section.path is None and section.config is None:
        found["path"] = base_of(section.adapter)
    if section.tokenizer is None and has_tokenizer(section.adapter):
        found["tokenizer"] = section.adapter
    return section.model_copy(update=found)


class ReferenceSection(Section):
    """The frozen model that the policy is compared with."""

    mode: Literal["auto", "live", "adapter_off", "adapter", "cached", "moving", "none"] = Field(
        "auto", description="auto: cached where the loss allows it, none where it needs no reference"
    )
    path: str | None = Field(None, description="default: the policy as it was before the first step")
    cache_dir: str | None = Field(None, description="default $DPO_KIT_CACHE or ~/.cache/dpo_kit")
    adapter: str | None = Field(None, description="mode adapter: its folder, or its name in the policy")
    update_every: int = Field(512, ge=1, description="mode moving (TR-DPO): steps between two updates")
    update_weight: float = Field(0.6, gt=0, le=1, description="of the policy in an update; 1 replaces")


# Each of the options of loading is a key of `data`, with its own words, so that it is written in one place.
_LoadSection = create_model(
    "_LoadSection",
    __base__=Section,
    **{
        option.name: (
            typing.get_type_hints(LoadOptions)[option.name],
            Field(option.default, description=option.metadata["help"]),
        )
        for option in dataclasses.fields(LoadOptions)
    },  # type: ignore[call-overload]
)


class DataSection(_LoadSection):
    """Preference data, how it is loaded (`LoadOptions`) and how it becomes tokens."""

    train: SourceList = Field(
        default_factory=list, description="files, folders, globs, hf://owner/name@split"
    )
    eval: SourceList = Field(default_factory=list, description="held-out pairs")
    max_length: int | None = Field(1024, ge=2, description="prompt + reply, in tokens")
    overlong: Literal["drop", "cut_prompt_left", "cut_completion_right"] = Field(
        "drop", description="beyond it"
    )
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="for the chat template")
    num_proc: int | None = Field(None, ge=1, description="processes that tokenise")
    cache_dir: str | None = Field(
        None, description="of token ids; default $DPO_KIT_CACHE or ~/.cache/dpo_kit"
    )


class SftSection(Section):
    """Supervised training of the policy on plain text before the preferences.

    From `model.path`, or from `model.config` with a tokenizer that is learned on the corpus.
    """

    corpus: SourceList = Field(description="text files, one document a line; or sources with a field text")
    documents: int | None = Field(None, ge=1, description="the first so many; default: all")
    vocabulary: int = Field(1024, ge=300, description="of the byte-level BPE learned for a model.config")
    max_length: int = Field(128, ge=2, description="tokens; a longer document is cut, and counted")
    train: dict[str, Any] = Field(default_factory=dict, description="as the section train")


class EvalSection(Section):
    """What is measured beside the held-out pairs: samples on held-out prompts."""

    prompts: str | None = Field(None, description="jsonl with a field prompt; none: nothing is sampled")
    max_prompts: int | None = Field(None, ge=1, description="the first so many")
    samples: int = Field(1, ge=1, description="replies per prompt")
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(1.0, ge=0, description="0: greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    batch_size: int = Field(64, ge=1, description="prompts generated at once")
    reward: str | None = Field(
        None, description="the true reward: FILE.py:FUNCTION, classifier:MODEL[@LABEL] or model:REWARD_MODEL"
    )
    every: int = Field(
        0, ge=0, description="steps between two such measurements in training; 0: before and after"
    )
    seed: int = 0


class CandidatesSection(Section):
    """Pairs made by the policy itself, in place of `data.train`: sampled after SFT, labelled by a reward.

    As in the controlled experiment of the DPO paper (arXiv 2305.18290, section 6.1): all pairs of the
    replies to a prompt, and further prompts, none of them used for pairs, to evaluate on.
    """

    source: SourceList = Field(description="text files, or sources with a field prompt, or text")
    prefix_tokens: tuple[int, int] | None = Field(
        None, description="[least, most]: prompts are the first tokens of each text; default: whole prompts"
    )
    prompts: int = Field(1000, ge=1, description="distinct prompts for training pairs")
    held_out: int = Field(100, ge=0, description="further ones for held-out pairs")
    evaluation: int = Field(200, ge=0, description="further ones to sample on, where eval.prompts is null")
    per_prompt: int = Field(4, ge=2, description="replies to each")
    max_new_tokens: int | None = Field(None, ge=1, description="default: that of eval")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    batch_size: int = Field(64, ge=1, description="prompts generated at once")
    reward: str | None = Field(None, description="what labels the pairs; default: that of eval")
    labels: Literal["best", "bradley_terry"] = Field(
        "best", description="the better reply is chosen; or with probability sigmoid(difference of rewards)"
    )
    seed: int = 0


class RewardModelSection(Section):
    """The reward model that PPO and Best-of-N learn from the pairs; starts as the policy does."""

    path: str | None = Field(None, description="folder of one that is trained already")
    loss: Any = Field(default_factory=lambda: {"name": "bradley_terry"}, description="as the section loss")
    train: dict[str, Any] = Field(default_factory=dict, description="as the section train")


class PpoSection(Section):
    """PPO through TRL, on the prompts of the pairs (`dpo-kit ppo`).

    RLOO, a method of the comparison, reads `output_dir`, `reward` and `settings` of it.
    """

    output_dir: str | None = Field(None, description="run folder; default: that of train, with -ppo")
    reward: str = Field(
        "model", description="model: learned from the pairs; true: that of eval; or as eval.reward is written"
    )
    value: Literal["auto", "reward_model", "policy"] = Field(
        "auto",
        description="what the value model starts as: the reward model, or the policy with a value of 0; "
        "auto: the reward model where the reward is learned",
    )
    normalise: bool = Field(
        True, description="reward minus its mean over the first policy's samples, over their deviation"
    )
    target_kl: float | None = Field(
        None, gt=0, description="sequence KL that an adaptive kl_coef steers to; null: kl_coef stays"
    )
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="fields of TRL's PPOConfig; for RLOO those of its RLOOConfig",
    )


class BestOfNSection(Section):
    """Best-of-N: of N replies of the policy, the one that the learned reward likes best."""

    n: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, 128],
        min_length=1,
        description="the values of N; as many replies as the largest are drawn for each prompt",
    )


class MethodSection(Section):
    """One method of the comparison: a run for each value swept and each seed."""

    command: Literal["train", "ppo", "rloo", "best_of_n"] = "train"
    label: str = Field(description="its name in pictures and tables")
    set: dict[str, Any] = Field(default_factory=dict, description="dotted keys of the recipe -> values")
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict, description="a dotted key -> the values it takes in turn"
    )
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1, description="train.seed of its runs")


class FrontierSection(Section):
    """The comparison (`dpo-kit frontier`): every method from the same start, pairs and prompts."""

    output_dir: str | None = Field(None, description="folder; default: that of train, with -frontier")
    methods: dict[str, MethodSection] = Field(min_length=1)
    kl_levels: list[Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: [2.0, 5.0, 10.0, 15.0],
        min_length=1,
        description="at which rewards are compared, nats",
    )
    workers: int | None = Field(
        None, ge=1, description="runs at once, a share of the cores each; default: half the cores, or 2"
    )
    quick: dict[str, Any] = Field(default_factory=dict, description="dotted keys -> values of the quick form")

    @field_validator("methods")
    @classmethod
    def _keys_name_folders(cls, methods: dict[str, MethodSection]) -> dict[str, MethodSection]:
        """A method's key begins the names of its runs' folders, and stands in tables beside shared work."""
        shared = ("sft", "candidates", "reward_model", "reference")
        for name in methods:
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
                raise ValueError(f"{name!r} is no key of a method: letters, digits, _ . - and no other sign")
            if name in shared:
                raise ValueError(f"'{name}' is what the tables call shared work: name the method otherwise")
        return methods


class ReportSection(Section):
    """The page and pictures at the end of a run."""

    enabled: bool = True
