"""The edge to gin: layers of gin files and flags in, one checked config object out.

Order, later wins: the files in the order given, then the flags. Libraries never see gin: files name plain config
classes through `from __gin__ import dynamic_registration`, and a run builds one object from them.
"""

import contextlib
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin

from cpm_jax.common.config import ConfigError
from cpm_jax.common.gin_files import (
    GIN_ROOT,
    LAYERS,
    REQUIRED,
    GinFile,
    Reference,
    Setting,
    find_gin_file,
    list_gin_files,
    parse_flag,
    read_gin_text,
    suggest,
    verbs_with_macro,
    with_includes,
)

_MAX_LINE = 120


class Settings:
    """Parsed gin files and flags, from which one config object is built.

    Gin keeps its state in the process: parsing a second time forgets the first.

    Attributes:
        files: every file read, in pieces where files include others.
        settings: every assignment in order; a later one of the same key wins.
    """

    def __init__(self, gin_files: Sequence[str | Path], flags: Sequence[str], root: type):
        """Parses and checks; imports the modules that the files name.

        Args:
            gin_files: names or paths, in order.
            flags: `--gin.NAME=VALUE`, applied after all files.
            root: the config class that will be built, so that flags can name it.

        Raises:
            ConfigError: a file is missing or is not gin; a name in it or in a flag is unknown; a macro is required,
                undefined, or used by nothing.
        """
        self.root = root
        paths = [find_gin_file(str(name)) for name in gin_files]
        self.files: list[GinFile] = [file for path in paths for file in with_includes(path)]
        flag_settings = [parse_flag(flag) for flag in flags]
        self.settings: list[Setting] = [s for file in self.files for s in file.settings] + flag_settings

        self._classes: dict[str, Any] = {f"{root.__module__}.{root.__qualname__}": root}
        for file in self.files:
            self._resolve(file)
        for setting in flag_settings:
            self._check_names(setting, self._lookup)
        self._check_macros()

        gin.clear_config()
        _register(root)
        with _as_config_error():
            # As text of ours, not as files: gin would look for includes along a path of its own.
            dead = self._dead_macros()
            for file in self.files:
                alive = [setting for setting in file.settings if not (setting.is_macro and setting.name in dead)]
                gin.parse_config([*_import_lines(file), *map(_as_gin, alive)])
            gin.parse_config([_as_gin(setting) for setting in flag_settings])
            gin.finalize()

    # ---------------------------------------------------------------- names

    def _resolve(self, file: GinFile) -> None:
        """Imports what a file imports, and checks every class and parameter that it names."""
        symbols: dict[str, Any] = {}
        for statement in file.imports:
            where = f"{file.name}:{statement.location.line_num}"
            try:
                module = importlib.import_module(statement.module)
            except ModuleNotFoundError as error:
                raise ConfigError(f"{where}: {statement.format()}: {error}") from None
            name = statement.bound_name()
            is_whole = statement.is_from or statement.alias
            symbols[name] = module if is_whole else importlib.import_module(name)

        def lookup(selector: str, where: str) -> Any:
            if not symbols:
                return self._lookup(selector, where)
            first, *rest = selector.split(".")
            if first not in symbols:
                raise ConfigError(f"{where}: {selector}: {first!r} is not imported{suggest(first, list(symbols))}")
            found = symbols[first]
            for part in rest:
                if not hasattr(found, part):
                    raise ConfigError(f"{where}: {selector}: no {part!r} there{suggest(part, _public(found))}")
                found = getattr(found, part)
            self._classes[f"{found.__module__}.{found.__qualname__}"] = found
            return found

        for setting in file.settings:
            self._check_names(setting, lookup)

    def _lookup(self, selector: str, where: str) -> Any:
        """Finds a class that some file names, by the end of its dotted name."""
        matches = {n: c for n, c in self._classes.items() if n == selector or n.endswith("." + selector)}
        if len(matches) == 1:
            return next(iter(matches.values()))
        if matches:
            raise ConfigError(f"{where}: {selector!r} is ambiguous: {', '.join(matches)}")
        known = sorted({c.__qualname__ for c in self._classes.values()})
        raise ConfigError(
            f"{where}: nothing named {selector!r} is configured here{suggest(selector.rpartition('.')[2], known)}\n"
            f"  known: {', '.join(known)}"
        )

    def _check_names(self, setting: Setting, lookup: Any) -> None:
        for reference in setting.references:
            if not reference.is_macro:
                lookup(reference.name.rpartition("/")[2], setting.where)
        if setting.is_macro:
            return
        target = lookup(setting.selector, setting.where)
        accepted = [p for p in inspect.signature(target).parameters if p != "self"]
        if setting.name not in accepted:
            raise ConfigError(
                f"{setting.where}: {target.__qualname__} has no parameter {setting.name!r}"
                f"{suggest(setting.name, accepted)}\n  accepted: {', '.join(accepted)}"
            )

    # --------------------------------------------------------------- macros

    def _check_macros(self) -> None:
        macros = {s.name: s for s in self.settings if s.is_macro}
        users = {r.name: s for s in self.settings for r in s.references if r.is_macro and r != REQUIRED}
        problems = []
        if not any(self._is_root(s) for s in self.settings):
            verb = self.root.__module__.rpartition(".")[2]
            problems.append(
                f"no gin file configures {self.root.__qualname__}: add --gin_file=runs/{verb}.gin at the end"
            )
        for name, setting in macros.items():
            # A file may offer an object that this job does not need: the model, to a job without one.
            offered = not setting.from_flag and isinstance(setting.value, Reference) and not setting.value.is_macro
            if name not in users and not offered:
                shown = setting.where if setting.from_flag else f"{setting.where}: {name}"
                near = suggest(name, list(users)) or f"\n  macros: {', '.join(sorted(users))}"
                verbs = verbs_with_macro(name)
                elsewhere = f"\n  {name} is a macro of {', '.join(verbs)}" if verbs else ""
                problems.append(f"{shown}: no gin file uses the macro {name}{near}{elsewhere}")
        final = {(s.scope, s.key): s for s in self.settings}.values()
        needed = {r.name: s for s in final for r in s.references if r.is_macro and r != REQUIRED}
        without = {name: s for name, s in needed.items() if name not in macros}
        without |= {name: s for name, s in macros.items() if s.value == REQUIRED and name in needed}
        problems += self._missing(without)
        if problems:
            raise ConfigError("\n".join(problems))

    def _dead_macros(self) -> set[str]:
        """Finds macros that only settings use which a later one replaces; a saved config does not have them."""
        final = {(s.scope, s.key): s for s in self.settings}.values()
        dead: set[str] = set()
        while True:
            alive = [s for s in final if not (s.is_macro and s.name in dead)]
            found = {s.name for s in final if s.is_macro} - {r.name for s in alive for r in s.references}
            if found == dead:
                return dead
            dead = found

    def _missing(self, without: Mapping[str, Setting]) -> list[str]:
        """Describes macros without a value, each with the setting that requires or uses it; a layer in one line."""
        problems, layers = [], dict[tuple[str, str], list[str]]()
        for name, setting in without.items():
            file = setting.where.rpartition(":")[0]
            earlier = [s.where for s in self.settings if s.is_macro and s.name == name and s.value != REQUIRED]
            if earlier:
                problems.append(f"{name}: {earlier[-1]} sets it, but {file} comes later: give {file} first")
            elif definers := _definers(name, file):
                layers.setdefault((file, definers), []).append(name)
            else:
                about = f" ({setting.comment})" if setting.value == REQUIRED and setting.comment else ""
                problems.append(f"{name} is required by {setting.where}{about}: set it with --gin.{name}=…")
        for (file, definers), names in layers.items():
            verb = "is" if len(names) == 1 else "are"
            problems.append(
                f"{', '.join(names)} {verb} required by {file}: add one of {definers}, or set --gin.{names[0]}=…"
            )
        return problems

    def _is_root(self, setting: Setting) -> bool:
        return setting.selector.rpartition(".")[2] == self.root.__qualname__

    # ------------------------------------------------------------- building

    def build(self) -> Any:
        """Builds the root config.

        Raises:
            ConfigError: a value is of a wrong type or does not fit the others, with where each came from; or a flag
                has no effect on this config.
        """
        try:
            config = gin.get_configurable(self.root)()
        except ConfigError as error:
            raise self.with_origins(error) from None
        self._check_used()
        return config

    def with_origins(self, error: ConfigError) -> ConfigError:
        """Returns the error with where each "Class.field" of its message was set, through macros."""
        message = str(error).partition("\n  In call to configurable")[0]
        lines = [message]
        for key in dict.fromkeys([*re.findall(r"\b[A-Za-z_]\w*\.[a-z]\w*", message), error.field]):
            # Fields without a binding keep their default: nothing to trace. A bare name is that of a parameter.
            setting = next((s for s in reversed(self.settings) if not s.is_macro and key in (s.key, s.name)), None)
            while setting is not None:
                shown = setting.where if setting.from_flag else f"{setting.key} = {setting.value!r}  ({setting.where})"
                if f"  set by {shown}" not in lines:
                    lines.append(f"  set by {shown}")
                macro = next((r.name for r in setting.references if r.is_macro), None)
                setting = next((s for s in reversed(self.settings) if s.is_macro and s.name == macro), None)
        return ConfigError("\n".join(lines), field=error.field)

    def _check_used(self) -> None:
        """Refuses flags that set what nothing in the built config reads."""
        used = {(s.scope, s.key) for s in read_gin_text(self.operative_config_str()).settings}
        for setting in self.settings:
            if not setting.from_flag:
                continue
            reached = any(
                key == setting.key and (scope + "/").startswith(setting.scope and setting.scope + "/")
                for scope, key in used
            )
            if not reached:
                raise ConfigError(
                    f"{setting.where}: has no effect: nothing in this {self.root.__qualname__} reads {setting.key}"
                )

    def config_str(self) -> str:
        """Returns every macro and binding as one gin file that gives the same config again."""
        return gin.config_str(max_line_length=_MAX_LINE) + "\n"

    def operative_config_str(self) -> str:
        """Returns every parameter of what was built, defaults too, as gin."""
        return gin.operative_config_str(max_line_length=_MAX_LINE) + "\n"


