"""Reading gin files as text: what they set, need and say about themselves, without importing what they name.

`--help` and every message about configuration stand on this; building objects is `gin_utils.py`.
"""

import ast
import dataclasses
import difflib
import io
import itertools
import re
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gin import config_parser

from cpm_jax.common.config import ConfigError

_NAME = re.compile(r"([A-Za-z_]\w*/)*([A-Za-z_]\w*\.)*[A-Za-z_]\w*")  # scope/module.Class.parameter
# Folders of the gin files that a command may give before its run file, in that order.
LAYERS = ("arch", "size", "data", "optim")
GIN_ROOT = Path(__file__).resolve().parents[2] / "gin_configs"


@dataclasses.dataclass(frozen=True)
class Reference:
    """A `%MACRO` or an `@scope/module.Class()` inside a value.

    Attributes:
        name: what follows the sign, without parentheses.
        is_macro: whether it is a macro.
        evaluate: whether an `@` reference is called.
    """

    name: str
    is_macro: bool
    evaluate: bool = True

    def __repr__(self) -> str:
        return f"%{self.name}" if self.is_macro else f"@{self.name}{'()' if self.evaluate else ''}"


REQUIRED = Reference("gin.REQUIRED", is_macro=True)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One assignment of a gin file or of a flag.

    Attributes:
        scope: gin scope of a binding, "" without.
        selector: "config.ModelConfig" of a binding, "" for a macro.
        name: the parameter, or the macro.
        value: a literal, possibly with `Reference`s in it.
        where: "size/5m.gin:7", or the flag.
        comment: what stands behind it on its line.
        from_flag: whether it was given on the command line.
    """

    scope: str
    selector: str
    name: str
    value: Any
    where: str
    comment: str = ""
    from_flag: bool = False

    @property
    def is_macro(self) -> bool:
        """Whether this sets a macro rather than a parameter."""
        return not self.selector

    @property
    def key(self) -> str:
        """Name in messages and config errors: "D_MODEL", "ModelConfig.d_model"."""
        return self.name if self.is_macro else f"{self.selector.rpartition('.')[2]}.{self.name}"

    @property
    def references(self) -> list[Reference]:
        """References anywhere inside the value."""
        return list(_references(self.value))


@dataclasses.dataclass(frozen=True)
class GinFile:
    """What a gin file says.

    Attributes:
        path: the file.
        name: how messages call it, as short as is clear.
        header: its leading comment.
        imports: its import statements, without gin's own.
        settings: its assignments in order, without those of included files.
        includes: names of the files it includes, each with the number of settings that stand before it.
    """

    path: Path
    name: str
    header: str
    imports: tuple[config_parser.ImportStatement, ...]
    settings: tuple[Setting, ...]
    includes: tuple[tuple[int, str], ...]


def _references(value: Any) -> Iterator[Reference]:
    if isinstance(value, Reference):
        yield value
    elif isinstance(value, dict):
        yield from _references([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _references(item)


class _Syntax(config_parser.ParserDelegate):
    """Keeps references as names."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        return Reference(scoped_configurable_name, is_macro=False, evaluate=evaluate)

    def macro(self, macro_name: str) -> Reference:
        return Reference(macro_name, is_macro=True)


def suggest(name: str, known: Sequence[str]) -> str:
    """Returns "; did you mean A or B?" for the known names close to `name`, else "".

    Args:
        name: what the user wrote.
        known: what would have been accepted.
    """
    folded = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), list(folded), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(folded[c] for c in close)}?" if close else ""


def find_gin_file(name: str) -> Path:
    """Finds a gin file by path, or by its name below the repository's `gin_configs`.

    Args:
        name: "size/5m.gin", or a relative or absolute path.

    Raises:
        ConfigError: there is no such file.
    """
    for path in (Path(name).expanduser(), GIN_ROOT / name):
        if path.is_file():
            return path.resolve()
    known = [str(path.relative_to(GIN_ROOT)) for path in list_gin_files()]
    raise ConfigError(
        f"no gin file {name!r} in the current folder or in {GIN_ROOT}{suggest(name, known)}\n"
        f"  files there: {', '.join(known)}"
    )


def list_gin_files(below: str = "") -> list[Path]:
    """Lists the repository's gin files.

    Args:
        below: folder inside `gin_configs`, "" for all.
    """
    return sorted((GIN_ROOT / below).rglob("*.gin"))


def verbs_with_macro(name: str) -> list[str]:
    """The verbs whose run files set a macro, by the commands in their headers."""
    texts = (path.read_text(encoding="utf-8") for path in list_gin_files("runs"))
    commands = (re.search(r"experiments\.run (\w+)", text) for text in texts if re.search(rf"^{name} = ", text, re.M))
    return sorted({command[1] for command in commands if command})


