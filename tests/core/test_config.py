"""Typed configurations: every kind of value, and what each mistake is told."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clbench.config import build, call_with_options, coerce, options_of
from clbench.errors import ConfigError, UnknownNameError


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("3", int, 3),
        ("-3", int, -3),
        (3.0, int, 3),
        ("0.5", float, 0.5),
        (1, float, 1.0),
        ("inf", float, math.inf),
        ("true", bool, True),
        ("False", bool, False),
        ("1", bool, True),
        ("0", bool, False),
        ("abc", str, "abc"),
        ("7", str, "7"),
        ("none", int | None, None),
        (None, int | None, None),
        ("4", int | None, 4),
        ("0.5", int | float, 0.5),
        ("x", int | str, "x"),
        (3, str | int, 3),
        (True, int | bool, True),
        ("a", Literal["a", "b"], "a"),
        ("2", Literal[1, 2], 2),
        (2, Literal[1, 2], 2),
        ("1,2,3", tuple[int, ...], (1, 2, 3)),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        ("", tuple[int, ...], ()),
        ([], list[int], []),
        ("a,b", list[str], ["a", "b"]),
        ("3,0.5", tuple[int, float], (3, 0.5)),
        ([1, "x"], tuple[int, str], (1, "x")),
        ([1, "x"], tuple, (1, "x")),
        ((1, 2), list, [1, 2]),
        ([[1, 2], [3]], tuple[tuple[int, ...], ...], ((1, 2), (3,))),
        ({"a": 1}, dict[str, int], {"a": 1}),
        ({"a": "1"}, Mapping[str, int], {"a": 1}),
        ({"a": [1]}, dict, {"a": [1]}),
        ({"a": object}, Any, {"a": object}),
    ],
)
def test_values_are_coerced(value: Any, kind: Any, expected: Any) -> None:
    got = coerce(value, kind, "x")
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("abc", int, "x must be of type int, got 'abc'"),
        (0.5, int, "x must be of type int, got 0.5"),
        ("0.5", int, "must be of type int"),
        (True, int, r"must be of type int, got True \(bool\)"),
        (math.nan, int, "must be of type int"),
        (math.inf, int, "must be of type int"),
        (None, int, r"must be of type int, got None \(NoneType\)"),
        ("nan", float, "x is NaN; give a number"),
        (math.nan, float, "x is NaN"),
        (False, float, "must be of type float"),
        (10**400, float, "must be of type float"),
        ([1], float, "must be of type float"),
        ("yes", bool, "must be of type bool"),
        (1, bool, "must be of type bool"),
        (1, str, "must be of type str"),
        ("c", Literal["aa", "bb"], r"Unknown value of x 'c'. Known: aa, bb"),
        ("ab", Literal["aa", "bb"], "Did you mean 'aa' or 'bb'|Did you mean 'bb' or 'aa'"),
        (True, Literal[1, 2], "Unknown value of x 'True'"),
        ("x", int | None, "must be of type int"),
        ("x", bool | float, "must be of type float"),
        (3, tuple[int, ...], "x must be a list, got 3"),
        ("1,x", tuple[int, ...], "must be of type int, got 'x'"),
        ("1,2,3", tuple[int, int], "x must have 2 values, got 3"),
        (["x", 1], tuple[int, str], "must be of type int, got 'x'"),
        (3, dict[str, int], "x must be a mapping, got 3"),
        ({"a": "b"}, dict[str, int], r"x\['a'\] must be of type int"),
    ],
)
def test_wrong_values_are_refused(value: Any, kind: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        coerce(value, kind, "x")


@dataclass
class Inner:
    size: int = 1


@dataclass
class Outer:
    learning_rate: float = 0.1
    layers: tuple[int, ...] = (64, 64)
    mode: Literal["a", "b"] = "a"
    limit: int | None = None
    flag: bool = False
    inner: Inner = field(default_factory=Inner)
    made: int = field(default=5, init=False)

    def __post_init__(self) -> None:
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate must be >= 0, got {self.learning_rate}")


def test_build_from_text_and_nested_mappings() -> None:
    made = build(Outer, {"learning-rate": "0.5", "layers": "8,8", "inner": {"size": "3"}, "flag": "true"}, "agent")
    assert made == Outer(0.5, (8, 8), flag=True, inner=Inner(3))
    assert build(Outer, None, "agent") == Outer()
    assert build(Outer, {"inner": Inner(9)}, "agent").inner.size == 9


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"learning_rat": 1}, UnknownNameError, "Unknown key 'learning_rat' in agent. Did you mean 'learning_rate'"),
        ({"made": 1}, UnknownNameError, "Unknown key 'made'"),
        ({3: 1}, UnknownNameError, "Unknown key '3'"),
        ({"inner": {"sise": 1}}, UnknownNameError, "Unknown key 'sise' in agent.inner. Did you mean 'size'"),
        ({"inner": 3}, ConfigError, "agent.inner must be a mapping of options, got 3"),
        ({"inner": "size"}, ConfigError, "agent.inner must be a mapping of options"),
        ({"learning_rate": -1}, ConfigError, "agent: learning_rate must be >= 0, got -1.0"),
        ({"layers": 3}, ConfigError, "agent.layers must be a list"),
        (["layers"], ConfigError, "agent must be a mapping of options"),
    ],
)
def test_build_says_which_key_is_wrong(values: Any, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        build(Outer, values, "agent")


def test_classes_that_cannot_be_built() -> None:
    @dataclass
    class NoDefault:
        size: int

    with pytest.raises(ConfigError, match="the field 'size' of .*NoDefault has no default"):
        build(NoDefault, {}, "agent")
    assert build(NoDefault, {"size": 2}, "agent").size == 2
    with pytest.raises(ConfigError, match="int is not a dataclass; decorate it with @dataclass"):
        build(int, {}, "agent")


def function(*, rng: Any, num: int, rate: float = 0.5, names: tuple[str, ...] = ("a",), **rest: Any) -> tuple:
    return num, rate, names


def test_options_of_a_function() -> None:
    options = options_of(function, skip=("rng", "num"))
    assert [f.name for f in dataclasses.fields(options)] == ["rate", "names"]
    assert call_with_options(function, {"rate": "1"}, "f", num=3, rng=None) == (3, 1.0, ("a",))
    with pytest.raises(UnknownNameError, match="Unknown key 'ratte' in f. Did you mean 'rate'"):
        call_with_options(function, {"ratte": "1"}, "f", num=3, rng=None)
    with pytest.raises(UnknownNameError, match="Unknown key 'num'"):  # what the caller fixes is no option
        call_with_options(function, {"num": 4}, "f", num=3, rng=None)
    with pytest.raises(ConfigError, match="the option 'num' has no default"):
        options_of(function)


FINITE = st.floats(allow_nan=False)
CONFIGS = st.fixed_dictionaries(
    {
        "learning_rate": st.floats(0, allow_nan=False),
        "layers": st.lists(st.integers(), max_size=3).map(tuple),
        "mode": st.sampled_from(["a", "b"]),
        "limit": st.none() | st.integers(),
        "flag": st.booleans(),
    }
)


@given(CONFIGS)
def test_text_from_a_command_line_means_the_same(values: dict[str, Any]) -> None:
    text = {k: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in values.items()}
    assert build(Outer, text, "agent") == build(Outer, values, "agent") == Outer(**values)


@given(CONFIGS, st.integers())
def test_a_built_configuration_can_be_built_again(values: dict[str, Any], size: int) -> None:
    made = build(Outer, {**values, "inner": {"size": size}}, "agent")
    stored = {k: v for k, v in dataclasses.asdict(made).items() if k != "made"}
    assert build(Outer, stored, "agent") == made


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())), st.data())
def test_coerce_returns_the_type_or_refuses(value: Any, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([int, float, bool, str]))
    try:
        got = coerce(value, kind, "x")
    except ConfigError as error:
        assert "x" in str(error)
    else:
        assert type(got) is kind
        assert got == got  # no NaN
        assert coerce(got, kind, "x") == got
