"""Tool descriptions and tool calls, in every documented form -> OpenAI's, which chat templates read.

Arrow gives every object of a column the fields of all others, with null where an object had none. These nulls are taken
out again: of descriptions, where a JSON schema has no use for them, and of a call's arguments, unless the tool's schema
requires the argument or allows null for it.
"""

from __future__ import annotations

from typing import Any

from trainer.data.conversation import BadRowError, Message
from trainer.data.fields import METADATA, is_blank, json_text, kind, parsed

ARGUMENTS = ("arguments", "parameters", "args", "input")
"""Names of a call's arguments: OpenAI's, Llama's, LangChain's, Anthropic's."""

NULLS_LEFT_OUT = "a null argument of a tool call is left out, since no schema of the tool requires or allows it"

_CALL_KEYS = frozenset(("id", "type", "index", "function", "name", *ARGUMENTS)) | METADATA
_NAMED_SCHEMAS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
_VALUES = frozenset(("enum", "examples", "required", "default", "const", "example"))
_MAY_BE_NULL = frozenset(("default", "example"))
_TYPED_BY = frozenset(("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"))


def read_tools(value: object, name: str = "tools") -> list[dict[str, Any]] | None:
    """Tool descriptions in OpenAI's form.

    Args:
        value: a list of descriptions, or JSON text of one; each may be JSON text too.
        name: of the field, for messages.

    Returns:
        The descriptions without the nulls that Arrow put in; None where there are none.

    Raises:
        BadRowError: the value is no list of descriptions.
    """
    if isinstance(value, str) and not is_blank(value):
        value = parsed(value, name, repr_too=True)
    if is_blank(value):
        return None
    if not isinstance(value, list):
        raise BadRowError(f"must be a list of descriptions, it is {kind(value)}", name)
    tools = [_tool(tool, f"{name}[{number}]") for number, tool in enumerate(value)]
    if "null" in json_text(tools, name):  # few have one, and writing them is quicker than walking them
        tools = [tool | {"function": without_nulls(tool["function"])} for tool in tools]
    return tools


def _tool(tool: object, name: str) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = parsed(tool, name, repr_too=True)
    if not isinstance(tool, dict):
        raise BadRowError(f"must be a description of a tool, it is {kind(tool)}", name)
    outer = tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool}
    function = dict(outer["function"])
    if outer is not tool and function.get("type") == "function":
        del function["type"]
    if not isinstance(function.get("name"), str) or is_blank(function["name"]):
        raise BadRowError(f"a tool needs a name, this one has {', '.join(function) or 'nothing'}", name)
    if function.get("parameters") is None and isinstance(function.get("input_schema"), dict):
        function["parameters"] = function.pop("input_schema")
    if isinstance(function.get("parameters"), str):
        function["parameters"] = parsed(function["parameters"], f"{name}.parameters", repr_too=True)
    return {key: value for key, value in outer.items() if value is not None} | {"function": function}


