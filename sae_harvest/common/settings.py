"""Configuration models as command-line options, and as keys of a YAML file.

A model defines the settings with types, bounds, defaults and descriptions. Options and keys are
made from it, so the three cannot differ. A field that is itself a model is a mapping in YAML, and
its fields are options. Options take precedence over the file.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

import click
from click.core import ParameterSource
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from sae_harvest.common.options import PathOption, grouped
from sae_harvest.common.paths import shown
from sae_harvest.common.yamlfile import read_yaml

T = TypeVar("T", bound=BaseModel)
NONE = "none"
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
MAX_SHOWN = 1e9  # higher bounds keep numbers computable; a user never meets them


@dataclass(frozen=True)
class Option:
    """Metadata of a field that has an option, in its `Annotated`. The fields of a field that is a
    model have options like its own, unless they say otherwise."""

    group: str
    """Heading in the help."""
    metavar: str | None = None
    """Name of a value in the help, such as its unit ROWS; None for its type."""
    name: str | None = None
    """Spelling, such as `--top`; fields with the same spelling are set together.

    None: field's name.
    """


Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    Field(description="device to compute on; auto takes a GPU where there is one"),
    Option("Execution"),
]


@dataclass(frozen=True)
class Setting:
    """One thing to set: a key of the file, and the option that sets it."""

    path: tuple[str, ...]
    """Key in the file, preceded by the keys above it."""
    field: FieldInfo
    """Field of the model."""
    option: Option | None
    """The option; None if only Python and the file can set it."""

    @property
    def spelling(self) -> str:
        """The option as it is typed; the key of a field without an option."""
        if self.option is None:
            return ".".join(self.path)
        return self.option.name or "--" + self.path[-1].replace("_", "-")

    @property
    def parameter(self) -> str:
        """click's name of the option."""
        return self.spelling.removeprefix("--").replace("-", "_")


def settings_of(
    model: type[BaseModel], above: tuple[str, ...] = (), inherited: Option | None = None
) -> list[Setting]:
    """Return every field of a model; a field that is a model is replaced by its fields."""
    found: list[Setting] = []
    for name, field in model.model_fields.items():
        option = next((item for item in field.metadata if isinstance(item, Option)), inherited)
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += settings_of(inner, (*above, name), option)
        else:
            found.append(Setting((*above, name), field, option))
    return found


class FieldType(click.ParamType):
    """The type of an option that sets a field; the field converts and checks the text."""

    def __init__(self, setting: Setting) -> None:
        field = setting.field
        kinds = _alternatives(field.annotation)
        self.kinds = [_bare(kind) for kind in kinds if kind is not NoneType]
        self.may_be_none = NoneType in kinds
        self.is_list = get_origin(self.kinds[0]) is tuple
        annotated: Any = Annotated[field.annotation, field]
        self._adapter: TypeAdapter[Any] = TypeAdapter(annotated)
        unit = setting.option.metavar if setting.option else None
        self.name = "|".join(_type_name(kind, unit) for kind in self.kinds)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"{self.name}|{NONE}" if self.may_be_none and str not in self.kinds else self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value  # a flag
        given: Any = value
        if self.may_be_none and value.lower() == NONE:
            given = None
        elif self.is_list:
            given = [part.strip() for part in value.split(",") if part.strip()]
        try:
            return self._adapter.validate_python(given)
        except ValidationError as error:
            self.fail(f"{_reason(error.errors(), 'it')}.", param, ctx)


