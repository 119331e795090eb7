"""The published rules, each at its threshold; `benchmarks/filters.py` compares whole decisions with datatrove's."""

import pickle
import random

import datasets
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.curation.c4 import C4Quality
from cpm_jax.curation.document import Document, as_predicate
from cpm_jax.curation.filters import ExceptSourceFiles
from cpm_jax.curation.fineweb import FineWebQuality
from cpm_jax.curation.gopher import GopherQuality, GopherRepetition
from cpm_jax.curation.words import split_words

WORDS = [
    "the",
    "sea",
    "of",
    "and",
    "light",
    "that",
    "storm",
    "rock",
    "with",
    "keeper",
    "tower",
    "ship",
    "wind",
    "coast",
]
CODE = "```c\nint main() { int a[] = {1, 2}; /* ### */ }\nint main() { int a[] = {1, 2}; /* ### */ }\n```"


def prose(words: int, seed: int = 0) -> str:
    """Words of prose without repetition to speak of."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + draw.choice(["", "s", "ing"]) for _ in range(words - 2)) + " and the"


def reason(judge, text: str, language: str = "en") -> str:
    return judge(Document(text, "1", language=language)).dropped


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (prose(50), ""),
        (prose(49), "gopher: too few words"),
        (prose(49) + " , ; ! ?", "gopher: too few words"),
        (prose(100_001), "gopher: too many words"),
        ("ab " * 60 + "the and", "gopher: word length"),
        (prose(50) + " antidisestablishmentarianism" * 30, "gopher: word length"),
        (prose(90) + " #" * 9, ""),
        (prose(89) + " #" * 11, "gopher: hash signs"),
        (prose(88) + " ..." * 12, "gopher: ellipses"),
        ("\n".join(["- " + prose(10, n) for n in range(19)] + [prose(20)]), "gopher: bullet lines"),
        ("\n".join(["- " + prose(10, n) for n in range(9)] + [prose(20)]), ""),
        ("\n".join([prose(20, n) + ("…" if n < 4 else "") for n in range(10)]), "gopher: lines end with ellipses"),
        ("\n".join([prose(20, n) + ("…" if n < 3 else "") for n in range(10)]), ""),
        (prose(80) + " 1234" * 20, ""),
        (prose(79) + " 1234" * 21, "gopher: words without letters"),
        ("sea rock ship wind coast storm " * 10, "gopher: too few stop words"),
        ("sea rock ship wind coast storm " * 10 + "the the", "gopher: too few stop words"),
        (prose(50) + "\n" + CODE * 5, ""),
    ],
)
def test_gopher_quality(text, why):
    assert reason(GopherQuality(), text) == why


def test_gopher_quality_of_chinese_by_fineweb_2s_thresholds():
    text = "灯塔的看守人在每天晚上都记下天气，他在那里住了四十年，写了很多本子，后来的人都很感谢他和他的家人。" * 3
    judge = GopherQuality(
        languages=("zh",),
        min_word_length=1,
        max_word_length=5,
        min_alphabetic_words=0.735,
        stop_words=("的", "在", "了"),
    )
    assert reason(judge, text, "zh") == ""
    assert reason(judge, "月亮星星太阳河流。" * 20, "zh") == "gopher: too few stop words"
    assert reason(judge, "not Chinese", "en") == ""  # of another language: not judged


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (prose(300), ""),
        ("\n\n".join([prose(30, n) for n in range(7)] + [prose(5)] * 4), ""),
        ("\n\n".join([prose(30, n) for n in range(6)] + [prose(5)] * 5), "repetition: paragraphs"),
        ("\n\n".join([prose(30, n) for n in range(20)] + [prose(60, 99), prose(60, 99)]), ""),
        (
            "\n\n".join([prose(30, n) for n in range(6)] + [prose(60, 1), prose(60, 1)]),
            "repetition: paragraph characters",
        ),
        ("\n".join([prose(30, n) for n in range(6)] + [prose(5)] * 5), "repetition: lines"),
        ("\n".join([prose(30, n) for n in range(6)] + [prose(60, 1), prose(60, 1)]), "repetition: line characters"),
        (prose(100) + " blue whale" * 20, "repetition: top 2-gram"),
        (prose(300) + f" {prose(40, 5)}." * 4, "repetition: 5-grams"),
        (prose(200) + "\n" + (CODE + "\n") * 20, ""),
    ],
)
def test_gopher_repetition(text, why):
    assert reason(GopherRepetition(), text) == why


def literal_duplicate_share(text: str, n: int) -> float:
    """The rule as the paper's readers state it, word by word: characters in n-grams that occurred before."""
    words = split_words(text)
    seen, place, characters = set(), 0, 0
    while place + n <= len(words):
        ngram = words[place : place + n]
        if ngram in seen:
            characters += sum(map(len, ngram))
            place += n
        else:
            seen.add(ngram)
            place += 1
    return characters / len(text)


