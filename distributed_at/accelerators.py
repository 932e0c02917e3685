"""What GPUs have reached on ResNet training, as others published it: the rates behind ``plan``'s hours.

These are sustained rates of whole training runs, not datasheet peaks (those, for MFU, are in ``cost.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from distributed_at.errors import ConfigError, did_you_mean

# TF32 against 16-bit mixed precision, PyTorch ResNet-50 on one A100: 938 and 2470 images a second (same source as A100).
_TF32_SHARE = 938 / 2470
# What Xie & Yuille's code reached of a V100's 15.7 TFLOP/s in float32.
_OF_FP32_PEAK = 8.5 / 15.7


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A sustained rate.

    Attributes:
        tflops: 10^12 floating point operations a second and GPU (a multiply-add counts two).
        source: who measured it and on what.
        published: False where it is a published rate of another precision, scaled.
    """

    tflops: float
    source: str
    published: bool = True


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU: memory in GiB, and sustained rates in float32, TF32 (float32 where it has none) and 16 bits."""

    name: str
    memory_gib: float
    fp32: Rate
    tf32: Rate
    half: Rate

    def rate(self, arithmetic: str) -> Rate:
        """Return the rate of 'fp32', 'tf32', 'bf16' or 'fp16'."""
        return {"fp32": self.fp32, "tf32": self.tf32}.get(arithmetic, self.half)


def attack_arithmetic(precision: str, attack_dtype: str | None) -> str:
    """Return what an attack computes in: its own 16 bits, else the arithmetic of training, whose TF32 it shares.

    Args:
        precision: ``train.precision``.
        attack_dtype: ``attack.dtype``; None without an attack.
    """
    if attack_dtype is None or (attack_dtype == "fp32" and precision == "tf32"):
        return precision
    return attack_dtype


def _tf32_of(half: Rate) -> Rate:
    return Rate(
        tflops=half.tflops * _TF32_SHARE,
        source=f"{half.source}; scaled by A100's ratio of TF32 to 16-bit (0.38)",
        published=False,
    )


def _fp32_of(peak_tflops: float) -> Rate:
    return Rate(
        tflops=peak_tflops * _OF_FP32_PEAK,
        source=f"{peak_tflops:g} TFLOP/s of its datasheet, times the share of theirs that V100s reached (0.54)",
        published=False,
    )


_H200 = Rate(
    tflops=195,
    source="MLPerf training 4.0, ResNet-50 on 8 H200: 7945 images/s/GPU with fused kernels, clean training",
)
_H100 = Rate(
    tflops=176,
    source="MLPerf training 4.0, ResNet-50 on 8 H100 SXM: 7157 images/s/GPU with fused kernels, clean training",
)
_A100 = "NVIDIA DeepLearningExamples, PyTorch ResNet-50 v1.5, one A100 80 GB, clean training"

_V100_FP32 = Rate(
    tflops=8.5,
    source="Xie & Yuille's code: ResNet-152, PGD-30, 110 epochs in about 52 h on 128 V100 (5.9 images/s/GPU)",
)

GPUS = {
    "h200": Gpu(name="H200", memory_gib=141e9 / 2**30, half=_H200, tf32=_tf32_of(_H200), fp32=_fp32_of(67)),
    "h100": Gpu(name="H100", memory_gib=80e9 / 2**30, half=_H100, tf32=_tf32_of(_H100), fp32=_fp32_of(67)),
    "a100": Gpu(
        name="A100 80 GB",
        memory_gib=80e9 / 2**30,
        half=Rate(tflops=61, source=f"{_A100}: 2470 images/s mixed precision"),
        tf32=Rate(tflops=23, source=f"{_A100}: 938 images/s TF32"),
        fp32=_fp32_of(19.5),
    ),
    "v100": Gpu(
        name="V100 32 GB",
        memory_gib=32.0,
        half=Rate(
            tflops=29,
            source="NVIDIA DeepLearningExamples, PyTorch ResNet-50 v1.5, one V100: 1200 images/s mixed, clean training",
        ),
        tf32=_V100_FP32,
        fp32=_V100_FP32,
    ),
}


def find_gpu(name: str) -> Gpu:
    """Return a kind of GPU by its short name, in any case.

    Raises:
        ConfigError: not in the table; names the nearest.
    """
    key = name.strip().lower()
    if key not in GPUS:
        raise ConfigError(f"no rates for gpu {name!r}.{did_you_mean(key, GPUS)} Allowed: {', '.join(GPUS)}")
    return GPUS[key]
