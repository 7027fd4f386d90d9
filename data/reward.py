"""The small world's ground truth: how favourable a review is, as a plain function of its text.

`reward(text)` needs the standard library only and takes any text, also the broken text that a
language model samples. It knows words, negation, degree, concession and repetition. It knows no
grammar, so it does not punish bad English.

The definition, from the word to the text:

    word    u_i = valence_i * degree_i * (-0.6)^negators_i     valence in {-3, -2, -1, 1, 2, 3}
    clause  c_k = 3 * tanh(sum_i u_i / 3)
    text    M   = sum_k w_k c_k / (2 + sum_k w_k)              over clauses with a counted word
    reward  R   = 4 * tanh(GAIN * M / 4)                       in (-4, 4), 0 for neutral text

- A word is counted where it first stands in the text: repeating it changes nothing.
- degree_i is the factor of the word just before ("very", "slightly"), or 1.
- negators_i are the negators before the word in its clause since the last "and"; so "not without
  charm" is faint praise.
- A sentence is cut into clauses at , ; : ( ) and before "but", "although" and their kind.
  w_k is 1/2 for a clause that concedes: one that "although", "despite" and their kind begin, or
  one that "but" or "yet" turns against later in the sentence. Otherwise w_k is 1.
- M is a mean over the opinions and two silent clauses, so that a second and a third opinion of the
  same kind add less and less, and a longer text has no advantage as such.
"""

from __future__ import annotations

import math
import re

SILENT_CLAUSES = 2.0
GAIN = 5.0
"""Sets the scale: with it, Bradley-Terry labels are wrong for 10 to 20% of the grammar's pairs."""

_LEXICON = {
    3: """adored astonishes astonishing breathtaking brilliant dazzles dazzling delightful excellent exquisite
    flawless gorgeous gripping hilarious loved magical magnificent masterful masterpiece miracle moving
    outstanding perfect poignant powerful spectacular stunning sublime sumptuous superb terrific
    thrilling triumph unforgettable wonderful""",
    2: """admirable admired amazes applauded beautiful captivating charming clever convincing delight delights
    enchants engaging enjoyable enjoyed excels exhilarating fascinates fascinating funny gem great
    haunting heartfelt impressive ingenious inspires joy love lovely luminous memorable passionate
    pleasure radiant recommend recommended remarkable rousing satisfying shines soars sparkles splendid
    stirring success tender thrills touching treasured treat triumphs witty""",
    1: """amuses amusing assured authentic believable better blossoms bold brisk cathartic charm charms
    cheered coherent complex confidence confident crackles craft crisp daring delicate depth deserves
    dynamic earns ease elegance elegant eloquent energy enriches excites fine finer flatters flows fluid
    glows good grace graceful handsome happiness heart honest honesty imagination impresses infectious
    insight intelligent intrigues inventive laughed lavish lifts likeable liked likes lively magnetic
    melodious moves natural nuanced original passion playful pleasing polish precise precision rewards
    richer satisfies seamless sensitive sharp sincere sings skilful smiled smooth stronger subtle
    succeeds surprises surprising sympathetic tasteful taut tenderness truthful vivid warm warmly warmth
    wept wit works worth""",
    -1: """abrupt annoyed artificial awkwardness bland blunders blurry bombast bore careless carelessness
    cartoonish cheap cheapens cheesy childish clumsiness cold coldness confused confuses confusion
    contrived creaks crude cruelty cynicism dated deafening depresses disappointing disappoints disliked
    distracts drab drags dreary drowns endured fake false falters feeble flat flimsy flops flounders
    forced forgettable frowned gaudy gloom grates groaned hammy heavy-handed hurts insincere jars
    jumbled lame laziness lazy leaden letdown loses mean miss mistake monotony muddled murky nonsense
    one-dimensional padding plodding poor poorer pretension rambles regret regretted repetitive rushed
    sags sappy sentimental shaky shallow shrill sighed skip slack sloppy sluggish stale stiff struggles
    stumbles thin timid trite underwritten unearned uneven unfinished unlikeable vanity weak weaker
    withers wobbles yawned""",
    -2: """amateurish anger annoying annoys avoid bad baffling bored boredom bores boring cheats choppy chore
    clumsy collapses dull duller embarrasses exhausting fails fizzles garish hollow implausible
    incoherent intrusive irritates irritating jarring lifeless mawkish mediocre mess messy offends
    preachy predictable pretentious resented shoddy silly spoils stilted tacky tedious tiresome ugly
    unconvincing unfunny uninspired unpleasant wastes wooden worse""",
    -3: """atrocious awful despise despised disaster disgust dismal dreadful failure fiasco hate hated
    horrible incompetent insults laughable loveless lousy pointless ruins terrible tuneless unbearable waste
    wretched""",
}

_VALENCE = {word: grade for grade, words in _LEXICON.items() for word in words.split()}

_NEGATORS = {
    *("not", "never", "no", "hardly", "barely", "scarcely", "seldom", "rarely", "cannot", "without"),
    *("nothing", "nobody", "neither", "nor", "none", "lack", "lacks", "lacking", "little", "less"),
}
_NEGATION = -0.6

_DEGREE_WORDS = {
    1.5: "very truly utterly deeply really remarkably absolutely extremely so too",
    1.25: "more",
    0.6: "rather fairly somewhat quite slightly",
}
_DEGREE = {word: factor for factor, words in _DEGREE_WORDS.items() for word in words.split()}

_SENTENCE = re.compile(r"[.!?\n]+")
_CLAUSE = re.compile(r"[,;:()]|\b(?=(?:but|yet|although|though|while|whereas|despite|for all|even if)\b)")
_CONCEDES = re.compile(r"\s*(?:although|though|while|whereas|despite|for all|even if)\b")
_TURNS = re.compile(r"\s*(?:but|yet)\b")
_WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*")


def reward(text: str) -> float:
    """The true reward of `text`, in (-4, 4): above 0 where the text praises, 0 where it says nothing.

    Defined at the top of this file. Case does not matter, unknown words are neutral.
    """
    counted: set[str] = set()
    total, weight = 0.0, SILENT_CLAUSES
    for sentence in _SENTENCE.split(text.lower().replace("\u2019", "'")):
        clauses = _CLAUSE.split(sentence)
        last_turn = max((k for k, clause in enumerate(clauses) if _TURNS.match(clause)), default=0)
        for k, clause in enumerate(clauses):
            words = _sentiment_of_words(clause, counted)
            if words:
                clause_weight = 0.5 if k < last_turn or _CONCEDES.match(clause) else 1.0
                total += clause_weight * 3.0 * math.tanh(math.fsum(words) / 3.0)
                weight += clause_weight
    return 4.0 * math.tanh(GAIN * total / weight / 4.0)


def _sentiment_of_words(clause: str, counted: set[str]) -> list[float]:
    """u_i of the clause's sentiment words that are not in `counted` yet; adds them to it."""
    sentiments = []
    sign, before = 1.0, ""
    for word in _WORD.findall(clause):
        if word in _NEGATORS or word.endswith("n't"):
            sign *= _NEGATION
        elif word == "and":
            sign = 1.0
        elif word in _VALENCE and word not in counted:
            counted.add(word)
            sentiments.append(_VALENCE[word] * _DEGREE.get(before, 1.0) * sign)
        before = word
    return sentiments
