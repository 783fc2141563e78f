"""Pruning at inference: keep the sub-network of one level (Zhou et al. 2018, section 3.2, figure 2)."""

from unetpp.config import Level
from unetpp.errors import ConfigError
from unetpp.model import UNetPlusPlus


def prune(model: UNetPlusPlus, level: Level, *, keep_heads: bool = False) -> UNetPlusPlus:
    """The standalone network of the nodes X^{i,j} with i + j <= level and the head of `level`.

    Its logits equal head `level` of `model` bit for bit at the same shape, dtype, layout and device: weights are picked
    by name, none is edited. With `keep_heads` the heads below `level` stay too (accurate mode of a smaller network).

    ConfigError where `level` has no head: it was never supervised, its output would be noise.
    """
    config = model.config
    if level not in config.head_levels:
        raise ConfigError(
            f"level {level} has no supervised head in this model; it has heads at levels {list(config.head_levels)}. "
            "Train with deep_supervision to be able to prune"
        )
    pruned_config = config.model_copy(
        update={
            "level": level,
            "filters": config.filters[: level + 1],
            "deep_supervision": keep_heads and config.deep_supervision,
        }
    )
    kept = {head: degree for head, degree in config.temperature.items() if head in pruned_config.head_levels}
    pruned = UNetPlusPlus(pruned_config.model_copy(update={"temperature": kept}))
    weights = model.state_dict()
    pruned.load_state_dict({name: weights[name] for name in pruned.state_dict()})
    device = next(model.parameters()).device
    return pruned.to(device).train(model.training)
