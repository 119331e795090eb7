"""Words, sentences and n-grams."""

import subprocess
import sys

import numpy as np
import pytest

from cpm_jax.curation.words import count_sentences, hash_ngrams, hash_words, normal_words, split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop, it's 3,000 m!", ["Do", "n't", "stop", ",", "it", "'s", "3,000", "m", "!"]),
        ("see http://e.org/a?b=c. mail a@b.org", ["see", "http://e.org/a?b=c", ".", "mail", "a@b.org"]),
        ("U.S. well-known sources.list ...", ["U.S.", "well", "-", "known", "sources.list", "..."]),
        ("", []),
    ],
)
def test_english_words(text, words):
    assert list(split_words(text)) == words


def test_chinese_words_are_those_of_a_dictionary():
    assert split_words("我们喜欢北京大学。", "zh") == ("我们", "喜欢", "北京大学", "。")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [("One. Two! Three?", 3), ("No end", 1), ("e.g. 3.5 of it", 1), ("一句。两句！三句？", 3), (" ", 0)],
)
def test_sentences(text, sentences):
    assert count_sentences(text) == sentences


def test_words_to_compare_are_lower_case_and_each_han_character_is_one():
    assert normal_words("The x_1, THE y!") == ["the", "x", "1", "the", "y"]
    assert normal_words("北京 ABC大学") == ["北", "京", "abc", "大", "学"]


def test_ngrams_are_equal_where_the_words_are_and_only_there():
    words = ["a", "b", "c", "d", "a", "b", "c", "e"]
    ngrams = hash_ngrams(hash_words(words), 3)
    assert len(ngrams) == 6
    equal = [(i, j) for i in range(6) for j in range(i) if ngrams[i] == ngrams[j]]
    assert equal == [(4, 0)]
    assert len(hash_ngrams(hash_words(words[:2]), 3)) == 0


def test_hashes_are_the_same_in_every_process():
    code = "from cpm_jax.curation.words import *; print(hash_ngrams(hash_words(['a', 'b', 'c']), 2).tolist())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert there.strip() == str(hash_ngrams(hash_words(["a", "b", "c"]), 2).tolist())


def test_hashes_of_ngrams_spread():
    ngrams = hash_ngrams(hash_words([str(number) for number in range(20_000)]), 5)
    assert len(np.unique(ngrams)) == len(ngrams)
    for bits in (ngrams >> np.uint64(60), ngrams & np.uint64(15)):
        assert np.bincount(bits.astype(int), minlength=16).min() > 1_100  # 1,250 expected, deviation 34