def _short_name(path: Path) -> str:
    for root in (GIN_ROOT, Path.cwd()):
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    return str(path)


def _comment(line: str) -> str:
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(line.strip()).readline))
    except tokenize.TokenError:  # the line opens a bracket that a later one closes
        return ""
    return next((t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT), "")


def read_gin_file(path: Path) -> GinFile:
    """Reads a gin file without importing anything it names.

    Raises:
        ConfigError: the file cannot be read, or is not gin; says where.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return read_gin_text(text, path)


def read_gin_text(text: str, path: Path = Path("config.gin")) -> GinFile:
    """Reads gin text; see `read_gin_file`.

    Args:
        text: the content of a gin file.
        path: where messages say it is from.
    """
    name = _short_name(path)
    header = list(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()))
    imports, settings, includes = [], [], []
    try:
        for item in config_parser.ConfigParser(text, _Syntax()):
            if isinstance(item, config_parser.BindingStatement):
                where, comment = f"{name}:{item.location.line_num}", _comment(item.location.line_content)
                if item.arg_name:
                    settings.append(Setting(item.scope, item.selector, item.arg_name, item.value, where, comment))
                else:  # gin parses `NAME = 1` as a selector without a parameter
                    settings.append(Setting("", "", item.selector, item.value, where, comment))
            elif isinstance(item, config_parser.ImportStatement):
                if not item.module.startswith("__gin__"):
                    imports.append(item)
            elif isinstance(item, config_parser.IncludeStatement):
                includes.append((len(settings), item.filename))
    except SyntaxError as error:
        raise ConfigError(f"{name}:{error.lineno}: {error.msg}\n  {(error.text or '').strip()}") from None
    except tokenize.TokenError as error:
        raise ConfigError(f"{name}:{error.args[1][0]}: {error.args[0]}") from None
    lines = "\n".join(line.removeprefix("#").removeprefix(" ") for line in header)
    return GinFile(path, name, lines, tuple(imports), tuple(settings), tuple(includes))


def with_includes(path: Path, includers: tuple[Path, ...] = ()) -> list[GinFile]:
    """Returns a file and what it includes, cut into pieces that are in the order in which gin reads them.

    Args:
        path: the file.
        includers: the files on whose behalf it is read.

    Raises:
        ConfigError: a file cannot be read, or includes itself.
    """
    file = read_gin_file(path)
    if path in includers:
        raise ConfigError(f"{file.name} includes itself, by {', '.join(_short_name(p) for p in includers)}")
    pieces, done = [], 0
    for count, name in file.includes:
        pieces.append(dataclasses.replace(file, settings=file.settings[done:count]))
        try:
            included = find_gin_file(name)
        except ConfigError as error:
            raise ConfigError(f"{file.name}: include {name!r}: {error}") from None
        pieces += with_includes(included, (*includers, path))
        done = count
    return [*pieces, dataclasses.replace(file, settings=file.settings[done:])]


def parse_flag(flag: str) -> Setting:
    """Reads a flag `--gin.NAME=VALUE`.

    A value that is no gin literal (a path, a word) is taken as a string.

    Args:
        flag: with or without the leading dashes and "gin.".

    Raises:
        ConfigError: the flag has no "=", its name is none, or a dict in its value names a key twice.
    """
    left, equals, text = flag.removeprefix("--").removeprefix("gin.").partition("=")
    shown = f"--gin.{left}{equals}{text}"
    if not equals:
        raise ConfigError(f"{shown}: write the value after an equals sign, as in --gin.{left or 'BATCH_SIZE'}=8")
    if not _NAME.fullmatch(left):
        raise ConfigError(f"{shown}: {left!r} is neither a macro (BATCH_SIZE) nor a binding (ModelConfig.num_layers)")
    scope, _, dotted = left.rpartition("/")
    selector, _, name = dotted.rpartition(".")
    if twice := _repeated_keys(text):
        raise ConfigError(f"{shown}: {twice[0]!r} is named twice, and Python would keep the last")
    return Setting(scope, selector, name, _parse_value(text), where=shown, from_flag=True)


def _repeated_keys(text: str) -> list[Any]:
    """The keys that a literal dict in `text` has more than once."""
    try:
        dicts = [node for node in ast.walk(ast.parse(text.strip(), mode="eval")) if isinstance(node, ast.Dict)]
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    keys = [[key.value for key in found.keys if isinstance(key, ast.Constant)] for found in dicts]
    return [key for found in keys for key in found if found.count(key) > 1]


def _parse_value(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    if "%" in text or "@" in text:  # a reference, or a container of some
        try:
            return next(config_parser.ConfigParser(f"X = {text}\n", _Syntax())).value
        except (SyntaxError, tokenize.TokenError):
            pass
    return text
