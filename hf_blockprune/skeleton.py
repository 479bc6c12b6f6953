"""A model without its weights, and what it says of the images that the model takes; see `hub.blockprune_skeleton`."""

from .hub.blockprune_skeleton import channels_of, skeleton

__all__ = ["channels_of", "skeleton"]