def _register(cls: type) -> None:
    try:
        gin.get_configurable(cls)
    except ValueError:  # no file named it yet in this process
        gin.register(module=cls.__module__)(cls)


def _import_lines(file: GinFile) -> list[str]:
    lines = [statement.format() for statement in file.imports]
    return ["from __gin__ import dynamic_registration", *lines] if lines else []


def _as_gin(setting: Setting) -> str:
    scope = f"{setting.scope}/" if setting.scope else ""
    selector = f"{setting.selector}." if setting.selector else ""
    return f"{scope}{selector}{setting.name} = {setting.value!r}"


def _definers(macro: str, required_by: str) -> str:
    """Lists the files of other layers that give a macro a value; run files are chosen, not added."""
    layers = [layer for layer in LAYERS if layer != required_by.partition("/")[0]]
    return ", ".join(
        str(path.relative_to(GIN_ROOT))
        for layer in layers
        for path in list_gin_files(layer)
        if macro in {s.key for file in with_includes(path) for s in file.settings if s.value != REQUIRED}
    )


def _public(module: Any) -> list[str]:
    return [name for name in dir(module) if not name.startswith("_")]


@contextlib.contextmanager
def _as_config_error() -> Iterator[None]:
    """What gin itself finds wrong is the user's to mend, too."""
    try:
        yield
    except (ValueError, RuntimeError, NameError, AttributeError, SyntaxError) as error:
        raise ConfigError(str(error)) from error
