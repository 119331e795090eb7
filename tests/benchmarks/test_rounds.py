from pathlib import Path

from benchmarks import classify, rounds


def test_no_chinese_text_has_two_roles(monkeypatch):
    # A character of its own tells a text even when its characters are in another order.
    manual, quotations = ([chr(first + i) + "字词" * 100 for i in range(200)] for first in (0x6000, 0x7000))
    monkeypatch.setattr(classify, "chinese", lambda _: (list(manual), list(quotations)))
    texts = rounds.chinese(rounds.RECIPES["smoke"], Path("unused"))
    roles = [texts.default, texts.good, texts.bad, *texts.positive.values(), *texts.held_out.values()]
    seen = [next(c for c in text if c not in "字词") for documents in roles for text in documents]
    assert len(seen) == len(set(seen)) == 400
    assert not set(texts.bad) & {*manual, *quotations}
    assert set(texts.good) < {*manual, *quotations}


def test_documents_are_added_and_counted(tmp_path):
    rounds.write(tmp_path / "a.jsonl", ["x", "y", "z"], metadata={"good": True})
    path = rounds.write(tmp_path / "a.jsonl", ["w"], metadata={"good": False})
    assert path == str(tmp_path / "a.jsonl")
    assert rounds.good_share(tmp_path) == 3 / 4
