"""A training run's settings as command-line options, and as keys of a YAML file.

`TrainConfig` says what there is to set, with types, bounds, defaults and descriptions; options and
keys are made from it, so that the three spellings cannot differ. A field that is itself an object
(`rule`) is a mapping in YAML and its fields are options. Options win over the file.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from click.core import ParameterSource
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from sae_harvest.common.options import PathOption
from sae_harvest.common.paths import absolute, shown
from sae_harvest.common.yamlfile import read_yaml
from sae_harvest.train.config import MAX_WEIGHT, READERS, TrainConfig

T = TypeVar("T", bound=BaseModel)
NONE = "none"
Place = Annotated[str, AfterValidator(absolute)]
# of what a run cannot do without; k only where the activation function has one
DEFAULTS: dict[str, Any] = {"n_latents": 8192, "k": 32, "tokens": 10_000_000}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


class Places(BaseModel):
    """Where a run reads, writes and computes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: Place = Field(
        description="the activation store: a folder, or s3://bucket/prefix",
        json_schema_extra={"metavar": "PLACE"},
    )
    out: Place = Field(
        description="folder of the run; the same command continues a run that is there",
        json_schema_extra={"metavar": "FOLDER"},
    )
    site: str | None = Field(
        None, description="site to train on, such as resid_post.12; none: the store's only one"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to compute")


@dataclass(frozen=True)
class Setting:
    """One thing to set: the path of its key in the file, and the field it becomes."""

    path: tuple[str, ...]
    field: FieldInfo

    @property
    def option(self) -> str:
        return "--" + self.path[-1].replace("_", "-")


def settings_of(model: type[BaseModel], above: tuple[str, ...] = ()) -> list[Setting]:
    """Every field of a model, with the fields of its objects in their place."""
    found: list[Setting] = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += settings_of(inner, (*above, name))
        else:
            found.append(Setting((*above, name), field))
    return found


PLACES, CONFIG = settings_of(Places), settings_of(TrainConfig)
BY_PARAMETER = {setting.path[-1]: setting for setting in PLACES + CONFIG}
KEYS = [*Places.model_fields, *TrainConfig.model_fields]


class FieldType(click.ParamType):
    """The type of an option that sets a field: text is converted and checked as the field says."""

    def __init__(self, field: FieldInfo) -> None:
        kinds = _alternatives(field.annotation)
        self.may_be_none = NoneType in kinds
        (kind,) = (kind for kind in kinds if kind is not NoneType)
        self._is_list = get_origin(kind) is tuple
        annotated: Any = Annotated[field.annotation, field]
        self._adapter: TypeAdapter[Any] = TypeAdapter(annotated)
        self.name = _type_name(kind)
        extra = field.json_schema_extra
        if isinstance(extra, dict) and "metavar" in extra:
            self.name = str(extra["metavar"])

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"{self.name}|{NONE}" if self.may_be_none and self.name != "TEXT" else self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value  # a default
        given: Any = value
        if self.may_be_none and value.lower() == NONE:
            given = None
        elif self._is_list:
            given = [part.strip() for part in value.split(",") if part.strip()]
        try:
            return self._adapter.validate_python(given)
        except ValidationError as error:
            self.fail(f"{_reason(error.errors()[0], 'it')}.", param, ctx)


def options_for(settings: list[Setting]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds an option for each setting."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for setting in reversed(settings):
            command = click.option(
                setting.option,
                setting.path[-1],
                type=FieldType(setting.field),
                default=None,
                help=_help(setting),
            )(command)
        return command

    return add


config_file_option = click.option(
    "--config",
    "file",
    type=PathOption(dir_okay=False),
    help="YAML file with any of these options. An option given here takes precedence.",
)


def run_settings(ctx: click.Context, file: Path | None) -> tuple[Places, TrainConfig]:
    """What the options given and the file say together.

    Raises:
        click.UsageError: an unknown key, a value that does not fit, something missing.
    """
    found = SettingsSource(
        read_yaml(file) if file else {}, shown(file) if file else "", given_options(ctx)
    )
    return found.places(), found.config()


def given_options(ctx: click.Context) -> dict[str, Any]:
    """The settings that were typed, by parameter name."""
    return {
        name: value
        for name, value in ctx.params.items()
        if name in BY_PARAMETER and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }


class SettingsSource:
    """Values from a file and from options, and where each came from.

    Args:
        file_values: the file's mapping, or a part of it.
        file: how errors call the file.
        options: what was typed, by parameter name.
    """

    def __init__(
        self, file_values: Mapping[str, Any], file: str, options: Mapping[str, Any]
    ) -> None:
        self._file, self._file_values, self._options = file, file_values, options
        for key in file_values:
            if key not in KEYS:
                raise click.UsageError(
                    f"{file} has an unknown key {key!r:.60}{_instead(str(key), KEYS)}."
                )

    def places(self) -> Places:
        """Where to read, write and compute. `click.UsageError` if a value does not fit."""
        return self._validated(Places, self._values(PLACES))

    def config(self) -> TrainConfig:
        """The run, with DEFAULTS. `click.UsageError` if a value does not fit."""
        values = self._values(CONFIG)
        reads_k = values.get("activation", "topk") in READERS["k"]
        wanted = {key: value for key, value in DEFAULTS.items() if key != "k" or reads_k}
        return self._validated(TrainConfig, wanted | values)

    def _values(self, settings: list[Setting]) -> dict[str, Any]:
        """What was given of these settings, options before the file."""
        keys = {setting.path[0] for setting in settings}
        values = {
            key: dict(value) if isinstance(value, Mapping) else value
            for key, value in self._file_values.items()
            if key in keys
        }
        for setting in settings:
            *above, name = setting.path
            if name in self._options:
                target = values
                for key in above:
                    if not isinstance(target.get(key), dict):
                        target[key] = {}
                    target = target[key]
                target[name] = self._options[name]
        return values

    def _validated(self, model: type[T], values: dict[str, Any]) -> T:
        try:
            # as JSON: strict about types, but a list may be given for a tuple
            return model.model_validate_json(json.dumps(values, default=str), strict=True)
        except ValidationError as error:
            raise click.UsageError(self._sentence(error.errors()[0])) from None

    def _sentence(self, error: Any) -> str:
        """What is wrong, in the spelling that the value was given in."""
        path = tuple(map(str, error["loc"]))
        name = path[-1] if path else ""
        from_file = self._in_file(path) and name not in self._options
        if error["type"] == "missing":
            option = BY_PARAMETER[name].option if name in BY_PARAMETER else name
            return f"Missing option '{option}'; it may also be a line `{name}: …` of --config."
        if error["type"] == "extra_forbidden":
            known = [s.path[-1] for s in CONFIG + PLACES if s.path[:-1] == path[:-1]]
            return f"{self._file} has an unknown key {'.'.join(path)!r}{_instead(name, known)}."
        if path:
            if from_file:
                return f"{self._file}: {_reason(error, '.'.join(path))}."
            return f"{_reason(error, BY_PARAMETER[name].option)}."
        # of several fields together: the sentence names them
        return self._spelled(_reason(error, "")) + "."

    def _in_file(self, path: tuple[str, ...]) -> bool:
        values: Any = self._file_values
        for key in path:
            if not isinstance(values, Mapping) or key not in values:
                return False
            values = values[key]
        return bool(path)

    def _spelled(self, sentence: str) -> str:
        """The sentence with the names of fields as options, except those that the file gives."""
        named_in_file = False

        def spell(match: re.Match[str]) -> str:
            nonlocal named_in_file
            setting = BY_PARAMETER.get(match[0])
            if setting is None or setting in PLACES:
                return match[0]
            if match[0] not in self._options and self._in_file(setting.path):
                named_in_file = True
                return match[0]
            return setting.option

        spelled = re.sub(r"(?<![\w.-])[a-z]\w*(?![\w-])", spell, sentence)
        return f"{self._file}: {spelled}" if named_in_file else spelled


def _reason(error: Any, name: str) -> str:
    """A pydantic error as a clause about `name`, without a full stop."""
    message = str(error["msg"]).removeprefix("Value error, ").removesuffix(".")
    if error["type"] in ("value_error", "assertion_error"):
        return message
    got = f", got {error['input']!r}" if isinstance(error["input"], str | int | float) else ""
    clause = re.sub(r"^(Input|Value|String|List|Tuple) should", f"{name} should", message)
    if clause == message:
        clause = f"{name}: {message[0].lower()}{message[1:]}"
    return clause + got


def _instead(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]}?)" if close else f"; expected some of {', '.join(known)}"


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types of a union; the type itself otherwise."""
    if get_origin(annotation) in (Union, UnionType):
        return tuple(map(_bare, get_args(annotation)))
    return (_bare(annotation),)


def _bare(annotation: Any) -> Any:
    """The type without what pydantic is told of it."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _type_name(kind: Any) -> str:
    kind = _bare(kind)
    if get_origin(kind) is Literal:
        return "[" + "|".join(map(str, get_args(kind))) + "]"
    if get_origin(kind) is tuple:
        return f"{_type_name(get_args(kind)[0])},…"
    return {int: "INTEGER", float: "NUMBER", bool: "BOOLEAN"}.get(kind, "TEXT")


def _help(setting: Setting) -> str:
    """Description, bounds and default."""
    field, name = setting.field, setting.path[-1]
    text = (field.description or "").strip()
    notes = [
        f"{words} {limit:g}"
        for item in field.metadata
        for attribute, words in BOUNDS.items()
        if (limit := getattr(item, attribute, None)) is not None and limit < MAX_WEIGHT
    ]
    default = None if field.is_required() else field.get_default()
    default = DEFAULTS.get(name, default)
    if default is not None and default != ():
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        notes.append(f"default: {shown}")
    return f"{text[:1].upper()}{text[1:]}." + (f"  [{', '.join(notes)}]" if notes else "")
