"""Ways to measure a network, one file each: what a recipe may say, what its number depends on, and how it is run."""
