"""Typed configurations from plain mappings: unknown keys and wrong types are errors that name the key and the remedy."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from clbench.errors import ConfigError, unknown_name

T = TypeVar("T")


def coerce(value: Any, kind: Any, where: str) -> Any:
    """``value`` as the annotated type ``kind``; text (from a command line or a data-set id) is parsed.

    Raises:
        ConfigError: names ``where``, the value and the expected type.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind in (tuple, list, dict):  # without the type of their elements
        origin = kind
    if kind is Any or kind is inspect.Parameter.empty or isinstance(kind, str | TypeVar):
        return value
    if origin is Literal:
        for option in args:
            if (type(value) is type(option) and value == option) or (isinstance(value, str) and value == str(option)):
                return option
        raise unknown_name(f"value of {where}", str(value), [str(a) for a in args])
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and value in (None, "none", "None"):
            return None
        options = [a for a in args if a is not type(None)]
        for option in options[:-1]:
            with contextlib.suppress(ConfigError):
                return coerce(value, option, where)
        return coerce(value, options[-1], where)  # its error stands for all
    if origin in (tuple, list):
        items = [v for v in value.split(",") if value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ConfigError(f"{where} must be a list, got {value!r} ({type(value).__name__}).")
        kinds = [args[0] if args else Any] * len(items)
        if origin is tuple and args and args[-1] is not Ellipsis:  # one type per position
            if len(items) != len(args):
                raise ConfigError(f"{where} must have {len(args)} values, got {len(items)}: {value!r}.")
            kinds = list(args)
        converted = [coerce(v, k, where) for v, k in zip(items, kinds, strict=True)]
        return tuple(converted) if origin is tuple else converted
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a mapping, got {value!r} ({type(value).__name__}).")
        of_key, of_value = args or (Any, Any)
        return {coerce(k, of_key, where): coerce(v, of_value, f"{where}[{k!r}]") for k, v in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else build(kind, value, where)
    if not isinstance(kind, type):
        return value
    try:
        if kind is bool:
            if isinstance(value, str) and value.lower() in ("true", "false", "1", "0"):
                return value.lower() in ("true", "1")
            if isinstance(value, bool):
                return value
        elif kind is int:
            if isinstance(value, str):
                return int(value)
            if not isinstance(value, bool) and isinstance(value, int | float) and int(value) == value:
                return int(value)
        elif kind is float:
            if isinstance(value, int | float | str) and not isinstance(value, bool):
                number = float(value)
                if math.isnan(number):
                    raise ConfigError(f"{where} is NaN; give a number.")
                return number
        elif isinstance(value, kind):
            return value
    except (ValueError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
    raise ConfigError(f"{where} must be of type {kind.__name__}, got {value!r} ({type(value).__name__}).")


def build(cls: type[T], values: Mapping[str, Any] | None, where: str) -> T:
    """An instance of the dataclass ``cls`` from a mapping.

    Raises:
        UnknownNameError: an unknown key, with the nearest known one.
        ConfigError: a wrong type, or whatever ``__post_init__`` refuses.
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ConfigError(
            f"{where}: {getattr(cls, '__qualname__', cls)} is not a dataclass; decorate it with @dataclass."
        )
    if not isinstance(values, Mapping | None):
        raise ConfigError(f"{where} must be a mapping of options, got {values!r} ({type(values).__name__}).")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    arguments = {}
    for key, value in dict(values or {}).items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise unknown_name("key", str(key), fields, where=where)
        arguments[name] = coerce(value, hints.get(name, Any), f"{where}.{name}")
    for name, f in fields.items():
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in arguments:
            raise ConfigError(f"{where}: the field {name!r} of {cls.__qualname__} has no default; give it one.")
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def options_of(function: Callable[..., Any], skip: tuple[str, ...] = ("rng",)) -> type:
    """A dataclass made of the keyword arguments of ``function`` (names, annotations, defaults)."""
    hints = typing.get_type_hints(function)
    fields: list[Any] = []
    for p in inspect.signature(function).parameters.values():
        if p.name in skip or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            continue
        if p.default is p.empty:
            raise ConfigError(f"{function.__qualname__}: the option {p.name!r} has no default; give it one.")
        fields.append((p.name, hints.get(p.name, Any), dataclasses.field(default=p.default)))
    return dataclasses.make_dataclass(f"{function.__name__}_options", fields)


def call_with_options(function: Callable[..., T], values: Mapping[str, Any] | None, where: str, **fixed: Any) -> T:
    """Call ``function`` with checked options (see :func:`options_of`) and ``fixed`` arguments.

    A function that draws nothing may leave out ``rng``.
    """
    accepted = inspect.signature(function).parameters.values()
    if not any(p.name == "rng" or p.kind is p.VAR_KEYWORD for p in accepted):
        fixed.pop("rng", None)
    options = build(options_of(function, skip=("rng", *fixed)), values, where)
    return function(**{f.name: getattr(options, f.name) for f in dataclasses.fields(options)}, **fixed)