def without_nulls(schema: Any) -> Any:  # noqa: ANN401 - JSON is anything
    """A JSON schema, or a list of them, without nulls that mean nothing there.

    Args:
        schema: read only.

    Returns:
        A copy; a null that is a default stays where the schema allows null.
    """
    if isinstance(schema, list):
        return [without_nulls(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if value is None:
            if (key in _MAY_BE_NULL and _allows_null(schema)) or schema == {"const": None}:
                kept[key] = None
        elif key in _NAMED_SCHEMAS and isinstance(value, dict):
            kept[key] = {name: without_nulls(item) for name, item in value.items() if item is not None}
        else:
            kept[key] = value if key in _VALUES else without_nulls(value)
    return kept


def _allows_null(schema: object) -> bool:
    """Whether null is a value of a JSON schema."""
    if not isinstance(schema, dict):
        return schema is True
    given = {key for key in _TYPED_BY if schema.get(key) is not None}
    types = schema.get("type")
    return (
        not given
        or schema.get("nullable") is True
        or types == "null"
        or "null" in _list(types)
        or None in _list(schema.get("enum"))
        or any(_allows_null(choice) for key in ("anyOf", "oneOf") for choice in _list(schema.get(key)))
    )


def _list(value: object) -> list[Any]:
    """The value if it is a list: a schema that was written by hand may hold anything."""
    return value if isinstance(value, list) else []


def read_calls(value: object, name: str, unknown: list[str]) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, their arguments as objects, which chat templates write as JSON.

    Args:
        value: a call, a list of calls, or JSON text of either.
        name: of the field, for messages.
        unknown: gets the names of fields that nothing reads.

    Returns:
        The calls; none where the value is blank.

    Raises:
        BadRowError: a call has no name, or its arguments are no object.
    """
    if isinstance(value, str) and not is_blank(value):
        value = parsed(value, name)
    if is_blank(value):
        return []
    return [_call(call, name, unknown) for call in (value if isinstance(value, list) else [value])]


def _call(call: object, name: str, unknown: list[str]) -> dict[str, Any]:
    if isinstance(call, str):
        call = parsed(call, name)
    function = call.get("function", call) if isinstance(call, dict) else None
    if isinstance(function, str):
        function = {**call, "name": function} if isinstance(call, dict) else None
    if function is None and isinstance(call, dict):
        function = call  # Arrow's null beside a call in another form
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRowError("a tool call needs a name and arguments", name)
    given = [key for key in ARGUMENTS if not is_blank(function.get(key))]
    values = [_arguments(function[key], name) for key in given]
    if any(value != values[0] for value in values):
        raise BadRowError(f"a tool call has {' and '.join(given)}, and they differ", name)
    read = {"name": function["name"], "arguments": values[0] if values else {}}
    json_text(read, name)
    for part in (call, function):
        unknown += [f"{name}.{key}" for key, value in part.items() if key not in _CALL_KEYS and not is_blank(value)]
    identity = call.get("id")
    return {"type": "function", "function": read} | ({"id": identity} if isinstance(identity, str) else {})


def _arguments(value: object, name: str) -> dict[str, Any]:
    for _ in range(2):  # JSON text in JSON text is what an API's answer becomes when it is dumped once more
        if isinstance(value, str):
            value = parsed(value, f"{name}.arguments") if not is_blank(value) else {}
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRowError(f"a tool call's arguments must be an object, they are {kind(value)}", name)
    return value


def drop_null_arguments(messages: list[Message], tools: list[dict[str, Any]] | None) -> bool:
    """Take out of all calls the null arguments that their tools' schemas neither require nor allow.

    Args:
        messages: their calls are changed in place.
        tools: descriptions of the tools.

    Returns:
        Whether there was one.
    """
    calls = [call["function"] for message in messages if "tool_calls" in message for call in message["tool_calls"]]
    dropped = False
    for call in calls:
        if _has_null(call["arguments"]):
            schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools or ()}
            kept = _kept(call["arguments"], schemas.get(call["name"]))
            dropped |= kept != call["arguments"]
            call["arguments"] = kept
    return dropped


def _has_null(value: object) -> bool:
    if isinstance(value, dict):
        return any(item is None or _has_null(item) for item in value.values())
    return isinstance(value, list) and any(_has_null(item) for item in value)


def _kept(value: Any, schema: object) -> Any:  # noqa: ANN401 - JSON is anything
    """A JSON value without the nulls that its schema does not know."""
    known = schema if isinstance(schema, dict) else {}
    if isinstance(value, list):
        return [_kept(item, known.get("items")) for item in value]
    if not isinstance(value, dict):
        return value
    properties = known["properties"] if isinstance(known.get("properties"), dict) else {}
    required = _list(known.get("required"))
    return {
        key: _kept(item, properties.get(key))
        for key, item in value.items()
        if item is not None or key in required or (key in properties and _allows_null(properties[key]))
    }
