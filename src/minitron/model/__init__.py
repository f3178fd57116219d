"""What a model is: its sizes, its tensors, where it comes from and how it is written."""