@pytest.mark.parametrize("seed", range(20))
def test_shares_of_ngrams_are_exact_at_any_threshold(seed):
    draw = random.Random(seed)
    text = " ".join(prose(draw.randint(6, 20), draw.randint(0, 6)) for _ in range(12))
    for n in (5, 7, 10):
        share = literal_duplicate_share(text, n)
        just_above = GopherRepetition(max_top_ngram_characters=(), max_duplicate_ngram_characters=((n, share + 1e-9),))
        just_below = GopherRepetition(max_top_ngram_characters=(), max_duplicate_ngram_characters=((n, share - 1e-9),))
        assert reason(just_above, text) == ""
        if share > 0:
            assert reason(just_below, text) == f"repetition: {n}-grams"


SENTENCES = "\n".join(f"This is the sentence that has number {number}." for number in range(8))


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("A line with an end that counts.", "A line with an end that counts."),
        ("A line without such an end", ""),
        ("A line that goes on and on...", ""),
        ("Two words.", ""),
        ("You must enable Javascript to read this.", ""),
        ("Please read the privacy policy of this site.", ""),
        ("As was shown [12] by others [citation needed].", "As was shown  by others ."),
        ("x" * 1001 + " is too long a word.", ""),
        ("The set $\\{1, 2\\}$ and `{}` are no markup.", "The set $\\{1, 2\\}$ and `{}` are no markup."),
    ],
)
def test_c4_takes_lines(line, kept):
    judged = C4Quality()(Document(f"{SENTENCES}\n{line}", "1"))
    assert judged.dropped == ""
    assert judged.text == f"{SENTENCES}\n{kept}".strip()


def test_c4_drops_documents_and_keeps_code_whole():
    assert reason(C4Quality(), "One. Two.\nA line that ends.") == "c4: too few sentences"
    assert reason(C4Quality(), SENTENCES + "\nif (x) { go to the end; }.") == "c4: curly bracket"
    assert reason(C4Quality(), SENTENCES + "\nLorem ipsum dolor sit amet.") == "c4: lorem ipsum"
    with_code = f"{SENTENCES}\n{CODE}\nand so on"
    assert C4Quality()(Document(with_code, "1")).text == f"{SENTENCES}\n{CODE}"
    assert C4Quality(terminal_punctuation=False)(Document(with_code, "1")).text == with_code


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("\n".join(prose(20, n) + "." for n in range(5)), ""),
        ("\n".join(prose(20, n) + ("." if n == 0 else "") for n in range(8)), ""),
        (
            "\n".join(prose(20, n) + ("." if n == 0 else "") for n in range(9)),
            "fineweb: lines without terminal punctuation",
        ),
        ("\n".join("灯塔的看守人记下天气和海上的船，" * 3 + f"{n}。" for n in range(5)), ""),
        ("\n".join(f"A short line {n}." for n in range(5)) + "\n" + prose(60) + ".", "fineweb: short lines"),
        ("\n".join([*(prose(20, n) + "." for n in range(9)), prose(20, 1) + "."]), "fineweb: duplicate lines"),
        ("\n".join(f"onewordthatislongerthanthirtycharacters{n}." for n in range(8)), "fineweb: list"),
        ("\n".join(prose(20, n) + "." for n in range(5)) + "\n" + (CODE + "\n") * 5, ""),
    ],
)
def test_fineweb_quality(text, why):
    assert reason(FineWebQuality(), text) == why


@pytest.mark.parametrize(
    ("judge", "reasons"),
    [
        (GopherQuality(), dict.fromkeys(range(8), "gopher: too few words")),
        (GopherRepetition(), {5: "repetition: lines"}),
        (C4Quality(), dict.fromkeys(range(8), "c4: too few sentences")),
        (
            FineWebQuality(),
            {3: "fineweb: short lines"} | dict.fromkeys((0, 5, 6, 7), "fineweb: lines without terminal punctuation"),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_filters_travel_to_workers_and_judge_any_text(judge, reasons):
    """What holds nothing but code or formulas is no prose, which only rules that count words or sentences drop."""
    travelled = pickle.loads(pickle.dumps(judge))
    assert travelled == judge
    texts = ("x", "\n", "```\ncode\n```", "。", "$$x$$", "a\n" * 3, "…", "\x00")
    for number, text in enumerate(texts):
        document = Document(text, "1")
        judged = travelled(document)
        assert judged.dropped == reasons.get(number, ""), text
        assert judged == judge(document)
        assert judged.text == text


def test_filters_serve_other_frameworks():
    table = datasets.Dataset.from_dict({"text": [prose(60), "short", CODE]})
    assert table.filter(as_predicate(GopherQuality()), input_columns="text")["text"][:] == [prose(60)]


@pytest.mark.parametrize(
    "make", [lambda: GopherQuality(max_bullet_lines=1.5), lambda: FineWebQuality(max_short_lines=-0.1)]
)
def test_bad_thresholds_are_named(make):
    with pytest.raises(ConfigError, match=r"must be None or in \[0, 1\]"):
        make()


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("a/b.py", True),
        ("B.C", True),
        ("notes.md", False),
        ("a.py/notes", False),
        ("table.parquet:12", False),
        ("", False),
    ],
)
def test_source_files_pass_filters_of_prose(name, kept):
    judge = pickle.loads(pickle.dumps(ExceptSourceFiles((GopherQuality(),))))
    document = Document("x = 1", name, language="en")
    judged = judge(document)
    assert (judged == document) is kept
    assert judged.dropped == ("" if kept else "gopher: too few words")
    assert not judge(Document(prose(60), name, language="en")).dropped
