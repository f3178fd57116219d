"""Models: their sizes, tensors and configs, where they come from, and how they are written."""
