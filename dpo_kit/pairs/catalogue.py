"""Well-known public preference sets: where they are, their licence, shape and paper. Loads nothing.

Comparisons are those of table 6 of the Llama 2 paper (arXiv:2307.09288), where the set stands in it. They are
Meta's count, and no file here has just so many rows (the table itself adds up to 1,577 more than its total).
Licences and splits are as the sets' own pages gave them; look there before you rely on them.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from typing import Any

from dpo_kit.errors import InputError


@dataclass(frozen=True, slots=True)
class PublicSet:
    """One public set.

    Attributes:
        name: as a SOURCE: `name`, or `name@split`.
        hub: `owner/name[/config][#folder]` on the hub, or `owner/name#file`.
        split: the one that `name` alone means; empty where `hub` names a file.
        licence: as its page says; `unstated` where it says nothing.
        format: of its rows, a key of `formats.FORMATS`.
        kind: of its rows: pairs, unpaired, lists or scored.
        citation: the paper or page.
        about: one line.
        comparisons: in table 6 of the Llama 2 paper; None where it does not stand there.
    """

    name: str
    hub: str
    split: str
    licence: str
    format: str
    kind: str
    citation: str
    about: str
    comparisons: int | None = None

    @property
    def source(self) -> str:
        """The SOURCE that `name` alone stands for."""
        return self.at(self.split)

    def at(self, split: str) -> str:
        """The SOURCE of one split; raises `InputError` where the set is one file."""
        if not split:
            return f"hf://{self.hub}"
        if not self.split:
            raise InputError(f"'{self.name}' is one file and has no splits", mend=f"Write {self.name}")
        return f"hf://{self.hub}@{split}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return {**asdict(self), "source": self.source}


_HH = "Bai et al. 2022, arXiv:2204.05862"
_ULTRAFEEDBACK = "Cui et al. 2023, arXiv:2310.01377"
_OASST = "Köpf et al. 2023, arXiv:2304.07327"
_SAFE = "Ji et al. 2024, arXiv:2406.15513"

CATALOGUE: tuple[PublicSet, ...] = (
    PublicSet(
        "hh-helpful", "Anthropic/hh-rlhf#helpful-base", "train", "MIT", "hh", "pairs", _HH,
        "Anthropic Helpful: dialogues, the more helpful reply; base tranche (table 6: all three)", 122_387,
    ),
    PublicSet(
        "hh-helpful-online", "Anthropic/hh-rlhf#helpful-online", "train", "MIT", "hh", "pairs", _HH,
        "Anthropic Helpful: the tranche of the iterated online process",
    ),
    PublicSet(
        "hh-helpful-rejection-sampled", "Anthropic/hh-rlhf#helpful-rejection-sampled", "train", "MIT", "hh",
        "pairs", _HH, "Anthropic Helpful: the tranche of best-of-16 against an early preference model",
    ),
    PublicSet(
        "hh-harmless", "Anthropic/hh-rlhf#harmless-base", "train", "MIT", "hh", "pairs", _HH,
        "Anthropic Harmless: dialogues that people tried to lead astray, the less harmful reply", 43_966,
    ),
    PublicSet(
        "openai-summarize", "openai/summarize_from_feedback/comparisons", "train", "CC-BY-4.0",
        "summarize_from_feedback", "pairs", "Stiennon et al. 2020, arXiv:2009.01325",
        "OpenAI Summarize: two summaries of a Reddit post (TL;DR) or a news article", 176_625,
    ),
    PublicSet(
        "openai-webgpt", "openai/webgpt_comparisons", "train", "unstated", "webgpt", "pairs",
        "Nakano et al. 2021, arXiv:2112.09332",
        "OpenAI WebGPT: two long answers with quotes, judged on a scale; ties", 13_333,
    ),
    PublicSet(
        "stackexchange", "HuggingFaceH4/stack-exchange-preferences", "train", "CC-BY-SA-4.0",
        "stack_exchange", "lists", "Lambert et al. 2023; Askell et al. 2021, arXiv:2112.00861",
        "StackExchange: questions with their answers (HTML), scored by upvotes and acceptance", 1_038_480,
    ),
    PublicSet(
        "stanford-shp", "stanfordnlp/SHP", "train", "unstated (Reddit's terms)", "shp", "pairs",
        "Ethayarajh et al. 2022, arXiv:2110.08420",
        "Stanford SHP: two comments on a Reddit post, the later one with more votes", 74_882,
    ),
    PublicSet(
        "synthetic-gptj", "Dahoas/synthetic-instruct-gptj-pairwise", "train", "Apache-2.0",
        "explicit_prompt", "pairs", "Havrilla 2023, huggingface.co/datasets/Dahoas",
        "Synthetic GPT-J: instructions, a text-davinci reply over one of GPT-J", 33_139,
    ),
    PublicSet(
        "stack-exchange-paired", "lvwerra/stack-exchange-paired#data/rl", "train", "CC-BY-SA-4.0",
        "stack_exchange_paired", "pairs", "von Werra et al. 2023, StackLLaMA",
        "pairs made of HuggingFaceH4/stack-exchange-preferences, in Markdown",
    ),
    PublicSet(
        "ultrafeedback", "openbmb/UltraFeedback", "train", "MIT", "ultrafeedback", "lists", _ULTRAFEEDBACK,
        "64k prompts, 4 replies each, judged by GPT-4 overall and in four aspects",
    ),
    PublicSet(
        "ultrafeedback-binarized", "HuggingFaceH4/ultrafeedback_binarized", "train_prefs", "MIT",
        "explicit_prompt", "pairs", f"{_ULTRAFEEDBACK}; Tunstall et al. 2023, arXiv:2310.16944",
        "UltraFeedback's best overall score over a random other one (Zephyr)",
    ),
    PublicSet(
        "helpsteer2", "nvidia/HelpSteer2", "train", "CC-BY-4.0", "helpsteer", "scored",
        "Wang et al. 2024, arXiv:2406.08673", "two replies a prompt, five attributes from 0 to 4 by people",
    ),
    PublicSet(
        "helpsteer2-preference", "nvidia/HelpSteer2#preference", "train", "CC-BY-4.0",
        "helpsteer2_preference", "pairs", "Wang et al. 2024, arXiv:2410.01257",
        "HelpSteer2's replies compared, from -3 to 3; train and validation in one, told by 'split'",
    ),
    PublicSet(
        "pku-saferlhf", "PKU-Alignment/PKU-SafeRLHF", "train", "CC-BY-NC-4.0", "safe_rlhf", "pairs", _SAFE,
        "two replies, which is better and which is safer (judgement: better or safer)",
    ),
    PublicSet(
        "nectar", "berkeley-nest/Nectar", "train", "Apache-2.0 (not to compete with OpenAI)", "nectar",
        "lists", "Zhu et al. 2023, Starling-7B", "183k prompts, 7 replies each, ranked by GPT-4",
    ),
    PublicSet(
        "oasst1", "OpenAssistant/oasst1#2023-04-12_oasst_ready.trees.jsonl.gz", "", "Apache-2.0",
        "oasst_tree", "lists", _OASST, "trees of messages in 35 languages, siblings ranked by volunteers",
    ),
    PublicSet(
        "oasst2", "OpenAssistant/oasst2#2023-11-05_oasst2_ready.trees.jsonl.gz", "", "Apache-2.0",
        "oasst_tree", "lists", _OASST, "the same, with half a year more",
    ),
    PublicSet(
        "orca-dpo", "Intel/orca_dpo_pairs", "train", "Apache-2.0", "orca_dpo", "pairs",
        "Mukherjee et al. 2023, arXiv:2306.02707",
        "OpenOrca prompts, GPT-4's or GPT-3.5's reply over one of Llama-2-13B-chat",
    ),
    PublicSet(
        "chatbot-arena", "lmsys/chatbot_arena_conversations", "train", "CC-BY-4.0 (prompts), CC-BY-NC-4.0",
        "chatbot_arena", "pairs", "Zheng et al. 2023, arXiv:2306.05685",
        "33k conversations with two models, the winner by the user's vote; ties; gated",
    ),
)  # fmt: skip


def find(name: str) -> PublicSet:
    """The set of this name; raises `InputError` with the nearest where there is none."""
    entry = named(name)
    if entry is not None:
        return entry
    near = nearest(name)
    hint = f"Did you mean '{near}'? " if near else ""
    known = ", ".join(each.name for each in CATALOGUE)
    raise InputError(f"no public set '{name}' is known", mend=f"{hint}Known: {known}")


def named(name: str) -> PublicSet | None:
    """The set of this name, upper or lower case; None where there is none."""
    return next((entry for entry in CATALOGUE if entry.name == name.lower()), None)


def nearest(name: str) -> str | None:
    """The name of the catalogue that is most like this one, if any is."""
    near = difflib.get_close_matches(name.lower(), [entry.name for entry in CATALOGUE], n=1, cutoff=0.75)
    return near[0] if near else None
