"""High-throughput distributed adversarial training at ImageNet scale."""

__version__ = "0.1.0"
