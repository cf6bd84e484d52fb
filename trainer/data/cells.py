"""Values of tables -> values of JSON: what a format forced on the data is undone.

Tables know numbers that are none for empty cells, dates, bytes, and lists of objects stored as an object of lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from trainer.data.conversation import BadRowError
from trainer.data.fields import parsed

Convert = Callable[[Any], Any]
# Fields whose value is a list of objects in every form of rows.
_LISTS = {"messages", "conversations", "conversation", "tools", "prompt", "completion", "chosen", "rejected"}


def list_of_structs(value: object, *, is_list: bool = False) -> list[dict[str, Any]] | None:
    """Return the list of objects that a table stores as an object of lists, {role: [...], content: [...]}.

    Args:
        value: Anything.
        is_list: Whether the value's place asks for a list, so that no role is needed to know it.

    Returns:
        The list; None where the value is something else.
    """
    if not isinstance(value, dict) or not (is_list or {"role", "from"} & value.keys()):
        return None
    columns = {
        name: list_of_structs(column, is_list=True) if isinstance(column, dict) else column
        for name, column in value.items()
    }
    if not columns or not all(isinstance(column, list) for column in columns.values()):
        return None
    if len({len(column or ()) for column in columns.values()}) != 1:
        return None
    items = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    for item in items:
        calls = list_of_structs(item.get("tool_calls"), is_list=True)
        if calls is not None:
            item["tool_calls"] = calls
    return items


def undo_struct_of_lists(row: dict[str, Any]) -> None:
    """Replace, in a row, each object of lists that is a list of objects."""
    for name, value in row.items():
        if isinstance(value, dict):
            listed = list_of_structs(value, is_list=name in _LISTS)
            if listed is not None:
                row[name] = listed


def converter(kind: pa.DataType) -> Convert | None:
    """Return what makes JSON of a value of an Arrow type, None where it is JSON already.

    Args:
        kind: The type.

    Returns:
        A function of a value that is not null; it raises BadRowError for what JSON forbids.
    """
    for holds, convert in _CONVERTERS:
        if holds(kind):
            return convert
    if pa.types.is_dictionary(kind):
        return converter(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return converter(kind.storage_type)
    return _of_parts(kind)


def json_value(value: Any) -> Any:  # noqa: ANN401 - JSON is anything
    """Return the JSON of a value of a row that the datasets library made, whatever types its columns have."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, dict):
        return {str(name): json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    if isinstance(value, bytes):
        return _text_of(value)
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _of_parts(kind: pa.DataType) -> Convert | None:
    """The converter of a type that is made of others."""
    types = pa.types
    if types.is_map(kind):
        names, values = converter(kind.key_type) or str, _or_null(converter(kind.item_type))
        return lambda pairs: {names(name): values(value) for name, value in pairs}
    if types.is_struct(kind):
        parts = {field.name: _or_null(part) for field in kind if (part := converter(field.type))}
        return (lambda value: value | {name: part(value[name]) for name, part in parts.items()}) if parts else None
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_list_view(kind):
        inner = converter(kind.value_type)
        return None if inner is None else lambda values: list(map(_or_null(inner), values))
    return None


def _or_null(convert: Convert | None) -> Convert:
    return lambda value: value if value is None or convert is None else convert(value)


def _finite(number: float) -> float | None:
    """A number; None for NaN, which tables hold where a cell is empty."""
    if math.isfinite(number):
        return number
    if math.isnan(number):
        return None
    raise BadRowError(f"is {number}, which JSON has no number for")


def _text_of(raw: bytes) -> str:
    """Bytes as text; what is no text becomes lone surrogates, which no row may learn."""
    return raw.decode("utf-8", "surrogateescape")


def _short(number: float) -> float | None:
    """A number of 32 bits, not written with the digits of 64: 0.1 and not 0.10000000149011612."""
    finite = _finite(number)
    return None if finite is None else float(f"{finite:.7g}")


_CONVERTERS: tuple[tuple[Callable[[pa.DataType], bool], Convert], ...] = (
    (pa.types.is_float64, _finite),
    (pa.types.is_floating, _short),
    (pa.types.is_decimal, str),
    (pa.types.is_duration, str),
    (pa.types.is_temporal, lambda moment: moment.isoformat()),
    (pa.types.is_binary, _text_of),
    (pa.types.is_large_binary, _text_of),
    (pa.types.is_binary_view, _text_of),
    (pa.types.is_fixed_size_binary, _text_of),
    (lambda kind: isinstance(kind, pa.JsonType), lambda text: parsed(text, "")),
)
