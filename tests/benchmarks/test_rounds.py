"""The texts of the study of rounds, and how they are written; the study itself is of the verb that it runs."""

import json
import random
from pathlib import Path

from benchmarks import chinese_texts, rounds, rounds_texts
from benchmarks.verification_corpora import filled


def test_no_chinese_text_has_two_roles(monkeypatch):
    # A private character of its own tells a text even when its characters are in another order.
    def texts(domain, count=240):
        return [chr(0xE000 + 256 * domain + i) + "字词" * 100 for i in range(count)]

    monkeypatch.setattr(chinese_texts, "news", lambda _: texts(0))
    monkeypatch.setattr(chinese_texts, "manual", lambda _: (texts(1), ["下一页", "上一页"]))
    monkeypatch.setattr(chinese_texts, "quotations", lambda _: texts(2))
    monkeypatch.setattr(chinese_texts, "reviews", lambda *_: [text + "字词" * 160 for text in texts(3)])
    monkeypatch.setattr(chinese_texts, "reference", lambda _: texts(4))
    monkeypatch.setattr(chinese_texts, "common_words", lambda _: ["数据", "模型", "天气", "价格"])
    monkeypatch.setattr(rounds_texts, "package", lambda folder, _: folder)
    monkeypatch.setattr(rounds_texts, "mails_of", lambda *_: ["buy now\n\n" * 40_000])
    found = rounds_texts.chinese(Path("unused"), passages=50)

    def own(documents):
        return [c for text in documents for c in text if 0xE000 <= ord(c) < 0xE500]

    seen = own([*found.default, *found.good, *found.bad, *(t for pool in found.pools.values() for t in pool)])
    assert len(seen) == len(set(seen)) > 500
    assert not set(seen) & set(own(t for passages in found.held_out.values() for t in passages))
    assert {name: len(passages) for name, passages in found.held_out.items()} == dict.fromkeys(
        ("news", "manual", "quotations", "reviews", "reference"), 50
    )
    assert 0.25 < len(found.good) / (len(found.good) + len(found.bad)) < 0.45
    assert set(found.pools) == {"texts", "mails", "listings"}
    assert all(found.pools.values())


def test_passages_are_of_many_places_and_have_one_length():
    documents = [f"{i:02}" * 100 for i in range(20)]
    found = rounds_texts.chinese_passages(documents, 30, 40, random.Random(0))
    assert len(found) == 30
    assert all(len(passage) == 40 and any(passage in text for text in documents) for passage in found)


def test_forms_are_filled_and_keep_to_a_subject():
    (text,) = filled(["{a} {b} {c}"], ["x", "y", "z", "w"], [30], random.Random(0))
    lines = [line.split() for line in text.strip().split("\n")]
    assert len(text) >= 30
    assert len({line[0] for line in lines}) == 1
    assert all(b != c for _, b, c in lines)


def test_texts_are_written_by_role_and_the_good_ones_are_known(tmp_path):
    texts = rounds_texts.Texts(["d"], {"texts": ["p", "q"]}, ["g"], ["b", "c"], {"news": ["h"]})
    (tmp_path / "texts.partial" / "pools").mkdir(parents=True)
    (tmp_path / "texts.partial" / "pools" / "left.jsonl").write_text("of a call that was killed")
    rounds.write_texts(texts, tmp_path / "texts")
    written = {
        str(path.relative_to(tmp_path / "texts")): [json.loads(line) for line in path.open()]
        for path in (tmp_path / "texts").rglob("*.jsonl")
    }
    assert written["raw.jsonl"] == [
        {"text": "g", "good": True},
        {"text": "b", "good": False},
        {"text": "c", "good": False},
    ]
    assert sorted(written) == ["default.jsonl", "held_out/news.jsonl", "pools/texts.jsonl", "raw.jsonl"]
    assert not (tmp_path / "texts.partial").exists()


def test_the_good_ones_among_scored_documents_are_counted(tmp_path):
    rounds.write(tmp_path / "a.jsonl", ["x", "y", "z"], metadata={"good": True})
    path = rounds.write(tmp_path / "a.jsonl", ["w"], metadata={"good": False})
    assert path == str(tmp_path / "a.jsonl")
    assert rounds.read_good(tmp_path) == [True, True, True, False]
