"""Fields of JSON objects: one table checks a request and describes it in the OpenAPI document.

A field that is null is absent. A field that no table has is an error that names it.
"""

from __future__ import annotations

import difflib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptx.errors import shown
from gptx.server.errors import ApiError

Schema = dict[str, Any]
LIKENESS = 0.7  # of difflib's ratio, from which a known name is suggested


class Kind(ABC):
    """The kind of values that a field takes."""

    @property
    @abstractmethod
    def expected(self) -> str:
        """Values of this kind, in the words of an error."""

    @property
    @abstractmethod
    def schema(self) -> Schema:
        """JSON schema of this kind."""

    @abstractmethod
    def read(self, name: str, value: Any) -> Any:
        """Return a value of this kind as the server uses it.

        Raises
        ------
        ApiError
            The value is of another kind; `name` is in the error.
        """

    def refuse(self, name: str, value: Any) -> ApiError:
        """Return the error of a value of another kind."""
        message = f"{name} is {shown(value)}, expected {self.expected}"
        return ApiError(400, message, param=name, code="invalid_value")


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number from `low` to `high`; 2.0 is one, too, as in JSON Schema."""

    low: int
    high: int

    @property
    def expected(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    @property
    def schema(self) -> Schema:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    def read(self, name: str, value: Any) -> int:
        is_whole = type(value) is int or (type(value) is float and value.is_integer())
        if not is_whole or not self.low <= value <= self.high:
            raise self.refuse(name, value)
        return int(value)


@dataclass(frozen=True)
class Number(Kind):
    """A number from `low` to `high`."""

    low: float
    high: float
    exclusive: bool = False  # of `low`

    @property
    def expected(self) -> str:
        return f"a number {'above' if self.exclusive else 'from'} {self.low:g} to {self.high:g}"

    @property
    def schema(self) -> Schema:
        least = "exclusiveMinimum" if self.exclusive else "minimum"
        return {"type": "number", least: self.low, "maximum": self.high}

    def read(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not self.low <= value <= self.high:
            raise self.refuse(name, value)
        if self.exclusive and value == self.low:
            raise self.refuse(name, value)
        return float(value)


@dataclass(frozen=True)
class Flag(Kind):
    """true or false."""

    expected = "true or false"

    @property
    def schema(self) -> Schema:
        return {"type": "boolean"}

    def read(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise self.refuse(name, value)
        return value


@dataclass(frozen=True)
class Text(Kind):
    """A string of at least `low` characters that UTF-8 can encode."""

    low: int = 0

    @property
    def expected(self) -> str:
        return "a string" if self.low == 0 else "a string of at least one character"

    @property
    def schema(self) -> Schema:
        return {"type": "string"} | ({"minLength": self.low} if self.low else {})

    def read(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or len(value) < self.low:
            raise self.refuse(name, value)
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.refuse(name, value) from None
        return value


@dataclass(frozen=True)
class Choice(Kind):
    """One of several strings."""

    values: tuple[str, ...]

    @property
    def expected(self) -> str:
        return " or ".join(json.dumps(value) for value in self.values)

    @property
    def schema(self) -> Schema:
        return {"type": "string", "enum": list(self.values)}

    def read(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in self.values:
            raise self.refuse(name, value)
        return value


@dataclass(frozen=True)
class Many(Kind):
    """A list of `low` to `high` values of one kind."""

    kind: Kind
    high: int
    low: int = 0

    @property
    def expected(self) -> str:
        return f"a list of {self.low} to {self.high} items, each {self.kind.expected}"

    @property
    def schema(self) -> Schema:
        limits = {"maxItems": self.high} | ({"minItems": self.low} if self.low else {})
        return {"type": "array", "items": self.kind.schema, **limits}

    def read(self, name: str, value: Any) -> list[Any]:
        if not isinstance(value, list) or not self.low <= len(value) <= self.high:
            raise self.refuse(name, value)
        return [self.kind.read(name, item) for item in value]


@dataclass(frozen=True)
class Either(Kind):
    """A value of the first kind that takes it."""

    kinds: tuple[Kind, ...]

    @property
    def expected(self) -> str:
        return ", or ".join(kind.expected for kind in self.kinds)

    @property
    def schema(self) -> Schema:
        return {"anyOf": [kind.schema for kind in self.kinds]}

    def read(self, name: str, value: Any) -> Any:
        for kind in self.kinds:
            try:
                return kind.read(name, value)
            except ApiError:
                continue
        raise self.refuse(name, value)


@dataclass(frozen=True)
class Prompts(Kind):
    """A text, a list of token ids, or a list of up to `high` of those."""

    high: int

    @property
    def expected(self) -> str:
        return f"a string, a list of token ids, or a list of up to {self.high} of those"

    @property
    def schema(self) -> Schema:
        text: Schema = {"type": "string", "minLength": 1}
        ids: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
        lists = [{"type": "array", "items": x, "minItems": 1, "maxItems": self.high}
                 for x in (text, ids)]  # fmt: skip
        return {"anyOf": [text, ids, *lists]}

    def read(self, name: str, value: Any) -> list[str | list[int]]:
        """Return the prompts as a list."""
        if _is_prompt(value):
            return [value]
        if not isinstance(value, list) or not value or not all(map(_is_prompt, value)):
            raise self.refuse(name, value)
        if len(value) > self.high:
            message = f"{name} has {len(value)} prompts, expected at most {self.high}"
            raise ApiError(400, message, param=name, code="invalid_value")
        return value


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return value != ""
    return isinstance(value, list) and value != [] and all(type(id) is int for id in value)


@dataclass(frozen=True)
class Biases(Kind):
    """An object of token id: number from -`limit` to `limit`."""

    limit: float
    expected = 'an object of token id: number, such as {"198": -100}'

    @property
    def schema(self) -> Schema:
        number = {"type": "number", "minimum": -self.limit, "maximum": self.limit}
        return {
            "type": "object",
            "patternProperties": {"^[0-9]{1,9}$": number},
            "additionalProperties": False,
        }

    def read(self, name: str, value: Any) -> dict[int, float]:
        if not isinstance(value, dict):
            raise self.refuse(name, value)
        for id, bias in value.items():
            is_id = id.isascii() and id.isdecimal() and len(id) < 10
            if not is_id or type(bias) not in (int, float) or not abs(bias) <= self.limit:
                raise self.refuse(name, {id: bias})
        return {int(id): float(bias) for id, bias in value.items()}


@dataclass(frozen=True)
class Anything(Kind):
    """Any value."""

    expected = "any value"

    @property
    def schema(self) -> Schema:
        return {}

    def read(self, name: str, value: Any) -> Any:
        return value


@dataclass(frozen=True)
class Field:
    """A field of an object.

    Attributes
    ----------
    name
        Name in JSON.
    kind
        Kind of its values.
    about
        Description, one or two sentences.
    default
        Value of an absent field; None for none.
    required
        True if the field has to be present.
    """

    name: str
    kind: Kind
    about: str
    default: Any = None
    required: bool = False

    @property
    def schema(self) -> Schema:
        """JSON schema of the field, for which null is absent."""
        schema = self.kind.schema
        if not self.required and schema:
            schema = {"anyOf": [*schema.get("anyOf", [schema]), {"type": "null"}]}
        default = {} if self.default is None else {"default": self.default}
        return {**schema, "description": self.about, **default}


@dataclass(frozen=True)
class Record(Kind):
    """An object with these fields and no others."""

    fields: tuple[Field, ...]

    @property
    def expected(self) -> str:
        return f"an object of {', '.join(field.name for field in self.fields)}"

    @property
    def schema(self) -> Schema:
        required = [field.name for field in self.fields if field.required]
        return {
            "type": "object",
            "properties": {field.name: field.schema for field in self.fields},
            "additionalProperties": False,
            **({"required": required} if required else {}),
        }

    def read(self, name: str, value: Any) -> dict[str, Any]:
        """Return the fields that are present; see `defaults` for the others."""
        if not isinstance(value, dict):
            raise self.refuse(name, value)
        known = {field.name: field for field in self.fields}
        prefix = f"{name}." if name != BODY else ""
        found: dict[str, Any] = {}
        for key, item in value.items():
            if item is None:
                continue
            if key not in known:
                raise _unknown(prefix, key, known)
            found[key] = known[key].kind.read(f"{prefix}{key}", item)
        for field in self.fields:
            if field.required and field.name not in found:
                missing = f"{prefix}{field.name}"
                message = f"{missing} is missing, expected {field.kind.expected}"
                raise ApiError(400, message, param=missing, code="missing_field")
        return found

    @property
    def defaults(self) -> dict[str, Any]:
        """Values of absent fields that have a default."""
        return {field.name: field.default for field in self.fields if field.default is not None}


BODY = "the body"  # the name of a request as a whole, in errors


def _unknown(prefix: str, key: str, known: Sequence[str] | dict[str, Field]) -> ApiError:
    close = difflib.get_close_matches(key[:64], known, n=1, cutoff=LIKENESS)
    advice = f"do you mean {prefix}{close[0]}?" if close else "/docs has all fields"
    name = f"{prefix}{key}"
    return ApiError(
        400, f"{shown(name)[1:-1]} is not supported: {advice}", param=name[:200],
        code="unsupported_field",
    )  # fmt: skip


def parse(data: bytes) -> Any:
    """Return the value of a JSON text.

    Raises
    ------
    ApiError
        The text is no JSON; NaN and Infinity are none.
    """

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no JSON number")

    try:
        return json.loads(data, parse_constant=refuse, parse_float=_finite)
    except RecursionError:
        message = "the body is nested too deeply"
    except ValueError as error:  # also of invalid UTF-8 and of integers with too many digits
        message = f"the body is no JSON: {error}"
    raise ApiError(400, message, code="invalid_json")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is outside the range of a number")
    return value
