"""Filters that mend a text: bad encodings, personal data, boilerplate lines. Code and formulas stay as they are."""

import functools
import ipaddress
import re
from typing import Any

from cpm_jax.common.config import config_dataclass
from cpm_jax.curation.code_and_math import change_prose, in_blocks
from cpm_jax.curation.document import Document
from cpm_jax.curation.extra import import_extra
from cpm_jax.curation.filters import TextFilter, with_text

_NOT_PLAIN = re.compile(r"[^\n\t -~]")  # all that ftfy could mend
_NOT_PLAIN_LINES = re.compile(r"^.*[^\n\t -~].*\n?", re.MULTILINE)


@functools.cache
def _fixer() -> tuple[Any, Any]:
    ftfy = import_extra("ftfy")
    # What was wrongly decoded is mended; what is merely typography (curly quotes, ligatures, the full width of Chinese
    # punctuation, HTML entities that somebody writes about) is no error.
    config = ftfy.TextFixerConfig(
        unescape_html=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        normalization="NFC",
        explain=False,
    )
    return ftfy, config


@config_dataclass
class FixEncoding(TextFilter):
    """Mends text that was decoded wrongly ("donâ€™t"), by ftfy; control characters go."""

    def apply(self, document: Document) -> Document:
        """Returns the document, mended."""
        if not _NOT_PLAIN.search(document.text):
            return document
        return with_text(document, change_prose(document.text, _mend))


def _mend(text: str) -> str:
    """As ftfy mends it, which goes line by line, and slowly: it is spared those that have nothing to mend."""
    ftfy, config = _fixer()
    return _NOT_PLAIN_LINES.sub(lambda line: ftfy.fix_text(line[0], config), text)


_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][A-Za-z0-9._%+'-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b"
)
_IP4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IP6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")


@config_dataclass
class MaskPersonalData(TextFilter):
    """Replaces e-mail addresses, and the IP addresses that lead to somebody: private ones and those of examples stay.

    It looks into code, too, where a replacement of the same form does no harm.

    Attributes:
        email: what stands in for an address; example.org belongs to nobody.
        ip4: what stands in for one of IPv4, from the block for documentation (RFC 5737).
        ip6: what stands in for one of IPv6, from the block for documentation (RFC 3849).
    """

    email: str = "email@example.org"
    ip4: str = "192.0.2.1"
    ip6: str = "2001:db8::1"

    def apply(self, document: Document) -> Document:
        """Returns the document without such addresses."""
        text = document.text
        if "@" in text:
            text = _EMAIL.sub(self.email, text)
        text = _IP4.sub(lambda match: self.ip4 if _is_public(match[0]) else match[0], text)
        if "::" in text or text.count(":") > 6:
            text = _IP6.sub(lambda match: self.ip6 if _is_public(match[0]) else match[0], text)
        return with_text(document, text)


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:  # a version number, a time, the scope operator of C++
        return False


_WORDS_OF_A_SHORT_LINE = 10
_BEGINS = re.compile(
    r"\s*(?:sign[ -]?(?:in|up)|log[ -]?in|subscribe|share (?:this|on)|follow us|skip to|back to top|"
    r"posted (?:on|in|by)|copyright|©|all rights reserved|related (?:posts|articles)|leave a (?:comment|reply)|"
    r"上一篇|下一篇|责任编辑|版权所有|登录|注册|分享到|相关阅读|相关新闻|友情链接|返回顶部|扫一扫)",
    re.IGNORECASE,
)
_ENDS = re.compile(
    r"(?:read more|learn more|continue reading|click here|all rights reserved|阅读全文|查看更多|点击查看|了解更多)"
    r"\W*$",
    re.IGNORECASE,
)
_ANYWHERE = re.compile(
    r"items? in (?:your )?cart|accept (?:all )?cookies|cookie (?:policy|settings)|privacy policy|"
    r"terms of (?:use|service)|enable javascript|add to cart|powered by|ICP备|公网安备|未经授权",
    re.IGNORECASE,
)
_COUNTER = re.compile(
    r"\W*\d[\d.,]*\s*[kKmM]?\s*(?:likes?|shares?|comments?|views?|repl(?:y|ies)|followers?|评论|点赞|阅读|浏览)\W*",
    re.IGNORECASE,
)


@config_dataclass
class RemoveBoilerplate(TextFilter):
    """Takes lines away that are a page's furniture, by the rules of RefinedWeb (arXiv 2306.01116, appendix G.2).

    Such are lines of digits only, counters ("3 likes"), and short lines (10 words) with a phrase of menus, buttons,
    notices or policies, English or Chinese. Lines of blocks of code and formulas stay.

    Attributes:
        max_removed: a document of which a larger share of the words would go is dropped, as its paper does.
    """

    max_removed: float = 0.05

    def __post_init__(self) -> None:
        """Checks what the types do not say."""
        self.check_fractions("max_removed")

    def apply(self, document: Document) -> Document:
        """Drops the document, or returns it without such lines."""
        text = document.text
        lies_in_block = in_blocks(text)
        kept, removed, place = [], 0, 0
        for line in text.splitlines(keepends=True):
            inside = lies_in_block(place, place + 1)
            place += len(line)
            if not inside and _is_boilerplate(line):
                removed += _size(line)
            else:
                kept.append(line)
        if not removed:
            return document
        if removed > self.max_removed * _size(text):
            return document.drop("boilerplate")
        return with_text(document, "".join(kept).strip("\n"))


def _size(text: str) -> int:
    """Words, or characters of a script that divides no words."""
    return len(text.split()) if text.isascii() else sum(len(word) if word > "\u2e80" else 1 for word in text.split())


def _is_boilerplate(line: str) -> bool:
    words = line.split()
    if not words or len(words) > _WORDS_OF_A_SHORT_LINE or len(line) > 100:
        return False
    stripped = line.strip()
    if stripped.isdigit() or _COUNTER.fullmatch(stripped):
        return True
    return bool(_BEGINS.match(line) or _ENDS.search(stripped) or _ANYWHERE.search(line))
