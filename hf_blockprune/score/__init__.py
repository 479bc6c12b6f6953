"""What a part of a layer is worth: tensors alone, no models and no images."""
