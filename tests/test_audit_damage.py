"""Damage planted in texts is found and named; languages, code and formulas are left alone."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from audit_rows import ODD, TEXT, any_rows, findings, labelled, lines, of_file, pairs, ranked
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_kit.audit.code_spans import without_code
from dpo_kit.audit.damage import Damage, damages
from dpo_kit.audit.findings import Example
from dpo_kit.audit.markers import markers_of
from dpo_kit.audit.minhash import words_of
from dpo_kit.audit.openings import openings_of
from dpo_kit.audit.scripts import language_of, letters_by_script, script_of_text

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# Texts of many languages, with what could be taken for damage.
HONEST = [
    "« Ça a été créé à l’époque… », dit-elle : « CAFÉ » – déjà vu, naïve, œuvre, Noël, à\u00a0» é\u00a0».",
    "AU CAFÉ… «LE CAFÉ» “CAFÉ” NÃO! MAÇÃ… “AMANHÃ” ÂNGULO Â, PÂTÉ»",
    "Tiếng Việt: Ấn Độ, Ân huệ, Âu Cơ, Đường “Ân”, Trần Hưng Đạo; Â là một chữ cái.",
    "Über größere Straßen; „Äpfel“ sind süß. ÄÖÜ»  ÅRSMØTE… Ægir, þorn, Ðað, ñandú, Ñ, Õun",
    "Привет, «мир»! Как дела — хорошо?",
    "你好，世界。こんにちは、世界。안녕하세요.",
    "مرحبا بالعالم\u200f! شُكْرًا जय हिन्द क्\u200dष עִבְרִית",
    "👨\u200d👩\u200d👧 ❤\ufe0f 20 °C, ½ × 3 µm, §5, £3, €4™ – “quoted” ‘so’…",
]
CODE = [
    r"Use `print('a\nb')` or ```python" "\n" r"print('\u00e9\n\n', '&amp;<br>')" "\n``` here.",
    r"The gradient $\nabla f \neq \theta$, \(\tau \times \nu\), \[ \text{if } \not= \]",
    r"C:\temp\new\table and D:\notes; \textbf{bold}, \newline, \noindent, \tfrac12",
    r'System.out.println("Hello\n"); printf("%d\t%s\n", a, b); re.sub(r"[\n\t]+", "\n")',
    r"Use the \n escape to break the line, and \t for a tab.",
    r"The file is C:\Users\Tom\n1 or D:\new\Tables\n2 and \\host\tmp\Table.",
    r"Print one\nline of it, which is a mention.",
    "One escape\\nhere, two\\nhere,\nand line ends\nwhere they\nbelong.",
    "Is a < b && c > d? AT&T; x<y> List<String> R&D <think>why</think>",
    "<!DOCTYPE html>\n<html><body><p>Hi &amp; bye<br></p></body></html>",
]


def names(text: str) -> list[str]:
    return [name for name, _, _ in damages(text)]


@pytest.mark.parametrize("text", [*HONEST, *CODE])
def test_honest_texts_are_not_accused(text: str) -> None:
    assert names(text) == []


@pytest.mark.parametrize("text", HONEST[:6])
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_the_same_texts_read_wrongly(text: str, encoding: str) -> None:
    raw = text.encode("utf-8")
    # Bytes that cp1252 does not know are read as Latin-1 by the programs that do this.
    wrong = "".join(
        bytes([byte]).decode(encoding, "ignore") or bytes([byte]).decode("latin-1") for byte in raw
    )
    assert "mojibake" in names(wrong)


@pytest.mark.parametrize(
    ("text", "name", "what"),
    [
        ("a lost \ufffd character", "replacement_characters", "U+FFFD REPLACEMENT CHARACTER"),
        ("don\u00e2\u20ac\u2122t", "mojibake", "\u00e2\u20ac\u2122 for \u2019"),
        ("caf\u00c3\u00a9", "mojibake", "\u00c3\u00a9 for \u00e9"),
        ("20\u00c2\u00a0\u00c2\u00b0C", "mojibake", "\u00c2\u00a0\u00c2\u00b0 for \u00a0\u00b0"),
        ("\u00f0\u0178\u02dc\u20ac", "mojibake", "\u00f0\u0178\u02dc\u20ac for \U0001f600"),
        ("one \ufefftwo", "byte_order_marks", "U+FEFF ZERO WIDTH NO-BREAK SPACE"),
        (r"First.\n\nSecond.", "literal_escapes", r"\n\n"),
        (r"First\n- a\n- b", "literal_escapes", r"\n"),
        (r"The first line\nthe second one\nand one more", "literal_escapes", r"\n"),
        (r"caf\u00e9 au lait", "literal_escapes", r"\u00e9"),
        ("this &amp; that", "html_entities", "&amp;"),
        ("one<br/>two", "html_tags", "<br/>"),
        ('see <a href="x">this</a>', "html_tags", '<a href="x">'),
        ("a\0b", "control_characters", "U+0000"),
        ("a\x1bb", "control_characters", "U+001B"),
        ("a\x9db", "control_characters", "U+009D"),
        ("one\rtwo", "lone_carriage_returns", "U+000D"),
        ("zero\u200bwidth", "unseen_characters", "U+200B ZERO WIDTH SPACE"),
        ("icon \uf04a", "private_characters", "U+F04A"),
        ("cafe\u0301", "marks_apart", "\u00e9 in two characters"),
    ],
)
def test_each_kind_of_damage(text: str, name: str, what: str) -> None:
    assert [(found, sign) for found, sign, _ in damages(text)] == [(name, what)]
    whole = "A long text before it. " * 50 + text
    at = next(at for _, _, at in damages(whole))
    assert whole[at : at + 1] == next(text[i : i + 1] for _, _, i in damages(text))
    shown = findings(Damage(), pairs(("p", whole, "b")))[name].examples[0]
    assert len(shown["chosen"]) <= 302
    assert shown["chosen"].startswith("…")
    assert text[-4:] in shown["chosen"]


def test_ordinary_line_ends_are_no_damage() -> None:
    assert names("one\r\ntwo\n\tthree\r\n") == []


def test_sides_and_severity() -> None:
    clean, bad = "A plain answer", "A \ufffd answer"
    fill = [("p", clean, clean + "!")] * 49
    found = findings(Damage(), pairs(*fill, ("p", bad, clean)))
    assert (found["replacement_characters"].severity, lines(found["replacement_characters"])) == (
        "error",
        [50],
    )
    assert "1 of 50 pairs (2.0%)" in found["replacement_characters"].sentence
    assert found["replacement_characters"].sentence.endswith(": in 1 chosen reply.")
    assert "1 of 50 pairs (2.0%) holds U+FFFD" in found["replacement_characters"].sentence
    rejected = findings(Damage(), pairs(*fill, ("p", clean, bad)))["replacement_characters"]
    assert (rejected.severity, "in 1 rejected reply." in rejected.sentence) == ("note", True)
    prompt = findings(Damage(), pairs(*fill, (bad, clean, clean + "!")))["replacement_characters"]
    assert (prompt.severity, prompt.sentence.endswith("lost a character.")) == ("warning", True)
    few = findings(Damage(), pairs(*fill * 4, ("p", bad, clean)))["replacement_characters"]
    assert few.severity == "warning"
    many = findings(Damage(), pairs(*fill, *[("p", "One<br>two", clean)] * 20))["html_tags"]
    assert many.severity == "warning"
    assert "training teaches it" in many.sentence


def test_escapes_are_no_error() -> None:
    escaped = pairs(*[("p", r"First.\n\nSecond.", "A plain answer")] * 50)
    found = findings(Damage(), escaped)["literal_escapes"]
    assert (found.severity, found.count) == ("warning", 50)


NASTY = [
    *(
        "\\begin{",
        "\\(",
        "\\[",
        "$$ ",
        "$ ",
        "$\n",
        "`` ",
        "` ",
        "`\n",
        "```",
        "\\n",
        "\\n a",
        "x\\na ",
        "\\r",
    ),
    *(
        "\\u00e9 ",
        "a:\\n ",
        "& ",
        "&#1",
        "<p ",
        "<",
        "\u00c3",
        "\u00c3\u00a9",
        "\u00e2",
        "e\u0301",
        "\r",
        "\r\n",
    ),
    *(
        "Human: ",
        "\nHuman:",
        "<|",
        "### ",
        "- ",
        " \t",
        "sorry ",
        "1",
        "the of ",
        "\u4f60",
        "\u0905",
        "\0",
        "\u200b",
    ),
]


@pytest.mark.parametrize("piece", NASTY)
@pytest.mark.parametrize(
    ("length", "end"), [(1_000_000, "a"), (200_000, ""), (200_000, "\\end{"), (200_000, "`")]
)
def test_no_text_takes_long(piece: str, length: int, end: str) -> None:
    text = piece * (length // len(piece)) + end
    started = time.process_time()
    list(damages(text))
    markers_of(text)
    openings_of(text)
    without_code(text)
    letters = letters_by_script(text)
    language_of(text, script_of_text(letters))
    words_of(text)
    assert time.process_time() - started < 4  # an expression that goes back takes minutes


# What a regular expression says of the same, which goes back over a text again and again.
_CODE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\begin\{.*?\\end\{",
    re.DOTALL,
)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["`", "```", "$", "$$", "\\(", "\\)", "\\[", "\\]", "\\begin{", "\\end{", "\n", "a", " "]
        ),
        max_size=14,
    ).map("".join)
)
def test_code_is_taken_out_as_by_an_expression(text: str) -> None:
    expected = _CODE.sub(lambda found: " " * len(found[0]), text)
    # To the expression two dollars without others behind them are an empty formula.
    assert without_code(text).replace("$$", "  ") == expected


def test_what_users_write_in_html_is_theirs() -> None:
    assert findings(Damage(), pairs(("Fix this: a<br>b &amp; c", "Done", "No"))) == {}


def test_labelled_replies_and_lists() -> None:
    rows = [labelled("p", "a\0b", True, 1), labelled("p", "a\0b", False, 2)]
    assert "1 desirable and 1 undesirable replies" in findings(Damage(), rows)["control_characters"].sentence
    found = findings(Damage(), [ranked("p", ["fine", "a\0b", "good"], [3, 2, 1])])["control_characters"]
    assert found.examples[0]["completion 2"] == "a\0b"


@settings(max_examples=300, deadline=None)
@given(st.one_of(TEXT, ODD))
def test_every_place_is_in_the_text(text: str) -> None:
    for _, what, at in damages(text):
        assert what
        assert 0 <= at < len(text)


@settings(max_examples=200, deadline=None)
@given(any_rows())
def test_nothing_raises(rows: list[Example]) -> None:
    findings(Damage(), rows)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data of ../shared/data is not here")
def test_real_chinese_and_english() -> None:
    path = DATA / "medicalgpt" / "dpo_zh_500.jsonl"
    lost = {"prompt": [], "chosen": [], "rejected": []}
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(text)
        for side, value in (("prompt", row["conversations"]), *((s, row[s]) for s in ("chosen", "rejected"))):
            if "\ufffd" in json.dumps(value, ensure_ascii=False):
                lost[side].append(line)
    found = findings(Damage(), of_file(path))
    assert lines(found["replacement_characters"]) == sorted(
        {*lost["prompt"], *lost["chosen"], *lost["rejected"]}
    )
    assert (found["replacement_characters"].count, found["replacement_characters"].severity) == (13, "error")
    assert "in 2 prompts, 9 chosen and 2 rejected replies" in found["replacement_characters"].sentence
    assert [len(each) for each in lost.values()] == [2, 9, 2]
    assert "mojibake" not in found

    path = DATA / "llama-factory" / "dpo_en_demo.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    marked = [i for i, row in enumerate(rows, 1) if "\ufeff" in json.dumps(row, ensure_ascii=False)]
    found = findings(Damage(), of_file(path))
    places = found["byte_order_marks"].places
    assert [int(place.rpartition("row ")[2].rstrip(")")) for place in places] == marked == [68]
    assert [place.rpartition("row ")[2] for place in found["mojibake"].places] == ["16)"]
