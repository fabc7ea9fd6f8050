"""`/openapi.json`: our routes, and of those that vLLM's app answers vLLM's own description."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deployments.reference import GenerateRequest

_REF = "#/components/schemas/"
_ERROR = {"default": {"description": "An error, in the shape that clients of the route expect."}}


def document(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The OpenAPI document of `ours` (whose routes are open), with the operations that `theirs` knows better."""
    schema = GenerateRequest.model_json_schema(ref_template=f"{_REF}{{model}}")
    known = {**theirs.get("components", {}).get("schemas", {}), **schema.pop("$defs", {}), "GenerateRequest": schema}
    paths: dict[str, Any] = {}
    for path, operations in ours["paths"].items():
        for method, operation in operations.items():
            described = theirs["paths"].get(path, {}).get(method)
            chosen = dict(operation if described is None or path in ("/v1/models", "/metrics") else described)
            if path == "/generate":
                chosen["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(schema)}}}
            chosen["responses"] = {**chosen["responses"], **_ERROR}
            paths.setdefault(path, {})[method] = chosen
    schemas: dict[str, Any] = {}
    wanted = list(_refs(paths))
    while wanted:
        name = wanted.pop()
        if name not in schemas:
            schemas[name] = known[name]
            wanted += _refs(known[name])
    return {**ours, "paths": paths, "components": {"schemas": schemas}}


def _ref(schema: Mapping[str, Any]) -> dict[str, str]:
    return {"$ref": f"{_REF}{schema['title']}"}


def _refs(tree: Any) -> Iterator[str]:
    """The names of the schemas that a tree refers to."""
    if isinstance(tree, dict):
        ref = tree.get("$ref")
        if isinstance(ref, str) and ref.startswith(_REF):
            yield ref.removeprefix(_REF)
        for value in tree.values():
            yield from _refs(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _refs(value)
