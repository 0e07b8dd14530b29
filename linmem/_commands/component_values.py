"""Arguments and results of a component's functions as text: plain text for scalars, JSON for all other values."""

from __future__ import annotations

import json
import math
from typing import Any

from wasmtime import component

from linmem._commands.values import parse_float, parse_integer

_INTEGERS = {f"{sign}{bits}": (bits, sign == "S") for sign in "SU" for bits in (8, 16, 32, 64)}
_TEXTS = (component.String, component.Char, component.EnumType)
_SCALARS = ("Bool", *_INTEGERS, "F32", "F64", "Char", "String")


def describe(kind: Any) -> str:
    """The type in the words of WIT. Named types have the name of their kind."""
    name = type(kind).__name__
    if name in _SCALARS:
        return name.lower()
    if isinstance(kind, component.ListType):
        return f"list<{describe(kind.element)}>"
    if isinstance(kind, component.OptionType):
        return f"option<{describe(kind.payload)}>"
    if isinstance(kind, component.TupleType):
        return f"tuple<{', '.join(map(describe, kind.elements))}>"
    if isinstance(kind, component.ResultType):
        return f"result<{', '.join('_' if each is None else describe(each) for each in (kind.ok, kind.err))}>"
    return {"OwnType": "resource", "BorrowType": "borrowed resource"}.get(name, name.removesuffix("Type").lower())


def unfit(kind: Any) -> str | None:
    """The first type inside of a type whose values are not text: a resource, a stream; None if there is none."""
    if type(kind).__name__ in _SCALARS or isinstance(kind, (component.EnumType, component.FlagsType)):
        return None
    if isinstance(kind, component.ListType):
        parts = [kind.element]
    elif isinstance(kind, component.TupleType):
        parts = kind.elements
    elif isinstance(kind, component.RecordType):
        parts = [each for _, each in kind.fields]
    elif isinstance(kind, (component.OptionType, component.ResultType, component.VariantType)):
        parts = [each for _, each in kind._cases() if each is not None]
    else:
        return describe(kind)
    return next((found for found in map(unfit, parts) if found is not None), None)


def parse_value(text: str, kind: Any) -> Any:
    """A value from a word of the command line. Raises ValueError with a message that continues "argument 1, 'x', "."""
    name = type(kind).__name__
    if isinstance(kind, _TEXTS):
        return from_json(text, kind)
    if name in _INTEGERS:
        bits, signed = _INTEGERS[name]
        return parse_integer(text, bits, signed)
    if name in ("F32", "F64"):
        return parse_float(text, int(name[1:]))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"is not JSON, in which {describe(kind)} is written") from None
    return from_json(value, kind)


def from_json(value: Any, kind: Any) -> Any:
    """A value of the type from a value of JSON. Raises ValueError as `parse_value` does."""
    name = type(kind).__name__
    if isinstance(kind, component.Bool):
        _check(isinstance(value, bool), "true or false")
    elif name in _INTEGERS:
        _check(isinstance(value, int) and not isinstance(value, bool), f"an integer ({name.lower()})")
        return parse_integer(str(value), *_INTEGERS[name])
    elif name in ("F32", "F64"):
        _check(isinstance(value, (int, float, str)) and not isinstance(value, bool), f"a number ({name.lower()})")
        return parse_float(str(value), int(name[1:]))
    elif isinstance(kind, component.Char):
        _check(isinstance(value, str) and len(value) == 1 and _is_unicode(value), "one character, and no surrogate")
    elif isinstance(kind, component.String):
        _check(isinstance(value, str) and _is_unicode(value), "a string without surrogates")
    elif isinstance(kind, component.EnumType):
        _check(value in kind.names, f"one of {', '.join(kind.names)}")
    elif isinstance(kind, component.FlagsType):
        _check(isinstance(value, list) and all(each in kind.names for each in value),
               f"a list of {', '.join(kind.names)}")
        return set(value)
    elif isinstance(kind, component.ListType):
        _check(isinstance(value, list), f"{describe(kind)}, a list")
        found = [from_json(each, kind.element) for each in value]
        return bytes(found) if isinstance(kind.element, component.U8) else found
    elif isinstance(kind, component.TupleType):
        _check(isinstance(value, list) and len(value) == len(kind.elements), f"{describe(kind)}, a list")
        return tuple(map(from_json, value, kind.elements))
    elif isinstance(kind, component.RecordType):
        fields = dict(kind.fields)
        _check(isinstance(value, dict) and fields.keys() >= value.keys(),
               f"a record, an object with {', '.join(fields)}")
        record = component.Record()
        for field, each in fields.items():      # a field that is missing is null, which an option may be
            setattr(record, field, from_json(value.get(field), each))
        return record
    else:
        return _choose(value, kind)
    return value


def _choose(value: Any, kind: Any) -> Any:
    """A value of an option, a result or a variant."""
    cases = dict(kind._cases())
    if isinstance(kind, component.OptionType):
        case, payload = ("none", None) if value is None else ("some", value)
    else:
        case, payload = value, None
        if isinstance(value, dict) and len(value) == 1:
            ((case, payload),) = value.items()
        _check(isinstance(case, str) and case in cases, f"one of {', '.join(cases)}, or an object with one of them")
    chosen = cases[case]
    _check(chosen is not None or payload is None, f"{case} without a value")
    payload = None if chosen is None else from_json(payload, chosen)
    return component.Variant(case, payload) if kind._tagged() else payload


def _is_unicode(text: str) -> bool:
    """Whether the text has no surrogate. wasmtime aborts the process at a surrogate."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _check(condition: bool, expected: str) -> None:
    if not condition:
        raise ValueError(f"must be or have at this place {expected}")


def chosen_case(value: Any, kind: Any) -> tuple[str, Any]:
    """The case of an option, a result or a variant, and its value."""
    if kind._tagged():
        return value.tag, value.payload
    for case, payload in kind._cases():     # each case has values of other Python classes
        classes: set[type] = set()
        if payload is not None:
            payload.add_classes(classes)
        if type(value) in classes or (payload is None and value is None):
            return case, value
    raise TypeError(f"{value!r:.100} is of no case of {describe(kind)}")


def to_json(value: Any, kind: Any) -> Any:
    """The value of JSON that `from_json` makes the value of."""
    if isinstance(kind, (component.F32, component.F64)):
        return value if math.isfinite(value) else str(value)        # JSON has no NaN and no infinity
    if isinstance(kind, component.FlagsType):
        return [name for name in kind.names if name in value]
    if isinstance(kind, component.ListType):
        return [to_json(each, kind.element) for each in value]
    if isinstance(kind, component.TupleType):
        return list(map(to_json, value, kind.elements))
    if isinstance(kind, component.RecordType):
        return {name: to_json(getattr(value, name), each) for name, each in kind.fields}
    if isinstance(kind, (component.OptionType, component.ResultType, component.VariantType)):
        case, payload = chosen_case(value, kind)
        chosen = dict(kind._cases())[case]
        found = None if chosen is None else to_json(payload, chosen)
        if isinstance(kind, component.OptionType):
            return found
        return case if chosen is None else {case: found}
    return value


def show_value(value: Any, kind: Any) -> str:
    """The value as text that `parse_value` takes."""
    found = to_json(value, kind)
    if isinstance(kind, (*_TEXTS, component.F32, component.F64)):
        return str(found)
    return json.dumps(found, ensure_ascii=False)
