"""The JSON schema of a config, in words a person reads: its leaves for `--help`, what a field takes for errors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]


@dataclass(frozen=True)
class Leaf:
    """One value of a config: where it is, what it takes, what it says of itself."""

    path: tuple[str, ...]
    schema: Schema
    default: object
    required: bool
    section_about: str

    @property
    def dotted(self) -> str:
        """The key as `--set` and error messages write it: `model.in_channels`."""
        return ".".join(self.path)

    @property
    def is_positional(self) -> bool:
        """True for a value that may be given without its flag, in its place."""
        return bool(self.schema.get("positional"))

    @property
    def is_switch(self) -> bool:
        """True for a yes-or-no value."""
        return self.schema.get("type") == "boolean"

    @property
    def is_list(self) -> bool:
        """True for a value made of several."""
        return self.schema.get("type") == "array"

    @property
    def is_free_text(self) -> bool:
        """True if the value, or each value of the list, is any text: it must not be read as YAML or cut at commas."""
        item = self.schema.get("items", {}) if self.is_list else self.schema
        return item.get("type") == "string" and "enum" not in item

    @property
    def may_be_text(self) -> bool:
        """True if one text is a value beside others, as a list of texts."""
        return any(choice.get("type") == "string" and "enum" not in choice for choice in self.schema.get("anyOf", ()))


def schema_of(config_class: type[BaseModel]) -> Schema:
    """Return the JSON schema with every reference written out and `X | None` as X."""
    root = config_class.model_json_schema()
    return _written_out(root, root.get("$defs", {}))


def _written_out(schema: Schema, definitions: Schema) -> Schema:
    schema = dict(schema)
    if "$ref" in schema:
        target = definitions[schema.pop("$ref").removeprefix("#/$defs/")]
        return _written_out({**target, **schema}, definitions)
    choices = [choice for choice in schema.get("anyOf", ()) if choice.get("type") != "null"]
    if len(choices) == 1:
        del schema["anyOf"]
        return _written_out({**choices[0], **schema}, definitions)
    if "properties" in schema:
        schema["properties"] = {name: _written_out(field, definitions) for name, field in schema["properties"].items()}
    if "prefixItems" in schema:
        schema["prefixItems"] = [_written_out(item, definitions) for item in schema["prefixItems"]]
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = _written_out(schema[key], definitions)
    return schema


def leaves(section: Schema, path: tuple[str, ...] = (), defaults: Schema | None = None) -> Iterator[Leaf]:
    """Yield every value of a written-out schema, sections walked in the order of their fields."""
    for name, field in section["properties"].items():
        default = (defaults or {}).get(name, field.get("default"))
        if "properties" in field:
            yield from leaves(field, (*path, name), default)
        else:
            required = name in section.get("required", ())
            yield Leaf((*path, name), field, default, required, section.get("description", ""))


def schema_at(schema: Schema, loc: tuple[int | str, ...]) -> Schema | None:
    """Return the schema of the field at `loc` (names, and indices of lists), None where there is none."""
    for part in loc:
        if isinstance(part, int):
            fixed = schema.get("prefixItems", ())
            below = fixed[part] if part < len(fixed) else schema.get("items")
        else:
            below = schema.get("properties", {}).get(part) or schema.get("additionalProperties")
        if not isinstance(below, dict):
            return None
        schema = below
    return schema


def allowed(schema: Schema) -> str:
    """Say in words what a field takes: `a whole number from 1 to 4`, `fast or accurate`."""
    if "enum" in schema:
        *first, last = map(str, schema["enum"])
        return f"{', '.join(first)} or {last}"
    match schema.get("type"):
        case _ if "const" in schema:
            return str(schema["const"])
        case "integer":
            return "a whole number" + _limits(schema)
        case "number":
            return "a number" + _limits(schema)
        case "boolean":
            return "true or false"
        case "string":
            return f"text that matches {schema['pattern']}" if "pattern" in schema else "text"
        case "array" if "prefixItems" in schema:
            return f"{len(schema['prefixItems'])} values, each {allowed(schema['prefixItems'][0])}"
        case "array":
            return f"a list, each value {allowed(schema['items'])}"
        case "object" if schema.get("additionalProperties"):
            return f"keys with values, each value {allowed(schema['additionalProperties'])}"
        case "object":
            return f"a section with keys of {', '.join(schema.get('properties', {}))}"
    return "another value"


def _limits(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        words = [f"from {low} to {high}"]
    else:
        words = [f"of at least {low}"] if low is not None else [f"of at most {high}"] if high is not None else []
    if "exclusiveMinimum" in schema:
        words.append(f"above {schema['exclusiveMinimum']}")
    if "exclusiveMaximum" in schema:
        words.append(f"below {schema['exclusiveMaximum']}")
    if "multipleOf" in schema:
        words.append(f"that is a multiple of {schema['multipleOf']}")
    return " " + " and ".join(words) if words else ""


def placeholder(schema: Schema) -> str:
    """Return the short form of `allowed` for `--help`: `1..4`, `fast|accurate`, `NUMBER,NUMBER`."""
    if "enum" in schema or "const" in schema:
        return "|".join(map(str, schema.get("enum", [schema.get("const")])))
    match schema.get("type"):
        case "integer" if "minimum" in schema and schema.get("maximum", 10_000) < 1_000:
            return f"{schema['minimum']}..{schema['maximum']}"
        case "integer":
            return "INTEGER"
        case "number":
            return "NUMBER"
        case "array" if "prefixItems" in schema:
            return ",".join(map(placeholder, schema["prefixItems"]))
        case "array":
            return placeholder(schema["items"]) + ",..."
        case "object":
            return "{KEY: VALUE}"
    return "TEXT"
