"""Checkpoints: saved wholly or not at all, on any number of ranks; read back safely; opened on any other number."""
