"""The int8 form of a network beside its weights: int8.xml and int8.bin, a graph as OpenVINO stores it.

`unetpp.quantise` makes it; reading it needs nothing but OpenVINO. Imports no torch.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path

import openvino as ov

from unetpp.card import Pretrained
from unetpp.config import Level
from unetpp.errors import ConfigError, ModelError

XML, BIN = "int8.xml", "int8.bin"


def save_int8(network: ov.Model, model_dir: Path) -> str:
    """Write a network into a model folder; its `int8_sha256`, the same for equal networks."""
    named = network.clone()
    for number, node in enumerate(named.get_ordered_ops()):  # whose names count what this process made before
        node.set_friendly_name(f"{node.get_type_name()}_{number}")
    xml = model_dir / XML
    ov.save_model(named, xml, compress_to_fp16=False)
    xml.write_text("\n".join(line.strip() for line in xml.read_text("utf-8").splitlines()), "utf-8")  # a seventh less
    return int8_sha256(model_dir)


def int8_sha256(model_dir: Path) -> str:
    """SHA-256 (hex) of the bytes of an int8 form. ModelError where a file of it is missing."""
    sha = hashlib.sha256()
    for name in (XML, BIN):
        try:
            sha.update((model_dir / name).read_bytes())
        except FileNotFoundError:
            raise ModelError(f"{model_dir / name} is missing; {_again(model_dir)}") from None
    return sha.hexdigest()


def read_int8(
    model_dir: Path, pretrained: Pretrained, weights_digest: str, heads: Collection[Level]
) -> tuple[ov.Model, str]:
    """The int8 network of a model folder, as `openvino_graph.network` with some of its heads, and its SHA-256.

    `pretrained` is the folder's config, `weights_digest` that of its weights as they are. ModelError where there is no
    int8 form, where it is damaged, or of other weights; ConfigError where it lacks one of `heads`.
    """
    quantised = pretrained.quantised
    if quantised is None:
        raise ModelError(f"{model_dir} has no int8 form; {_again(model_dir)}, or take engine openvino")
    if quantised.weights_digest != weights_digest:
        raise ModelError(
            f"the int8 form in {model_dir} was made of model {quantised.weights_digest[:10]}, the folder holds "
            f"{weights_digest[:10]}; {_again(model_dir)}"
        )
    if int8_sha256(model_dir) != quantised.sha256:
        raise ModelError(f"{XML} and {BIN} in {model_dir} are not those of its config.json; {_again(model_dir)}")
    if lacking := sorted(set(heads) - set(quantised.levels)):
        raise ConfigError(
            f"the int8 form in {model_dir} has heads at levels {list(quantised.levels)}, wanted {lacking}; quantise "
            "the model without --level, or take a level that it has in mode fast"
        )
    return ov.Core().read_model(model_dir / XML), quantised.sha256


def _again(model_dir: Path) -> str:
    return f"make it: unetpp quantise --model {model_dir} --data <labelled set>"
