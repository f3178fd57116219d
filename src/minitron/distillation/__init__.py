"""Teach the smaller model with the larger one."""
