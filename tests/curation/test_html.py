"""Text of pages: navigation goes, prose stays, code and formulas stay as they were."""

import pytest

from cpm_jax.curation.html import extract_text
from tests.curation.web_pages import CODE, MATH_PAGE, PROSE, page


def test_code_and_formulas_survive_to_the_character():
    text = extract_text(MATH_PAGE)
    assert f"```python\n{CODE}\n```" in text
    assert "The update is $x_{n+1} = x_n$ and one repeats" in text
    assert "`newton` needs only few steps" in text
    assert "$$E = mc^2$$" in text
    assert "$a^2$ is the square that is meant" in text
    assert PROSE in text
    # Neither what surrounds the article nor what is there only to be looked at.
    for unwanted in ("About us", "All rights reserved", "E=mc2", "a2", "qzkept"):
        assert unwanted not in text


@pytest.mark.parametrize("before", ["<p>{}</p>", "<ul><li>{}</li></ul>", "<h2>{}</h2>"])
def test_a_block_stands_after_the_words_that_introduce_it(before):
    example = "<div class='example'><div class='contents'><pre>ls  -l</pre></div></div>"
    middle = before.format("This is how the files of a folder are listed with their sizes:")
    html = page(PROSE).replace("</article>", f"{middle}{example}<p>{PROSE[::-1]}</p></article>")
    assert "with their sizes:\n```\nls  -l\n```\n" in extract_text(html)


def test_a_block_at_the_very_beginning_is_kept():
    html = page(PROSE * 2).replace("<article>", "<article><pre>first  things\n\nfirst</pre>")
    assert extract_text(html).startswith("```\nfirst  things\n\nfirst\n```\n")


def test_plain_trafilatura_is_there_to_compare_with_and_loses_the_blank_line():
    text = extract_text(MATH_PAGE, "prose")
    assert PROSE in text
    assert CODE not in text


def test_code_that_holds_a_fence_gets_a_longer_one():
    markdown = "Write\n```\ncode\n```\nlike this."
    assert f"````\n{markdown}\n````" in extract_text(
        page(PROSE).replace("</article>", f"<pre>{markdown}</pre></article>")
    )


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "latin-1"])
def test_bytes_in_the_encoding_that_the_page_names(encoding):
    text = "灯塔的看守人每天晚上都记下天气，这样过了四十多年，他的笔记本里有风暴也有平静的海。" * 3
    if encoding == "latin-1":
        text = "Le gardien du phare notait le temps chaque soir, été comme hiver, pendant plus de quarante années. " * 3
    html = page(text.strip()).replace("<head>", f"<head><meta charset='{encoding}'>")
    assert text.strip() in extract_text(html.encode(encoding))


@pytest.mark.parametrize("html", ["", "   ", "<html></html>", "\x00\x01", "<p", "no page at all"])
@pytest.mark.parametrize("extractor", ["keep_code_and_math", "prose"])
def test_what_is_no_page_has_no_text(html, extractor):
    assert extract_text(html, extractor) == ""
    assert extract_text(html.encode(), extractor) == ""
