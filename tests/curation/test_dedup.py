"""Duplicates are found where they were planted, and nowhere else; whatever the shards, and in parts that fit."""

import random

import numpy as np
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.curation import dedup
from cpm_jax.curation.dedup import (
    EXACT,
    KEPT,
    NEAR,
    SAME_ID,
    DedupConfig,
    distinct_id,
    document_keys,
    find_duplicate_paragraphs,
    find_duplicates,
    given_id,
    paragraph_keys,
    paragraphs,
    signature,
    without_paragraphs,
)
from cpm_jax.curation.document import Document
from cpm_jax.curation.words import normal_words

CONFIG = DedupConfig()


def text(seed: int, words: int = 200) -> str:
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(5000)}" for _ in range(words))


def edited(original: str, share: float, seed: int) -> str:
    """The text with some of its words replaced."""
    draw = random.Random(seed)
    return " ".join(f"new{draw.randrange(5000)}" if draw.random() < share else word for word in original.split())


def jaccard(one: str, other: str, n: int) -> float:
    """The share of n-grams that both have, counted one by one."""
    sets = []
    for words in (normal_words(one), normal_words(other)):
        sets.append({tuple(words[place : place + n]) for place in range(len(words) - n + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def keys_of(documents, config=CONFIG):
    return np.stack([document_keys(document, config) for document in documents], axis=1)


def fates_of(texts, **changes):
    documents = [Document(content, str(number)) for number, content in enumerate(texts)]
    return find_duplicates([keys_of(documents, DedupConfig(**changes))]).tolist()


def test_signatures_estimate_the_similarity_without_bias():
    errors = []
    for seed in range(60):
        original = text(seed)
        copy = edited(original, 0.01 + 0.002 * seed, seed)
        estimate = np.mean(signature(original, CONFIG) == signature(copy, CONFIG))
        errors.append(estimate - jaccard(original, copy, CONFIG.ngram))
    # 112 hashes: a standard deviation of at most sqrt(0.25 / 112) = 0.047 each, and 0.006 of the mean.
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.06


def test_the_first_of_each_kind_of_duplicate_stays():
    base = text(1)
    documents = [
        Document(base, "a"),
        Document(text(2), "b"),
        Document(base, "c"),
        Document(edited(base, 0.005, 3), "d"),
        Document(text(4), "b"),
        Document("few words", "e"),
        Document("few other", "f"),
        Document("few words", "g"),
        Document(base.upper(), "d"),
        Document("few others", "e", source="elsewhere"),
    ]
    assert find_duplicates([keys_of(documents)]).tolist() == [
        *(KEPT, KEPT, EXACT, NEAR, SAME_ID, KEPT, KEPT, EXACT, NEAR, KEPT)
    ]


def test_a_distinct_id_is_undone():
    assert distinct_id("17", 3, 12) == "17#00003-12"
    assert given_id("17#00003-12") == "17" == given_id("17")
    assert given_id(distinct_id("a#b-1", 123456, 0)) == "a#b-1"


def test_groups_are_whole_though_their_ends_are_unlike():
    chain = [text(7, 400)]
    for step in range(6):
        words = chain[-1].split()
        chain.append(" ".join([*words[12:], *text(100 + step, 12).split()]))
    assert jaccard(chain[0], chain[-1], 5) < 0.75
    assert fates_of(chain[::-1]) == [KEPT] + [NEAR] * 6


def test_only_case_punctuation_and_layout_differ():
    base = " ".join(f"Word{n}, and then." for n in range(60))
    assert fates_of([base, base.upper().replace(",", " ;").replace(" ", "\n")]) == [KEPT, NEAR]
    assert fates_of([base, base.upper()], bands=0) == [KEPT, KEPT]


def test_chinese_is_compared_by_characters():
    base = "灯塔的看守人每天晚上都记下天气，这样过了四十多年，他的笔记本里有风暴也有平静的海，有走得太近的船。" * 2
    assert fates_of([base, base.replace("，", ","), "完全不同的另一篇文章，讲的是山里的树和河里的鱼。" * 4]) == [
        KEPT,
        NEAR,
        KEPT,
    ]


@pytest.mark.parametrize("at_once", [7, 1 << 24])
def test_neither_shards_nor_parts_change_the_result(monkeypatch, at_once):
    draw = random.Random(0)
    texts = [text(draw.randrange(30)) for _ in range(40)] + [edited(text(n), 0.005, n) for n in range(20)]
    draw.shuffle(texts)
    keys = keys_of([Document(content, str(number)) for number, content in enumerate(texts)])
    whole = find_duplicates([keys])
    monkeypatch.setattr(dedup, "_KEYS_AT_ONCE", at_once)
    assert find_duplicates([keys[:, :0], keys[:, :13], keys[:, 13:14], keys[:, 14:]]).tolist() == whole.tolist()
    assert {KEPT, EXACT, NEAR} == set(whole.tolist())


def test_planted_near_duplicates_are_found_as_the_formula_says():
    originals = [text(seed) for seed in range(150)]
    copies = [edited(original, 0.03, seed) for seed, original in enumerate(originals)]
    fates = fates_of([*originals, *copies])
    assert fates[:150] == [KEPT] * 150  # no two of them are alike
    similar = np.array([jaccard(*pair, CONFIG.ngram) for pair in zip(originals, copies, strict=True)])
    expected = 1 - (1 - similar**CONFIG.rows) ** CONFIG.bands
    found = np.array(fates[150:]) == NEAR
    assert 0.3 < expected.mean() < 0.97
    assert abs(found.mean() - expected.mean()) < 4 * np.sqrt((expected * (1 - expected)).sum()) / 150


PARAGRAPH = "This paragraph was copied from page to page by everybody who had nothing of his own to say about it."
CODE = f"```\n{PARAGRAPH}\n\n{PARAGRAPH}\n```"


def test_paragraphs_are_long_pieces_between_blank_lines_outside_of_code():
    content = f"short\n\n{PARAGRAPH}\n \n{CODE}\n\n{PARAGRAPH}\nwith a line  \n"
    found = [content[begin:end] for begin, end in paragraphs(content, 50)]
    assert found == [PARAGRAPH, f"{PARAGRAPH}\nwith a line"]
    assert [end - begin for begin, end in paragraphs(f"{PARAGRAPH}\n{PARAGRAPH}", 50)] == [len(PARAGRAPH)] * 2


def test_paragraphs_that_occurred_before_go_unless_their_document_went():
    contents = [
        f"{text(1)}\n\n{PARAGRAPH}\n\n{text(2)}",
        f"{PARAGRAPH.upper()}\n\n{text(3)}\n\n{CODE}",
        f"{text(4)}\n\n{text(5)}",
        f"{text(5)}\n\n{text(6)}",
    ]
    keys = [paragraph_keys(content, 50)[None] for content in contents]
    counts = [np.array([found.shape[1]]) for found in keys]
    fates = np.array([KEPT, KEPT, EXACT, KEPT], np.uint8)
    goes = find_duplicate_paragraphs(keys, counts, fates)
    assert [shard.tolist() for shard in goes] == [[False] * 3, [True, False], [False, False], [False, False]]
    assert without_paragraphs(contents[1], 50, goes[1]) == f"{text(3)}\n\n{CODE}"
    assert without_paragraphs(contents[0], 50, goes[0]) == contents[0]


def test_keys_may_lie_in_files(tmp_path):
    keys = keys_of([Document(text(n % 3), str(n)) for n in range(6)])
    np.save(tmp_path / "keys.npy", keys)
    assert find_duplicates([dedup.KeyFile(tmp_path / "keys.npy")]).tolist() == [KEPT] * 3 + [EXACT] * 3


def test_no_documents_are_no_error():
    empty = np.empty((16, 0), np.uint64)
    assert find_duplicates([empty, empty]).tolist() == []
    assert find_duplicate_paragraphs([], [], np.empty(0, np.uint8)) == []


@pytest.mark.parametrize("field", ["ngram", "rows", "min_paragraph"])
def test_bad_values_are_named(field):
    with pytest.raises(ConfigError, match=rf"DedupConfig.{field} = 0: must be at least 1"):
        DedupConfig(**{field: 0})
