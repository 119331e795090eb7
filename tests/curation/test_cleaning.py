"""Texts are mended, and code and formulas are left alone."""

import random

import pytest

from cpm_jax.curation import cleaning
from cpm_jax.curation.cleaning import FixEncoding, MaskPersonalData, RemoveBoilerplate
from cpm_jax.curation.document import Document

CODE = "```\nprint('donâ€™t &lt; touch')\n```"


def text_after(clean, text: str) -> str:
    judged = clean(Document(text, "1"))
    assert not judged.dropped
    return judged.text


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("We donâ€™t know.", "We don’t know."),
        ("Le cafÃ© est fermÃ©.", "Le café est fermé."),
        ("ame\u0301 at night", "am\u00e9 at night"),
        ("bell\x07 and \x1b[1mbold\x1b[0m", "bell and bold"),
        ("“curly”, full，ｗｉｄｔｈ ﬁt &lt;b&gt;", "“curly”, full，ｗｉｄｔｈ ﬁt &lt;b&gt;"),
        ("数据，“引号”……", "数据，“引号”……"),
    ],
)
def test_encodings_are_mended_and_typography_stays(bad, good):
    assert text_after(FixEncoding(), bad) == good
    assert text_after(FixEncoding(), f"{bad}\n\n{CODE}") == f"{good}\n\n{CODE}"


MIXED = [
    "plain line\n",
    "\n",
    "\r\n",
    "donâ€™t\n",
    "tab\tand Ã©\r\n",
    "bell\x07",
    "a\x0bb\n",
    "a\u2028b\x85c\n",
    "\x1b[1mbold\x1b[0m\n",
    "e\u0301\n",
    "l'Ã©tÃ© `donâ€™t` ",
    "&lt;\n",
]


def test_lines_that_are_spared_are_those_that_ftfy_leaves():
    ftfy, config = cleaning._fixer()
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices(MIXED, k=draw.randrange(1, 8)))
        assert cleaning._mend(text) == ftfy.fix_text(text, config)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to jane.doe+x@mail.example.co.uk, please.", "Write to email@example.org, please."),
        ("a@b and @decorator stay", "a@b and @decorator stay"),
        ("from 8.8.8.8 to 192.168.0.1, 127.0.0.1", "from 192.0.2.1 to 192.168.0.1, 127.0.0.1"),
        ("at 2a00:1450:4001:82a::200e now", "at 2001:db8::1 now"),
        ("local fe80::1 and ::1; std::vector::size; 10:30:45", "local fe80::1 and ::1; std::vector::size; 10:30:45"),
        ("version 1.2.3.4.5 and v1.2.3.4", "version 1.2.3.4.5 and v1.2.3.4"),
        ("999.1.1.1 is none", "999.1.1.1 is none"),
        ("邮箱：wang@example.cn。", "邮箱：email@example.org。"),
    ],
)
def test_personal_data_is_masked(text, masked):
    assert text_after(MaskPersonalData(), text) == masked


LONG = "\n".join(
    f"This is line number {n} of an article that somebody wrote about the sea and its light." for n in range(20)
)


@pytest.mark.parametrize(
    "line",
    [
        "Read more...",
        "Sign in",
        "12345",
        "3 likes",
        "1.2k views",
        "2 items in cart",
        "Accept all cookies",
        "© 2024 Example",
        "责任编辑：王明",
        "点击查看",
    ],
)
def test_furniture_goes(line):
    assert text_after(RemoveBoilerplate(), f"{line}\n{LONG}") == LONG


@pytest.mark.parametrize(
    "line",
    [
        "Chapter One",
        "He did not read more than one book about the cookies that his mother made every year.",
        "x = 12",
        "```\n12345\n3 likes\n```",
    ],
)
def test_other_lines_stay(line):
    assert text_after(RemoveBoilerplate(), f"{line}\n{LONG}") == f"{line}\n{LONG}"


def test_a_page_that_is_furniture_mostly_is_dropped():
    assert RemoveBoilerplate()(Document("Sign in\nRead more\n" + LONG[:300], "1")).dropped == "boilerplate"
