import re
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_jax.curation.text_normalization import TextNormalizer, fold
from cpm_jax.data.tokenizer import Tokenizer

TEXTS = [
    "The cat sat on the mat.\n\n\n\nAnd then?\tIt slept, it seems; naïve façade.\r\n",
    "今天天气很好,我们去公园散步。\n北京是中国的首都。",
    "ﬁne ½ Ａ１ é ñ  double   spaces",
    "def f(x):\n\treturn x ** 2  # 二次\n",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS * 3, vocab_size=400)


@pytest.fixture(scope="module")
def normalize(tokenizer):
    return TextNormalizer(tokenizer)


def published(text, tokenizer):
    """The steps one after the other, as the notes on the published script list them."""
    text = re.sub(r"\n{3,}", "\n\n", text)
    text = text.lower()
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn")
    text = " ".join(tokenizer.decode([token]) for token in tokenizer.encode(text))
    text = text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return re.sub(" +", " ", text).strip()


@pytest.mark.parametrize("text", [*TEXTS, "", " ", "\n", " \t \x0b", "\x0bword\u2028", "<s>not a special</s>"])
def test_gives_the_lines_of_the_published_steps(normalize, tokenizer, text):
    assert normalize([text]) == [published(text, tokenizer)]


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_gives_them_for_any_text(normalize, tokenizer, text):
    assert normalize([text]) == [published(text, tokenizer)]


def test_steps_by_hand(normalize):
    assert normalize(["É\n\n\n\nÉ"]) == normalize(["e\n\ne"])
    (line,) = normalize(["a\tb\nc"])
    assert line.replace(" ", "") == r"a\tb\nc"
    assert "\n" not in line


def test_a_batch_is_its_texts_one_by_one(normalize):
    assert normalize(TEXTS * 7) == [normalize([text])[0] for text in TEXTS * 7]


def test_chinese_becomes_words_with_spaces_between(tokenizer):
    assert " " in TextNormalizer(tokenizer)(["今天天气很好,我们去公园散步"])[0]


def test_marks_go_of_every_character_there_is():
    text = "".join(chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
    normal = unicodedata.normalize("NFKD", text.lower())
    assert fold(text) == "".join(c for c in normal if unicodedata.category(c) != "Mn")
