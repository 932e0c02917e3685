"""A run as its folder shows it: files, lock, status, weights, and the measurement of what it trained."""
