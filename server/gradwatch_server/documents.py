"""How endpoints describe themselves in OpenAPI, from the types that are sent."""

from __future__ import annotations

from typing import Any, cast

import msgspec
from fastapi import FastAPI

from gradwatch.wire.api import Problem
from gradwatch_server.examples import EXAMPLES
from gradwatch_server.problems import MEDIA_TYPE

JSON = "application/json"
TOKEN = {
    "type": "http",
    "scheme": "bearer",
    "description": "A token, as `gradwatch token create` prints it.",
}

_schemas, COMPONENTS = msgspec.json.schema_components(
    list(EXAMPLES), ref_template="#/components/schemas/{name}"
)
SCHEMAS: dict[Any, dict[str, Any]] = dict(zip(EXAMPLES, _schemas, strict=True))


def described(kind: Any, description: str, media_type: str = JSON) -> dict[str, Any]:
    """A body's place in OpenAPI, with an example. kind: one of EXAMPLES."""
    content = {"schema": SCHEMAS[kind], "example": msgspec.to_builtins(EXAMPLES[kind])}
    return {"description": description, "content": {media_type: content}}


def answered(
    kind: Any, description: str, status: int = 200, media_types: tuple[str, ...] = ()
) -> dict[int | str, dict[str, Any]]:
    """The good answer of an endpoint; media_types: others that carry the same."""
    found = described(kind, description)
    for media_type in media_types:
        found["content"][media_type] = {}
    return {status: found}


def taken(kind: Any, media_types: tuple[str, ...] = ()) -> dict[str, Any]:
    """The body that an endpoint takes, as JSON; media_types: others that carry the same."""
    content: dict[str, Any] = {media_type: {} for media_type in media_types}
    content |= described(kind, "")["content"]
    return {"requestBody": {"content": content, "required": True}}


def complete(app: FastAPI) -> None:
    """Add to an application's description the types that its endpoints refer to, and tokens."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        schema = describe()
        components = schema.setdefault("components", {})
        components.setdefault("schemas", {}).update(COMPONENTS)
        components["securitySchemes"] = {"token": TOKEN}
        _show_nulls(schema["paths"])
        # One or none: on loopback nobody needs a token until the first was made.
        schema["security"] = [{"token": []}, {}]
        return schema

    app.openapi = openapi


def _show_nulls(part: Any) -> None:
    """Put examples back as they are: FastAPI leaves out what is null in them."""
    if isinstance(part, dict):
        held = cast("dict[str, Any]", part)
        if "example" in held:
            whole = (EXAMPLES[kind] for kind, own in SCHEMAS.items() if own == held.get("schema"))
            held["example"] = next(map(msgspec.to_builtins, whole), held["example"])
            return
        for item in held.values():
            _show_nulls(item)


PROBLEMS: dict[int | str, dict[str, Any]] = {
    "default": described(Problem, "What is wrong, as RFC 9457 has it", MEDIA_TYPE)
}
