"""Experiments over many facts, each one readable function."""
