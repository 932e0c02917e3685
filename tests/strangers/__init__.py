"""Evaluation beside code that is not the product's: attacks written by hand, pyautoattack itself, scipy, hashes of files."""
