"""Where on Earth a TIFF's pixels are: its GeoTIFF tags as one line of JSON, which travels beside the pixels and back.

```
{"epsg": 32633, "transform": [a, b, c, d, e, f], "tags": {"ModelPixelScale": [...], ...}, "left_out": [...]}
```
`transform` takes the corner (column, row) of a pixel to the map: x = a column + b row + c, y = d column + e row + f;
null where the tags hold none, or control points alone. `epsg` is null where the tags name no registered system.
All of it is of the image as it is decoded: where an orientation turned the pixels, the tags are turned with them.
Source: OGC GeoTIFF 1.1 (OGC 19-008r4), sections 7.1 to 7.4.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

_TAGS = {
    33550: "ModelPixelScale",
    33922: "ModelTiepoint",
    34264: "ModelTransformation",
    34735: "GeoKeyDirectory",
    34736: "GeoDoubleParams",
    34737: "GeoAsciiParams",
}
_SHORT, _ASCII, _DOUBLE = 3, 2, 12
_RASTER_TYPE_KEY, _GEOGRAPHIC_KEY, _PROJECTED_KEY = 1025, 2048, 3072
_PIXEL_IS_POINT, _USER_DEFINED = 2, 32767
MAX_VALUES = 6000
"""A tag with more values, or characters, is left out, and named: a row of a table is no place for it."""


def read_geo(tag: Callable[[int], Any], height: int, width: int, orientation: int = 1) -> str | None:
    """The JSON of an image, None where it has no GeoTIFF tag.

    Args:
        tag: gives the value of a tag by its number, None for an absent one.
        height: of the image as it is stored.
        width: of the image as it is stored.
        orientation: that turns the stored image into the decoded one, 1..8.
    """
    tags: dict[str, Any] = {}
    left_out = []
    for number, name in _TAGS.items():
        if (value := tag(number)) is None:
            continue
        if (plain := _plain(name, value)) is None:
            left_out.append(name)
        else:
            tags[name] = plain
    if not tags and not left_out:
        return None
    if orientation != 1:
        tags = _turned(tags, height, width, orientation)
    transform = _transform(tags)
    geo = {"epsg": _epsg(tags), "transform": transform, "tags": tags}
    return json.dumps(geo | ({"left_out": left_out} if left_out else {}))


def tiff_tags(geo: str | None) -> list[tuple[int, int, int, Any, bool]]:
    """The tags of a JSON of `read_geo`, as tifffile's `extratags`: what a mask of the same pixels is to be given."""
    tags = {} if geo is None else json.loads(geo)["tags"]
    found: list[tuple[int, int, int, Any, bool]] = []
    for number, name in _TAGS.items():
        if name == "GeoAsciiParams" and name in tags:
            found.append((number, _ASCII, 0, tags[name], True))
        elif name in tags:
            found.append((number, _SHORT if name == "GeoKeyDirectory" else _DOUBLE, len(tags[name]), tags[name], True))
    return found


def _plain(name: str, value: Any) -> str | list[float] | list[int] | None:
    """A tag's value as JSON holds it; None for what is damaged or too long."""
    if name == "GeoAsciiParams":
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        return text if isinstance(text, str) and text.isascii() and len(text) <= MAX_VALUES else None
    try:
        values = np.atleast_1d(np.asarray(value, np.float64))
    except (TypeError, ValueError):
        return None
    if values.ndim != 1 or len(values) > MAX_VALUES or not np.isfinite(values).all():
        return None
    if name != "GeoKeyDirectory":
        return [float(each) for each in values]
    is_short = ((values >= 0) & (values <= 65535) & (values == np.floor(values))).all()
    return [int(each) for each in values] if is_short else None


def _key(tags: dict[str, Any], key: int) -> int | None:
    """The value of a key of the directory, where it is a number kept in the directory itself."""
    directory = tags.get("GeoKeyDirectory", [])
    for start in range(4, len(directory) - 3, 4):
        found, location, _, value = directory[start : start + 4]
        if found == key and location == 0:
            return int(value)
    return None


def _epsg(tags: dict[str, Any]) -> int | None:
    for key in (_PROJECTED_KEY, _GEOGRAPHIC_KEY):
        if (code := _key(tags, key)) not in (None, 0, _USER_DEFINED):
            return code
    return None


def _raster_to_map(tags: dict[str, Any]) -> Matrix | None:
    """The 3x3 matrix of raster coordinates (I, J, 1) to the map; None where the tags hold none."""
    whole = tags.get("ModelTransformation", [])
    if len(whole) == 16:
        four = np.array(whole).reshape(4, 4)
        return np.array([four[0, [0, 1, 3]], four[1, [0, 1, 3]], [0, 0, 1]])
    scale, tie = tags.get("ModelPixelScale", []), tags.get("ModelTiepoint", [])
    if len(scale) >= 2 and len(tie) == 6:
        column, row, _, x, y, _ = tie
        return np.array([[scale[0], 0, x - column * scale[0]], [0, -scale[1], y + row * scale[1]], [0, 0, 1]])
    return None


def _transform(tags: dict[str, Any]) -> list[float] | None:
    matrix = _raster_to_map(tags)
    if matrix is None:
        return None
    if _is_point(tags):  # raster coordinates are of a pixel's centre: its corner is half a pixel before
        matrix = matrix @ np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
    return [float(each) for each in matrix[:2].ravel()]


def _is_point(tags: dict[str, Any]) -> bool:
    return _key(tags, _RASTER_TYPE_KEY) == _PIXEL_IS_POINT


def _turned(tags: dict[str, Any], height: int, width: int, orientation: int) -> dict[str, Any]:
    """The tags of the turned image: a transformation instead of a scale, control points at their new pixels."""
    last = 1 if _is_point(tags) else 0
    right, bottom = width - last, height - last
    stored_from_turned = {
        2: [[-1, 0, right], [0, 1, 0]],
        3: [[-1, 0, right], [0, -1, bottom]],
        4: [[1, 0, 0], [0, -1, bottom]],
        5: [[0, 1, 0], [1, 0, 0]],
        6: [[0, 1, 0], [-1, 0, bottom]],
        7: [[0, -1, right], [-1, 0, bottom]],
        8: [[0, -1, right], [1, 0, 0]],
    }.get(orientation)
    if stored_from_turned is None:
        return tags
    turn = np.array([*stored_from_turned, [0, 0, 1]], np.float64)
    kept = {name: value for name, value in tags.items() if not name.startswith("Model")}
    if (matrix := _raster_to_map(tags)) is not None:
        four = np.eye(4)
        four[np.ix_([0, 1], [0, 1, 3])] = (matrix @ turn)[:2]
        return {"ModelTransformation": [float(each) for each in four.ravel()], **kept}
    ties = np.array(tags.get("ModelTiepoint", []))
    if len(ties) and len(ties) % 6 == 0:
        points = ties.reshape(-1, 6)
        stored = np.column_stack([points[:, :2], np.ones(len(points))])
        points[:, :2] = (stored @ np.linalg.inv(turn).T)[:, :2]
        kept = {"ModelTiepoint": [float(each) for each in points.ravel()], **kept}
    return kept
