"""What a tokenizer makes of data, on rows small enough to count by hand, and on real HH."""

import json
from pathlib import Path

import pytest
from pair_files import write
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_kit.audit.inspection import inspect_pairs
from dpo_kit.errors import InputError
from dpo_kit.tokenizer import train_byte_level_bpe

DATA = Path(__file__).parents[2] / "shared/data"
HH, GPT2 = DATA / "hh-rlhf/harmless-base/test.jsonl.gz", DATA / "gpt2-tokenizer"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def bytewise():
    """One token for each byte: lengths are counted by hand."""
    return train_byte_level_bpe([], 258)


@pytest.fixture(scope="module")
def chat():
    """Byte by byte too, with ChatML's two tokens."""
    tokenizer = train_byte_level_bpe([], 258)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHATML
    return tokenizer


def row(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def messages(prompt, chosen, rejected):
    reply = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return row([{"role": "user", "content": prompt}], *reply)


def findings(audit):
    # Of the checks that are looked at here.
    return {finding.name: finding for finding in audit.findings}


def test_lengths_by_hand(tmp_path, bytewise):
    one = write(tmp_path / "a.jsonl", row("ab", "cdef", "g"), row("abcd", "efg", "hij"))
    two = write(tmp_path / "b.jsonl", row("x" * 600, "y" * 500, "z"))
    audit = inspect_pairs([one, two], tokenizer=bytewise, max_length=1024)
    tokens = audit.figures["tokens"]
    # Each reply has one token more, its end.
    by_source = tokens["by_source"][str(one)]
    assert (by_source["prompt"]["5"], by_source["prompt"]["max"]) == (2, 4)
    assert (by_source["chosen"]["5"], by_source["chosen"]["max"]) == (4, 5)
    assert (by_source["rejected"]["5"], by_source["rejected"]["max"]) == (2, 4)
    assert (by_source["whole"]["5"], by_source["whole"]["max"]) == (7, 8)
    assert tokens["lengths"]["whole"]["percentiles"]["50"] == 8
    assert tokens["lengths"]["whole"]["percentiles"]["max"] == 1101
    for part in tokens["lengths"].values():
        histogram = part["histogram"]
        assert sum(histogram["counts"]) == 3
        assert len(histogram["edges"]) == len(histogram["counts"]) + 1
        assert histogram["edges"][-1] > 1101
    # From the median, 8, to what keeps all.
    assert tokens["stay"] == {str(2**power): 2 for power in range(3, 11)} | {"2048": 3}
    assert tokens["policy"]["outcomes"] == {"kept": 2, "overlong": 1}
    assert tokens["bytes_per_token"] == 1.0
    assert tokens["replies"] == {
        "chosen_mean": (5 + 4 + 501) / 3,
        "rejected_mean": (2 + 4 + 2) / 3,
    }
    overlong = findings(audit)["overlong"]
    assert (overlong.count, overlong.severity, overlong.places) == (1, "warning", (f"{two}:1",))
    assert "1 of 3 rows (33.3%) are longer than 1024 tokens" in overlong.sentence
    assert {each.sentence.split(":")[0] for each in audit.findings if each.name == "unfitting_tokenizer"} == {
        str(one),
        str(two),
    }


def test_the_length_policy_is_the_one_of_training(tmp_path, bytewise):
    file = write(tmp_path / "a.jsonl", row("prompt", "a" * 20, "b"), row("p", "q", "r"))
    cut = inspect_pairs(file, tokenizer=bytewise, max_length=10, overlong="cut_completion_right")
    assert cut.figures["tokens"]["policy"]["outcomes"] == {"cut_completion": 1, "kept": 1}
    assert findings(cut)["cut_completion"].severity == "warning"
    assert cut.figures["tokens"]["stay"] == {"8": 1, "10": 1, "16": 1, "32": 2}
    # 6 tokens of prompt, of which the cut replies have 4: "aaaa" and "b" with its end.
    assert cut.figures["cost"]["completions"] == (4 + 2) + (2 + 2)
    with pytest.raises(InputError, match="overlong"):
        inspect_pairs(file, tokenizer=bytewise, overlong="cut")


def test_replies_that_a_cut_makes_equal_are_found(tmp_path, bytewise):
    file = write(tmp_path / "a.jsonl", row("p", "same and so on", "same but other"))
    audit = inspect_pairs(file, tokenizer=bytewise, max_length=5, overlong="cut_completion_right")
    assert findings(audit)["identical_after_tokenisation"].places == (f"{file}:1",)


def test_special_tokens_in_text_are_found_where_the_tokenizer_reads_them(tmp_path, chat):
    file = write(
        tmp_path / "a.jsonl",
        messages("Hi", "Hello", "Bye"),
        messages("Hi <|im_end|> there", "Hello", "Bye"),
        messages("Hi", "Hello<|im_start|>user\nmore<|im_end|>", "Bye"),
        messages("Hi", "<think>so</think>Hello", "<|endoftext|>Bye"),
    )
    audit = inspect_pairs(file, tokenizer=chat)
    found = findings(audit)["control_tokens_in_text"]
    assert found.severity == "error"
    assert found.places == (f"{file}:2", f"{file}:3", f"{file}:4")
    assert "<|im_end|> (prompt 1, chosen 1)" in found.sentence
    assert findings(audit)["added_tokens_in_text"].severity == "note"
    counts = {each["token"]: each for each in audit.figures["tokens"]["special_tokens"]}
    assert counts["<|im_start|>"] == {
        "token": "<|im_start|>",
        "special": True,
        "prompt": 0,
        "chosen": 1,
        "rejected": 0,
    }
    assert counts["<|endoftext|>"]["rejected"] == 1
    assert counts["<think>"] == {
        "token": "<think>",
        "special": False,
        "prompt": 0,
        "chosen": 1,
        "rejected": 0,
    }


def test_what_a_tokenizer_splits_is_no_special_token(tmp_path):
    tokenizer = train_byte_level_bpe([], 258)
    tokenizer.split_special_tokens = True
    file = write(tmp_path / "a.jsonl", row("p", "a<|endoftext|>b", "c"))
    ids = tokenizer("a<|endoftext|>b")["input_ids"]
    audit = inspect_pairs(file, tokenizer=tokenizer)
    assert (tokenizer.eos_token_id in ids) == ("control_tokens_in_text" in findings(audit))
    assert tokenizer.eos_token_id not in ids


def test_a_special_token_that_only_rejected_replies_hold_is_a_warning(tmp_path, bytewise):
    file = write(tmp_path / "a.jsonl", row("p", "a", "b<|endoftext|>c"))
    assert findings(inspect_pairs(file, tokenizer=bytewise))["control_tokens_in_text"].severity == "warning"


def test_opening_and_closing_tokens_are_not_taken_for_data(tmp_path, bytewise):
    file = write(tmp_path / "a.jsonl", row("<|endoftext|>p", "a<|endoftext|>", "b<|endoftext|>\n"))
    audit = inspect_pairs(file, tokenizer=bytewise)
    assert "control_tokens_in_text" not in findings(audit)
    ends = findings(audit)["brings_eos"]
    assert (ends.severity, ends.count) == ("note", 1)
    assert audit.figures["tokens"]["lengths"]["chosen"]["percentiles"]["max"] == 2


def test_replies_that_say_nothing_to_the_model(tmp_path, bytewise):
    file = write(tmp_path / "a.jsonl", row("p", "<|endoftext|>", "b"), row("p", "b", " <|endoftext|> "))
    found = findings(inspect_pairs(file, tokenizer=bytewise))["empty_to_the_model"]
    assert (found.count, found.severity) == (2, "error")
    assert found.places == (f"{file}:1", f"{file}:2")


def test_unknown_tokens_are_counted(tmp_path):
    words = {"<eos>": 0, "<unk>": 1, "a": 2, "b": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    file = write(tmp_path / "a.jsonl", row("a b", "a c c", "b"), row("a", "b", "a"))
    audit = inspect_pairs(file, tokenizer=tokenizer)
    # 2 of (2 + 4 + 2) + (1 + 2 + 2) tokens.
    assert audit.figures["tokens"]["unknown_share"] == pytest.approx(2 / 13)
    found = findings(audit)["unknown_tokens"]
    assert (found.count, found.places) == (1, (f"{file}:1",))


def test_a_row_that_the_template_refuses_is_a_finding_with_its_place(tmp_path, chat):
    chat.chat_template = (
        "{% for m in messages %}{% if loop.index0 and messages[loop.index0 - 1].role == m.role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
    )
    bad = messages("Hi", "Hello", "Bye")
    bad["prompt"] = [{"role": "user", "content": text} for text in ("Hi", "there")]
    good = messages("Hi", "Hello", "Bye")
    file = write(tmp_path / "a.jsonl", good, bad, good)
    audit = inspect_pairs(file, tokenizer=chat)
    chat.chat_template = CHATML
    found = findings(audit)["refused_by_tokenizer"]
    assert (found.severity, found.count, found.of, found.places) == ("error", 1, 3, (f"{file}:2",))
    assert "roles must alternate" in found.sentence
    assert "two turns of one role follow each other" in found.sentence
    assert audit.figures["encoding"] == {"rows": 3, "refused": 1}
    assert audit.figures["tokens"]["rows"] == 2


def test_what_a_template_leaves_out_is_named_without_its_place(tmp_path, chat):
    chat.chat_template = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    with_system = messages("Hi", "Hello", "Bye")
    with_system["prompt"].insert(0, {"role": "system", "content": "Be kind."})
    file = write(tmp_path / "a.jsonl", with_system, messages("Hi", "Hello", "Bye"), with_system)
    audit = inspect_pairs(file, tokenizer=chat)
    chat.chat_template = CHATML
    assert audit.figures["templates"] == {"rows": 3, "dropped": {"prompt[system].content": 2}}
    found = findings(audit)["dropped_by_template"]
    assert (found.severity, found.places) == ("warning", (f"{file}:1", f"{file}:3"))


def test_reasoning_of_a_preferred_reply_that_is_left_out_is_an_error(tmp_path, chat):
    lost = messages("Hi", "Hello", "Bye")
    lost["chosen"][0]["reasoning_content"] = "A greeting."
    file = write(tmp_path / "a.jsonl", messages("Hi", "Hello", "Bye"), lost)
    audit = inspect_pairs(file, tokenizer=chat)
    found = findings(audit)["dropped_by_template"]
    assert (found.severity, found.places) == ("error", (f"{file}:2",))
    assert audit.figures["templates"]["dropped"] == {"chosen[].reasoning_content": 1}
    # A run stops at the row; it is told of once.
    assert audit.figures["encoding"]["refused"] == 1
    assert "refused_by_tokenizer" not in findings(audit)


def test_an_advice_names_another_policy_than_the_one_that_is_set(tmp_path, bytewise):
    file = write(tmp_path / "a.jsonl", row("prompt", "a" * 20, "b"), row("p", "q", "r"))
    dropped = inspect_pairs(file, tokenizer=bytewise, max_length=10)
    assert "cut_prompt_left" in findings(dropped)["overlong"].advice
    cut = inspect_pairs(file, tokenizer=bytewise, max_length=10, overlong="cut_prompt_left")
    assert "cut" not in findings(cut)["overlong"].advice


def test_arguments_of_tool_calls_are_one_part_whatever_they_are_called(tmp_path, chat):
    rows = [messages("Hi", "Hello", "Bye") for _ in range(3)]
    for i, each in enumerate(rows):
        call = {"type": "function", "function": {"name": "look", "arguments": {f"name_{i}": f"value {i}"}}}
        turns = [
            {"role": "assistant", "content": "So", "tool_calls": [call]},
            {"role": "user", "content": "?"},
        ]
        each["prompt"] += turns
    audit = inspect_pairs(write(tmp_path / "a.jsonl", *rows), tokenizer=chat)
    assert audit.figures["templates"]["dropped"] == {
        "prompt[].tool_calls[].function.name": 3,
        "prompt[].tool_calls[].function.arguments": 3,
    }


def test_tools_that_a_template_ignores(tmp_path, chat):
    tools = [{"type": "function", "function": {"name": "look", "description": "Looks it up"}}]
    file = write(tmp_path / "a.jsonl", {**messages("Hi", "Hello", "Bye"), "tools": tools})
    audit = inspect_pairs(file, tokenizer=chat)
    assert set(audit.figures["templates"]["dropped"]) == {
        "tools[].function.name",
        "tools[].function.description",
    }


def test_unpaired_rows_and_lists_have_their_sides(tmp_path, bytewise):
    unpaired = [
        {"prompt": "p", "completion": "good", "label": True},
        {"prompt": "q", "completion": "bad one", "label": False},
    ]
    audit = inspect_pairs(write(tmp_path / "u.jsonl", *unpaired), tokenizer=bytewise)
    lengths = audit.figures["tokens"]["lengths"]
    assert lengths["chosen"]["percentiles"]["max"] == 5
    assert lengths["rejected"]["percentiles"]["max"] == 8
    ranked = {"prompt": "p", "completions": ["aaa", "b", "cc"], "scores": [0.0, 2.0, 1.0]}
    audit = inspect_pairs(write(tmp_path / "l.jsonl", ranked), tokenizer=bytewise, shape="lists")
    lengths = audit.figures["tokens"]["lengths"]
    assert lengths["chosen"]["percentiles"]["max"] == 2
    assert lengths["rejected"]["percentiles"]["5"] == 3
    assert lengths["whole"]["percentiles"]["max"] == 5


def test_without_a_tokenizer_there_are_no_figures_of_tokens(tmp_path):
    audit = inspect_pairs(write(tmp_path / "a.jsonl", row("p", "a", "b")))
    assert not {"encoding", "tokens", "templates", "cost"} & set(audit.figures)


def test_held_out_rows_are_not_counted(tmp_path, bytewise):
    train = write(tmp_path / "a.jsonl", row("p", "a", "b"))
    held_out = write(tmp_path / "b.jsonl", row("p", "long" * 9, "b"))
    audit = inspect_pairs(train, held_out=held_out, tokenizer=bytewise)
    assert audit.figures["tokens"]["rows"] == audit.figures["cost"]["rows"] == 1
    assert list(audit.figures["tokens"]["by_source"]) == [str(train)]


@pytest.mark.skipif(
    not (HH.exists() and GPT2.exists()), reason="HH or GPT-2's vocabulary is not in ../shared/data"
)
@pytest.mark.slow
def test_hh_in_gpt2s_vocabulary():
    audit = inspect_pairs(HH, tokenizer=GPT2)
    tokens = audit.figures["tokens"]
    assert tokens["rows"] == 2303
    assert tokens["policy"]["outcomes"] == {"kept": 2303}
    assert tokens["stay"]["512"] == 2225
    # English prose in a vocabulary made of it.
    assert 4 < tokens["bytes_per_token"] < 4.5
    assert "unfitting_tokenizer" not in findings(audit)
    json.dumps(audit.to_dict())
    cost = audit.figures["cost"]
    # DESIGN, section 4: 1.62, which counts no end tokens.
    ends = 2 * 2303
    in_file = cost["separate"] * (1 - cost["orders"]["file"])
    assert (cost["separate"] - ends) / (in_file - ends) == pytest.approx(1.62, abs=0.005)
    # No prompt has more than a few rows: the order hardly matters.
    assert cost["saved_share"] == pytest.approx(cost["orders"]["file"], abs=0.03)
    # DESIGN has 4.1 of padded batches of 8.
    assert cost["padded"] / cost["distinct"] == pytest.approx(4.1, abs=0.2)
