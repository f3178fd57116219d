"""From a budget to a shape."""
