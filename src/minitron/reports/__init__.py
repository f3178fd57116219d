"""What people read: the model card and the report."""
