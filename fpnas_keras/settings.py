"""Settings of a job as fields of a dataclass, and the command-line flags made from them.

A field states the type, default, range and help of a setting once. `Settings` checks the values,
whether they come from Python or from flags.
"""

import contextlib
import dataclasses
import math
import numbers
import os
import shlex
import sys
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Self

from absl import flags

from fpnas_keras.errors import UserError
from fpnas_keras.files import abbreviate, find_file

FLAG_FILE = "flagfile"
# NumPy takes no larger seed.
MAX_SEED = 2**32 - 1


def setting(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    choices: Sequence[str] = (),
    group: str = "Others",
    basic: bool = False,
    path: bool = False,
    may_change: bool = False,
    positional: bool = False,
    of: "type[Settings] | None" = None,
    without: Collection[str] = (),
) -> Any:
    """A field of a `Settings` class.

    Args:
        help: What it sets, with its unit and what a larger value does.
        default: Its default. A setting without one must be given.
        least: Least number.
        most: Largest number.
        choices: The values that are allowed.
        group: Heading that it stands under in `--help`.
        basic: Whether `--help` shows it first, among the few that a newcomer needs.
        path: Whether it may name a file that comes with the package, such as
            `configs/architectures/mobilenet_v2.json`.
        may_change: Whether a run can be continued with another value.
        positional: Whether it takes the arguments of a command that are no flags, as texts.
        of: Settings of another job, some of which this setting holds, as a dict by name. Each has a
            flag of its own: `--train.epochs=50` for the setting `train`.
        without: Names of the settings of that job which it may not hold.
    """
    metadata = {
        "help": help,
        "least": least,
        "most": most,
        "choices": tuple(choices),
        "group": group,
        "basic": basic,
        "path": path,
        "may_change": may_change,
        "positional": positional,
        "of": of,
        "without": frozenset(without),
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a job. Subclasses add fields made by `setting`, and checks across fields.

    Raises:
        UserError: When a value has the wrong type or is out of its range.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        self.check()

    def check(self) -> None:
        """Raises `UserError` when settings do not fit together."""

    @classmethod
    def from_flags(cls, arguments: Sequence[str]) -> Self:
        """Reads settings from command-line flags such as `["--epochs=3", "--nodownload"]`.

        Raises:
            UserError: When a flag is unknown, missing or has a bad value.
        """
        given = parse_flags(define_flags(cls), arguments, find_positional(cls))
        check_required(cls, given)
        return cls(**given)

    def to_flags(self) -> list[str]:
        """The flags that give these settings, sorted by name, without those that are `None`."""
        flags = []
        for name, value in sorted(self.given().items()):
            if isinstance(value, Mapping):
                flags += [format_flag(f"{name}.{key}", each) for key, each in sorted(value.items())]
            else:
                flags.append(format_flag(name, value))
        return flags

    def given(self) -> dict[str, Any]:
        """The settings by name, without those that are `None`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def may_change(cls) -> set[str]:
        """Names of the settings that may be different when a run is continued."""
        return {each.name for each in dataclasses.fields(cls) if each.metadata["may_change"]}

    def defaults(self) -> set[str]:
        """Names of the settings that have their default."""
        return {
            each.name
            for each in dataclasses.fields(self)
            if getattr(self, each.name) == each.default
        }

    def name_changed(self, names: Iterable[str]) -> str:
        """The flags among some that do not have their default, for a message; empty if none."""
        return ", ".join(f"--{name}" for name in sorted(set(names) - self.defaults()))

    def to_arguments(self, names: Iterable[str]) -> str:
        """Some of the flags, to be typed in another command; without those at their default."""
        defaults = self.defaults()
        given = [name for name in names if name not in defaults]
        return shlex.join(format_flag(name, getattr(self, name)) for name in given)


def find_positional(cls: type[Settings]) -> str | None:
    """Name of the setting that takes the arguments that are no flags."""
    names = (each.name for each in dataclasses.fields(cls) if each.metadata["positional"])
    return next(names, None)


def define_flags(cls: type[Settings]) -> flags.FlagValues:
    """Flags for the fields of a `Settings` class, apart from absl's global flags."""
    values = flags.FlagValues()
    for field in dataclasses.fields(cls):
        if field.metadata["of"] is None:
            default = None if field.default is dataclasses.MISSING else field.default
            _define_flag(values, field.name, field, default)
        else:
            # Also those that it may not hold, so that the error says so.
            for inner in dataclasses.fields(field.metadata["of"]):
                _define_flag(values, f"{field.name}.{inner.name}", inner, None)
    return values


def _define_flag(values, name, field, default):
    if kind_of(field) is bool:
        flags.DEFINE_boolean(name, default, "", flag_values=values)
    else:
        flags.DEFINE(_Parser(field, name), name, default, "", values)


def parse_flags(
    values: flags.FlagValues, arguments: Sequence[str], positional: str | None = None
) -> dict[str, Any]:
    """Values of the flags that are given.

    Args:
        values: The flags, as from `define_flags`.
        arguments: Arguments of the command line.
        positional: Name of the setting that takes the arguments that are no flags.

    Raises:
        UserError: When a flag is unknown or has a bad value, or an argument is no flag and there is
            no such setting.
    """
    try:
        others = values(["", *map(_with_found_flag_file, arguments)])[1:]
    except flags.Error as error:
        # absl wraps what `_Parser` raises, which names the flag already.
        cause = error.__context__
        raise cause if isinstance(cause, UserError) else UserError(str(error)) from None
    except UnicodeDecodeError as error:
        raise UserError(f"`{FLAG_FILE}` must be text in UTF-8. Received: {error}") from None
    except RecursionError:
        raise UserError(f"`{FLAG_FILE}` is nested too deeply") from None
    except ValueError as error:  # as of --nodownload=1
        raise UserError(str(error)) from None
    if others and positional is None:
        raise UserError(f"unexpected argument {others[0]!r}; flags begin with --")
    given = {}
    for name in values:
        if values[name].present:
            outer, dot, inner = name.partition(".")
            if dot:
                given.setdefault(outer, {})[inner] = values[name].value
            else:
                given[name] = values[name].value
    return given | {positional: tuple(others)} if others else given


def check_required(cls: type[Settings], given: Iterable[str]) -> None:
    """Raises `UserError` when a setting without a default is not given."""
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.name not in given:
            name = field.name.upper() if field.metadata["positional"] else f"--{field.name}"
            raise UserError(f"{name} must be given: {field.metadata['help']}")


def format_flag(name: str, value: Any) -> str:
    """A flag as it stands in a flag file and on a command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no{name}"
    text = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return f"--{name}={text}"


def flag_values(lines: Iterable[str]) -> dict[str, str]:
    """The inverse of `format_flag`, as text; switches are "true" or "false"."""
    values = {}
    for line in lines:
        name, given, value = line.removeprefix("--").partition("=")
        if not given:
            name, value = (name[2:], "false") if name.startswith("no") else (name, "true")
        values[name] = value
    return values


def kind_of(field: dataclasses.Field) -> type:
    """int, float, bool, str, tuple or Mapping: the type of a setting that may also be `None`."""
    kind = _annotation(field)
    return typing.get_origin(kind) or kind


def _annotation(field):
    """The type of a setting without `None`, such as `tuple[int, ...]`."""
    kind = field.type
    if isinstance(kind, types.UnionType):
        kind = next(each for each in kind.__args__ if each is not types.NoneType)
    return kind


class _Parser(flags.ArgumentParser):
    """Parses and checks the flag of one field."""

    def __init__(self, field, name):
        super().__init__()
        self._field = field
        self._name = name

    def parse(self, argument):
        kind = kind_of(self._field)
        if isinstance(argument, str) and kind is tuple:
            of, *_ = typing.get_args(_annotation(self._field))
            argument = tuple(_parse(of, each) for each in argument.split(",") if argument)
        elif isinstance(argument, str):
            argument = _parse(kind, argument)
        return _checked(self._field, argument, self._name)

    def flag_type(self):
        return kind_of(self._field).__name__


def _parse(kind, text):
    """A number if it is one. `_checked` says what was expected otherwise."""
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _checked(field, value, name=None):
    """The value in the type of the field, or a `UserError` that names it by `name`."""
    name = name or field.name
    if value is None and field.default is None:
        return None
    kind = kind_of(field)
    if kind is Mapping:
        return _checked_inner(field, value)
    if kind in (int, float):
        return _checked_number(field, kind, value, name)
    if kind is tuple:
        return _checked_list(field, value, name)
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind is str and isinstance(value, str):  # `--output_dir=~/x` is not expanded by shells.
        value = os.path.expanduser(value)
    if not isinstance(value, kind):
        raise _error(name, {str: "text", bool: "true or false"}[kind], value)
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise _error(name, f"one of {', '.join(choices)}", value)
    return find_file(value) if field.metadata["path"] else value


def _checked_inner(field, value):
    """Settings of another job by name, or a `UserError`."""
    if not isinstance(value, Mapping):
        raise _error(field.name, "a dict of settings by name", value)
    inner, known = {each.name: each for each in dataclasses.fields(field.metadata["of"])}, {}
    for name, each in value.items():
        if name in field.metadata["without"]:
            raise UserError(
                f"`{field.name}.{name}` cannot be given: the job itself sets it. "
                f"Received: {field.name}.{name}={each}"
            )
        if name not in inner:
            raise UserError(
                f"`{field.name}` must hold settings of {field.metadata['of'].__name__}. "
                f"Received: {field.name}.{name}={each}"
            )
        if each is not None:
            known[name] = _checked(inner[name], each, f"{field.name}.{name}")
    return known


def _checked_list(field, value, name):
    """A tuple of texts or numbers. A number may stand for a list of one."""
    of, *_ = typing.get_args(_annotation(field))
    if of is str:
        is_list = isinstance(value, (list, tuple))
        if not is_list or not all(isinstance(each, (str, os.PathLike)) for each in value):
            raise _error(name, "a list of texts", value)
        return tuple(map(os.fspath, value))
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not values:
        raise _error(name, "a list of numbers", value)
    return tuple(_checked_number(field, of, each, name) for each in values)


def _checked_number(field, kind, value, name):
    least, most = field.metadata["least"], field.metadata["most"]
    legal = numbers.Integral if kind is int else numbers.Real
    is_number = isinstance(value, legal) and not isinstance(value, bool)
    # Also finite: NaN is in no range, and no integer is above all floats but in a message.
    if not is_number or not least <= value <= most or abs(value) > sys.float_info.max:
        raise _error(name, _describe_range(kind, least, most), value)
    return kind(value)


def _describe_range(kind, least, most):
    text = "an integer" if kind is int else "a finite number"
    text += "" if least == -math.inf else f" from {_format_limit(least)}"
    return text if most == math.inf else f"{text} to {_format_limit(most)}"


def _format_limit(limit):
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"


def _error(name, expected, value):
    received = value if isinstance(value, str) else abbreviate(value)
    return UserError(f"`{name}` must be {expected}. Received: {name}={received}")


def _with_found_flag_file(argument):
    name, equals, path = argument.partition("=")
    if name.lstrip("-") == FLAG_FILE and equals:
        return f"--{FLAG_FILE}={find_file(os.path.expanduser(path))}"
    return argument
