"""The text of a web page, by trafilatura, with its code and formulas kept whole.

Extractors of prose treat code and formulas as noise: indentation and blank lines collapse, MathML becomes a heap of
symbols, and formulas that scripts typeset vanish. So each block of code and each formula is first replaced by a word
that no page contains, the prose is extracted, and the words are replaced by what they stand for: fenced code, and TeX
between dollars.
"""

import re
from typing import Any, Literal, TypeAlias

from cpm_jax.curation.extra import import_extra

Extractor: TypeAlias = Literal["keep_code_and_math", "prose"]

_PLACEHOLDER = "qzkept{}keptzq"
_PLACEHOLDERS = re.compile(r"qzkept(\d+)keptzq")
_CODE_LANGUAGE = re.compile(r"(?:^|\s)(?:language|lang|highlight|brush)[-:]\s*([\w+#-]+)")
_CODE_TAGS = ("pre", "textarea", "xmp", "listing")
# Elements that hold one formula, often twice: once for screen readers and once as it is shown.
_FORMULAS = (
    "//*[contains(concat(' ', @class, ' '), ' katex-display ')]"
    " | //*[contains(concat(' ', @class, ' '), ' katex ')]"
    " | //*[contains(concat(' ', @class, ' '), ' mwe-math-element ')]"
    " | //*[local-name() = 'math'] | //script[starts-with(@type, 'math/tex')]"
    " | //img[contains(@class, 'math') or contains(@class, 'tex')][@alt]"
)
_PARTS = ("p", "div", "section", "ul", "ol", "li", "dl", "dd", "blockquote", "article", "main")
_TYPESET = "//*[contains(@class, 'MathJax') and not(self::script)]"


def extract_text(page: bytes | str, extractor: Extractor = "keep_code_and_math") -> str:
    """The main text of a page.

    Args:
        page: HTML; of bytes the encoding is found out.
        extractor: "keep_code_and_math"; or "prose", which is trafilatura as FineWeb used it.

    Returns:
        The text, "" if there is none.

    Raises:
        DataError: the extra `curate` is not installed.
    """
    trafilatura = import_extra("trafilatura")
    tree = trafilatura.load_html(page)
    if tree is None:
        return ""
    kept: list[str] = []
    if extractor == "keep_code_and_math":
        _set_aside(tree, kept)
    text = trafilatura.extract(tree, favor_precision=True, include_comments=False) or ""
    # Of prose the layout of the source says nothing.
    text = "\n".join(line.strip() for line in text.split("\n"))
    return _restored(text, kept).strip()


def _restored(text: str, kept: list[str]) -> str:
    """The text with what was set aside; blocks get lines of their own."""

    def content(match: re.Match[str]) -> str:
        found = kept[int(match[1])]
        if not found.startswith(("```", "$$")):
            return found
        before = "" if match.start() == 0 or text[match.start() - 1] == "\n" else "\n"
        after = "" if match.end() == len(text) or text[match.end()] == "\n" else "\n"
        return f"{before}{found}{after}"

    return _PLACEHOLDERS.sub(content, text)


def _set_aside(tree: Any, kept: list[str]) -> None:
    def put(element: Any, content: str, block: bool) -> None:
        kept.append(content)
        _replace(element, _PLACEHOLDER.format(len(kept) - 1), block)

    rendered = set(tree.xpath(_TYPESET))
    for element in tree.xpath(_FORMULAS):
        around = {element, *element.iterancestors()}
        if around & rendered or tree not in around:
            continue  # goes with what was typeset; or was part of a formula that has been replaced
        formula, display = _formula(element)
        if formula and element.getparent() is not None:
            put(element, f"$${formula}$$" if display else f"${formula}$", display)
    for element in rendered:
        if element.getparent() is not None:
            element.drop_tree()
    for element in list(tree.iter(*_CODE_TAGS)):
        code = _code(element)
        if code.strip() and element.getparent() is not None:
            put(element, _fenced(code, _language(element)), True)
    for element in list(tree.iter("code", "kbd", "samp", "tt")):
        code = element.text_content()
        if code.strip() and "`" not in code and "\n" not in code and element.getparent() is not None:
            put(element, f"`{code.strip()}`", False)


def _replace(element: Any, text: str, block: bool) -> None:
    """Puts text in place of an element; a block goes to the end of the paragraph before it.

    A paragraph of one strange word would be taken for furniture of the page. With the words that introduce it the
    block stays where they stay, and goes where they go.
    """
    before = _text_before(element) if block else None
    tail = element.tail
    for child in list(element):
        element.remove(child)
    element.attrib.clear()
    element.tag, element.text, element.tail = "p" if block else "span", text, tail
    if before is not None:
        element.drop_tree()
        element.tag, element.tail = "span", None
        before.append(element)


def _text_before(element: Any) -> Any:
    """The paragraph, or what serves as one, that stands before an element; None if there is none."""
    for around in [element, *element.iterancestors()]:
        for sibling in around.itersiblings(preceding=True):
            if not isinstance(sibling.tag, str) or not sibling.text_content().strip() or _is_aside(sibling):
                continue
            if sibling.tag not in (*_PARTS, "h1", "h2", "h3", "h4", "h5", "h6"):
                return None  # a table, a form, loose words: what is put into them may go with them
            while len(sibling) and sibling[-1].tag in _PARTS:
                sibling = sibling[-1]
            return sibling
        if around.tag not in _PARTS and around is not element:
            break
    return None


def _is_aside(element: Any) -> bool:
    return element.tag in ("aside", "nav", "script", "style") or "sidebar" in element.get("class", "")


def _formula(element: Any) -> tuple[str, bool]:
    """The TeX of a formula, or what comes nearest to it, and whether it stands on lines of its own."""
    classes = f" {element.get('class', '')} "
    maths = [element] if element.tag == "math" else element.xpath(".//*[local-name() = 'math']")
    display = " katex-display " in classes or any(math.get("display") == "block" for math in maths)
    if element.tag == "script":
        return (element.text or "").strip(), "mode=display" in element.get("type", "")
    if element.tag == "img":
        return _without_dollars(element.get("alt", "")), False
    for annotation in element.xpath(".//*[local-name() = 'annotation'][contains(@encoding, 'tex')]"):
        return _without_dollars(annotation.text_content()), display
    for math in maths:
        if math.get("alttext"):
            return _without_dollars(math.get("alttext")), display
        return " ".join(math.text_content().split()), display
    return "", display


def _without_dollars(tex: str) -> str:
    return tex.strip().strip("$").strip()


def _code(element: Any) -> str:
    for line_break in element.iter("br"):
        line_break.tail = "\n" + (line_break.tail or "")
    return element.text_content().replace("\r\n", "\n").strip("\n").rstrip()


def _language(element: Any) -> str:
    """The language that highlighters name in a class of the block, of what is in it or of what is around it."""
    around = [element, *element.iter("code"), *list(element.iterancestors())[:2]]
    for candidate in around:
        if match := _CODE_LANGUAGE.search(candidate.get("class", "")):
            return match[1]
    return ""


def _fenced(code: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`{3,}", code)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"
