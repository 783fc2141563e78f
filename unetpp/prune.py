"""Pruning at inference: keep the sub-network of one level (Zhou et al. 2018, section 3.2, figure 2)."""

from unetpp import weights
from unetpp.config import Level
from unetpp.model import UNetPlusPlus


def prune(model: UNetPlusPlus, level: Level, *, keep_heads: bool = False) -> UNetPlusPlus:
    """The standalone network of the nodes X^{i,j} with i + j <= level and the head of `level`.

    Its logits equal head `level` of `model` bit for bit at the same shape, dtype, layout and device: weights are picked
    by name, none is edited. With `keep_heads` the heads below `level` stay too (accurate mode of a smaller network).

    ConfigError where `level` has no head: it was never supervised, its output would be noise.
    """
    pruned = UNetPlusPlus(weights.pruned(model.config, level, keep_heads=keep_heads))
    state = model.state_dict()
    pruned.load_state_dict({name: state[name] for name in pruned.state_dict()})
    device = next(model.parameters()).device
    return pruned.to(device).train(model.training)