def options_for(
    settings: Iterable[Setting], defaults: Mapping[str, Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds an option for each setting that has one.

    Args:
        defaults: the command's defaults, by key, for fields without a default.
    """
    options: dict[str, list[Setting]] = {}
    for setting in settings:
        if setting.option is not None:
            options.setdefault(setting.spelling, []).append(setting)

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for spelling, together in reversed(options.items()):
            kind = FieldType(together[0])
            is_flag = kind.kinds == [bool]
            command = grouped(
                together[0].option.group,  # type: ignore[union-attr]
                f"{spelling}/--no-{spelling.removeprefix('--')}" if is_flag else spelling,
                type=None if is_flag else kind,
                multiple=kind.is_list,
                default=None,
                help=_help(together, defaults or {}),
            )(command)
        return command

    return add


config_file_option = click.option(
    "--config",
    "file",
    type=PathOption(dir_okay=False),
    help="YAML file with any of these options. An option given here takes precedence.",
)


class CommandSettings:
    """The settings of a command, from its file and its options.

    Subclasses name the models: their fields are the keys of the file and the options.

    Args:
        file_values: the file's mapping, or a part of it.
        file: name of the file in errors.
        options: typed options by key, such as "tokens" or "rule.split".

    Raises:
        click.UsageError: an unknown key.
    """

    models: ClassVar[tuple[type[BaseModel], ...]]

    def __init__(
        self, file_values: Mapping[str, Any], file: str, options: Mapping[str, Any]
    ) -> None:
        self._file, self._file_values, self._options = file, file_values, options
        for key in file_values:
            if key not in self.top_keys():
                raise click.UsageError(
                    f"{file} has an unknown key {key!r:.60}{self._instead((str(key),))}."
                )

    @classmethod
    def of(cls, ctx: click.Context, file: Path | None) -> Self:
        """Return the settings from the typed options and the file of `--config`."""
        name = shown(file) if file else ""
        return cls(read_yaml(file) if file else {}, name, cls.typed(ctx))

    @classmethod
    def settings(cls) -> list[Setting]:
        """Return every field of the models."""
        return list(chain.from_iterable(map(settings_of, cls.models)))

    @classmethod
    def top_keys(cls) -> list[str]:
        """Return the keys at the top of the file."""
        return list(chain.from_iterable(model.model_fields for model in cls.models))

    @classmethod
    def typed(cls, ctx: click.Context) -> dict[str, Any]:
        """Return the settings that were typed, by key."""
        found: dict[str, Any] = {}
        for setting in cls.settings():
            name = setting.parameter
            if (
                name in ctx.params
                and setting.option is not None
                and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
            ):
                value = ctx.params[name]
                is_list = FieldType(setting).is_list
                found[".".join(setting.path)] = tuple(chain(*value)) if is_list else value
        return found

    def read(self, model: type[T], defaults: Mapping[str, Any] | None = None) -> T:
        """Return a pydantic model of the given values. Raise `UsageError` for a bad value."""
        values = {**(defaults or {}), **self.values(model)}
        try:
            # as JSON: strict about types, but a list may be given for a tuple
            return model.model_validate_json(json.dumps(values, default=str), strict=True)
        except ValidationError as error:
            raise click.UsageError(self._sentence(model, error.errors())) from None

    def values(self, model: type[BaseModel]) -> dict[str, Any]:
        """Return the given values of a model; options take precedence over the file."""
        values = {
            key: dict(value) if isinstance(value, Mapping) else value
            for key, value in self._file_values.items()
            if key in model.model_fields
        }
        for setting in settings_of(model):
            *above, name = setting.path
            if (key := ".".join(setting.path)) in self._options:
                target = values
                for part in above:
                    if not isinstance(target.get(part), dict):
                        target[part] = {}
                    target = target[part]
                target[name] = self._options[key]
        return values

    def _sentence(self, model: type[BaseModel], errors: Sequence[Any]) -> str:
        """Return the error message, in the spelling in which the value was given."""
        error = errors[0]
        path = _place(error)
        known = {setting.path: setting for setting in settings_of(model)}
        setting = next(
            (known[path[:n]] for n in range(len(path), 0, -1) if path[:n] in known), None
        )
        if error["type"] == "missing":
            option = setting.spelling if setting else path[-1]
            return f"Missing option '{option}'; it may also be a line `{path[-1]}: …` of --config."
        if error["type"] == "extra_forbidden":
            return f"{self._file} has an unknown key {'.'.join(path)!r}{self._instead(path)}."
        if not path:  # an error of several fields: the sentence names them
            return self._spelled(_reason(errors, ""), known.values()) + "."
        if setting is None or not self._is_typed(setting):
            return f"{self._file}: {_reason(errors, '.'.join(path))}."
        return f"{_reason(errors, setting.spelling)}."

    def _is_typed(self, setting: Setting) -> bool:
        return ".".join(setting.path) in self._options

    def _in_file(self, path: tuple[str, ...]) -> bool:
        values: Any = self._file_values
        for key in path:
            if not isinstance(values, Mapping) or key not in values:
                return False
            values = values[key]
        return True

    def _spelled(self, sentence: str, settings: Iterable[Setting]) -> str:
        """Return the sentence with fields spelled as options, except those from the file."""
        named_in_file = False
        by_name = {setting.path[-1]: setting for setting in settings}

        def spell(match: re.Match[str]) -> str:
            nonlocal named_in_file
            setting = by_name.get(match[0])
            if setting is None:
                return match[0]
            if not self._is_typed(setting) and self._in_file(setting.path):
                named_in_file = True
                return match[0]
            return setting.spelling

        spelled = re.sub(r"(?<![\w.-])[a-z]\w*(?![\w-])", spell, sentence)
        return f"{self._file}: {spelled}" if named_in_file else spelled

    def _instead(self, path: tuple[str, ...]) -> str:
        """Return advice on the meant key: that of an option with this name, or a similar key."""
        *above, key = path
        settings = self.settings()
        known = (
            [s.path[-1] for s in settings if s.path[:-1] == tuple(above)]
            if above
            else self.top_keys()
        )
        meant = [".".join(s.path) for s in settings if s.option and s.parameter == key]
        close = meant or difflib.get_close_matches(key, known, n=1)
        return f" (did you mean {close[0]}?)" if close else f"; expected some of {', '.join(known)}"


def _place(error: Any) -> tuple[str, ...]:
    """Return the place of an error, without pydantic's names of a field's alternatives."""
    parts = map(str, error["loc"])
    return tuple(part for part in parts if not part.startswith(("function-", "literal[")))


def _reason(errors: Sequence[Any], name: str) -> str:
    """Return pydantic's errors of one value as a clause about `name`, without a full stop."""
    error = errors[0]
    message = _message(error)
    if error["type"] in ("value_error", "assertion_error"):
        return message
    got = f", got {error['input']!r}" if isinstance(error["input"], str | int | float) else ""
    for other in errors[1:]:  # errors for the other types of the field
        if _place(other) == _place(error):
            message += ", or" + _message(other).removeprefix("Input should be")
    clause = re.sub(r"^(Input|Value|String|List|Tuple) should", f"{name} should", message)
    if clause == message:
        clause = f"{name}: {message[0].lower()}{message[1:]}"
    return clause + got


def _message(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ").removesuffix(".")
    return message.partition(", unable to parse")[0]


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union; the type itself otherwise."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _bare(annotation: Any) -> Any:
    """Return the type without its annotations for pydantic."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _type_name(kind: Any, unit: str | None) -> str:
    """Return the help's name for a value of a type; a choice of words is in brackets."""
    kind = _bare(kind)
    if get_origin(kind) is Literal:
        words = "|".join(map(str, get_args(kind)))
        return words if len(get_args(kind)) == 1 else f"[{words}]"
    if get_origin(kind) is tuple:
        return f"{_type_name(get_args(kind)[0], unit)},…"
    return unit or {int: "INTEGER", float: "NUMBER"}.get(kind, "TEXT")


def _bounds(annotation: Any, metadata: Iterable[Any]) -> Iterator[str]:
    """Yield the bounds of a field and its types, in words."""
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(None, item.metadata)
        for attribute, words in BOUNDS.items():
            limit = getattr(item, attribute, None)
            if limit is not None and limit < MAX_SHOWN:
                yield f"{words} {limit:g}" if isinstance(limit, float) else f"{words} {limit}"
    for kind in _alternatives(annotation):
        if get_origin(kind) is Annotated:
            yield from _bounds(None, get_args(kind)[1:])


def _help(together: list[Setting], defaults: Mapping[str, Any]) -> str:
    """Return the help of an option: descriptions of its fields, bounds and default."""
    field = together[0].field
    text = "; ".join((setting.field.description or "").strip() for setting in together)
    notes = list(_bounds(field.annotation, field.metadata))
    default = None if field.is_required() else field.get_default()
    default = defaults.get(together[0].path[-1], default)
    if isinstance(default, bool):
        default = together[0].spelling.replace("--", "" if default else "no-")
    if default is not None and default != ():
        notes.append(
            f"default: {default:g}" if isinstance(default, float) else f"default: {default}"
        )
    return f"{text[:1].upper()}{text[1:]}." + (f"  [{', '.join(notes)}]" if notes else "")
