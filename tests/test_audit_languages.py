"""Scripts are counted, languages guessed, and replies in another one than their prompt found."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from audit_rows import TEXT, any_rows, findings, labelled, lines, of_file, pairs, ranked
from hypothesis import given, settings

from dpo_kit.audit.findings import Example
from dpo_kit.audit.languages import Languages
from dpo_kit.audit.scripts import language_of, letters_by_script, script_of_text

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

TEXTS = {
    "English": "How do I get to the station from here? You can take the bus, which is what most of them do.",
    "German": "Wie komme ich von hier zum Bahnhof? Sie können mit dem Bus fahren, und das ist nicht weit.",
    "French": "Comment aller à la gare ? Vous pouvez prendre le bus dans cette rue, ce qui est plus rapide.",
    "Spanish": "¿Cómo se llega a la estación? Puede tomar el autobús, pero no es lo más rápido.",
    "Portuguese": "Você pode ir de ônibus, mas não é o mais rápido; isso depende da hora em uma cidade.",
    "Italian": "Il treno per la città è più comodo, ma anche gli autobus sono lì; non è questo che può.",
    "Dutch": "Hoe kom ik bij het station? Je kan met de bus, maar dat is niet zo snel als een trein.",
    "Swedish": "Hur kommer jag till stationen? Det är inte långt, och du kan också ta en buss från torget.",
    "Polish": "Jak dojść do dworca? To nie jest daleko, ale autobus jest dla mnie przez to lub się spóźnia.",
    "Turkish": "İstasyona nasıl gidilir? Bu çok uzak değil, ama otobüs daha iyi bir yol olarak var ve için.",
    "Indonesian": "Anda bisa naik bus ke stasiun, dan itu tidak jauh dari sini untuk saya yang akan pergi.",
    "Vietnamese": "Tôi có thể đi đến nhà ga bằng xe buýt và không mất nhiều thời gian để về.",
    "Chinese": "请问去火车站怎么走？你可以坐公共汽车。",
    "Japanese": "駅へはどう行けばいいですか。バスに乗ってください。",
    "Korean": "역에 어떻게 가나요? 버스를 타면 됩니다.",
    "Greek": "Πώς πάω στον σταθμό; Μπορείτε να πάρετε το λεωφορείο.",
}


def guess(text: str) -> str | None:
    return language_of(text, script_of_text(letters_by_script(text)))


@pytest.mark.parametrize("language", TEXTS)
def test_languages_are_guessed(language: str) -> None:
    assert guess(TEXTS[language]) == language


@pytest.mark.parametrize(
    "text", ["", "42 + 7 = 49", "Paris", "ok!", "x = [i for i in range(10)]", "你好 hello dear"]
)
def test_too_little_to_guess_by(text: str) -> None:
    assert guess(text) is None


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_letters_are_those_that_unicode_names(text: str) -> None:
    text = text.replace("```", "")
    letters = letters_by_script(text)
    for script, first in (
        ("Latin", "LATIN"),
        ("Cyrillic", "CYRILLIC"),
        ("Greek", "GREEK"),
        ("Arabic", "ARABIC"),
    ):
        named = [c for c in text if c.isalpha() and unicodedata.name(c, "").split(" ")[0] == first]
        wide = [c for c in text if c.isalpha() and unicodedata.name(c, "").startswith("FULLWIDTH LATIN")]
        beyond = [c for c in named if ord(c) > 0xFFFF]
        assert letters.get(script, 0) == len(named) - len(beyond) + (len(wide) if script == "Latin" else 0)


def test_code_says_nothing_of_the_language() -> None:
    text = "这是一个函数：\n```python\n" + "def function(argument):\n    return argument\n" * 20 + "```"
    assert script_of_text(letters_by_script(text)) == "Han"


def test_shares_by_side() -> None:
    check = Languages()
    findings(check, pairs(("abcd", "efgh привет", "你好"), ("", "", "中文好")))
    scripts = check.result().figures["scripts"]
    assert scripts == {
        "prompt": {"Latin": 1.0},
        "chosen": {"Cyrillic": 0.6, "Latin": 0.4},
        "rejected": {"Han": 1.0},
    }


def test_replies_in_another_script_or_language() -> None:
    english, german, chinese = TEXTS["English"], TEXTS["German"], TEXTS["Chinese"]
    fill = [(english, english + "!", english + "?")] * 20
    assert findings(Languages(), pairs(*fill)) == {}
    rows = pairs(
        *fill,
        (english, english, german),
        (english, chinese, english),
        (chinese, german, chinese),
        ("?", german, chinese),
    )
    found = findings(Languages(), rows)
    assert {name: lines(each) for name, each in found.items()} == {
        "other_language": [21],
        "other_script": [22, 23],
    }
    assert found["other_language"].examples[0]["what"] == "prompt English, chosen English, rejected German"
    assert {each.severity for each in found.values()} == {"warning"}
    assert "guess" in found["other_language"].sentence


def test_a_side_that_answers_in_another_language() -> None:
    english, german = TEXTS["English"], TEXTS["German"]
    rows = pairs(*[(english, english + "!", english)] * 60, *[(english, english + "!", german)] * 40)
    sentence = findings(Languages(), rows)["other_language"].sentence
    assert "Rejected replies do so in 40.0%, chosen ones in 0.0%" in sentence
    turned = pairs(*[(english, english + "!", english)] * 60, *[(english, german, english)] * 40)
    assert "training teaches it" in findings(Languages(), turned)["other_language"].sentence


@pytest.mark.parametrize(
    "asked",
    [
        'Translate into French: "This is what most of them would do, and there it is."',
        "What is the word for this in German? I would like to have it from you, please.",
        "Which language is this from, and what can you tell me about the words of it?",
    ],
)
def test_languages_that_were_asked_for(asked: str) -> None:
    rows = pairs(*[(asked, TEXTS["French"], TEXTS["English"] + "!")] * 30)
    assert findings(Languages(), rows) == {}
    rows = pairs(*[(TEXTS["English"], TEXTS["French"], TEXTS["English"] + "!")] * 30)
    assert findings(Languages(), rows)["other_language"].severity == "warning"


def test_scripts_that_stand_in_the_prompt() -> None:
    prompt = "Answer with the name of the alternative, one of विकल्प and the other one."
    hindi = "विकल्प मेरा बेटा पैदा हुआ कथन और विकल्प"
    reply = "Which of them is it then, would you say?"
    assert findings(Languages(), pairs((prompt, hindi, reply))) == {}
    assert findings(Languages(), pairs((TEXTS["English"], hindi, reply))).keys() == {"other_script"}


def test_only_the_last_question_counts() -> None:
    english, german = TEXTS["English"], TEXTS["German"]
    messages = [
        {"role": "system", "content": english * 5},
        {"role": "user", "content": german},
    ]
    assert findings(Languages(), pairs((messages, german + "!", german))) == {}
    dialogue = f"\n\nHuman: {english * 3}\n\nAssistant: {english}\n\nHuman: {german}\n\nAssistant:"
    assert findings(Languages(), pairs((dialogue, german + "!", german))) == {}


def test_labelled_replies_and_lists() -> None:
    english, german = TEXTS["English"], TEXTS["German"]
    found = findings(Languages(), [labelled(english, german, False)])
    assert "in 1 undesirable reply" in found["other_language"].sentence
    found = findings(Languages(), [ranked(english, [english, german], [1, 2])])
    assert "completion 2 German" in found["other_language"].examples[0]["what"]


@settings(max_examples=200, deadline=None)
@given(any_rows())
def test_nothing_raises(rows: list[Example]) -> None:
    findings(Languages(), rows)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data of ../shared/data is not here")
def test_real_chinese_and_english() -> None:
    path = DATA / "medicalgpt" / "dpo_zh_500.jsonl"
    check = Languages()
    findings(check, of_file(path))
    figures = check.result().figures
    replies = [json.loads(line)["rejected"] for line in path.read_text(encoding="utf-8").splitlines()]
    han = sum("\u4e00" <= char <= "\u9fff" for reply in replies for char in reply)
    latin = sum(char.isascii() and char.isalpha() for reply in replies for char in reply)
    # Blocks of code are left out of it, which are Latin.
    assert figures["scripts"]["rejected"]["Han"] > han / (han + latin) > 0.8
    assert figures["languages_guessed"]["chosen"]["Chinese"] > 0.9

    check = Languages()
    found = findings(check, of_file(DATA / "llama-factory" / "dpo_en_demo.json"))
    assert check.result().figures["languages_guessed"]["rejected"]["English"] > 0.8
    assert found == {}  # what is in another language was asked for
    check = Languages()
    findings(check, of_file(DATA / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"))
    figures = check.result().figures
    assert figures["languages_in_words"]["chosen"] == "English 100.0%"
    assert figures["languages_guessed"]["chosen"]["unknown"] < 0.25
