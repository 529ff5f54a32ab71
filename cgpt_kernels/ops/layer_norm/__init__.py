"""layer_norm and add_layer_norm."""

from .op import add_layer_norm, layer_norm

__all__ = ["add_layer_norm", "layer_norm"]
