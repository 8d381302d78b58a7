"""A quick look at arguments before the validator of JSON schemas, which takes a thousand times as long."""

from collections.abc import Callable, Mapping
from typing import Any


def surely_valid(schema: Mapping[str, Any], value: Any) -> bool:
    """Whether `value` satisfies `schema`. False also where this cannot tell: then the validator has the word."""
    return all(
        keyword in _NOTES or (keyword in _CHECKS and _CHECKS[keyword](rule, value, schema))
        for keyword, rule in schema.items()
    )


_NOTES = {"description", "title", "default"}
_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}


def _is_type(rule: Any, value: Any, _: Mapping[str, Any]) -> bool:
    return isinstance(rule, str) and rule in _TYPES and _TYPES[rule](value)


def _properties(rule: Any, value: Any, _: Mapping[str, Any]) -> bool:
    return isinstance(value, dict) and all(surely_valid(rule[key], item) for key, item in value.items() if key in rule)


def _additional(rule: Any, value: Any, schema: Mapping[str, Any]) -> bool:
    known = schema.get("properties", {})
    return (
        rule is False
        and "patternProperties" not in schema
        and isinstance(value, dict)
        and all(k in known for k in value)
    )


def _number(value: Any) -> bool:
    return _TYPES["number"](value)


_CHECKS: dict[str, Callable[[Any, Any, Mapping[str, Any]], bool]] = {
    "type": _is_type,
    "properties": _properties,
    "required": lambda rule, value, _: isinstance(value, dict) and all(key in value for key in rule),
    "additionalProperties": _additional,
    "items": lambda rule, value, _: (
        isinstance(rule, dict) and isinstance(value, list) and all(surely_valid(rule, item) for item in value)
    ),
    "minItems": lambda rule, value, _: isinstance(value, list) and len(value) >= rule,
    "maxItems": lambda rule, value, _: isinstance(value, list) and len(value) <= rule,
    "minimum": lambda rule, value, _: _number(value) and value >= rule,
    "maximum": lambda rule, value, _: _number(value) and value <= rule,
}
