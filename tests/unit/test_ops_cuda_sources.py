"""The CUDA sources: run thread by thread on the CPU against the reference, and compiled for GPUs where nvcc is."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distributed_at import ops
from distributed_at.ops import attack_kernels, attack_step, build, reference
from tests.unit.ops_cases import same_bits, step_inputs

FEW = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
SOURCES = ("linf.cu", "l2.cu", "start.cu")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The CUDA sources as a host library (see emulate.h)."""
    target = tmp_path_factory.mktemp("emulated") / "kernels.so"
    folder = build.source_folder()
    command = ["g++", "-std=c++20", "-O1", "-DDAT_EMULATE", f"-I{Path(__file__).parent}", f"-I{folder}"]
    command += ["-ffp-contract=off", "-pthread", "-shared", "-fPIC", "-x", "c++"]
    subprocess.run([*command, *(str(folder / name) for name in SOURCES), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture
def on_emulated_gpu(emulated, monkeypatch):
    """Send CPU tensors through the marshalling and the kernels of CUDA."""
    monkeypatch.setattr(attack_kernels, "_backend", lambda x: "cuda")
    monkeypatch.setattr(build, "library", lambda device_type: emulated)
    monkeypatch.setattr(attack_step, "_plain", lambda x: False)


@given(step_inputs(), st.sampled_from([1, -1]))
@FEW
def test_cuda_linf_kernels_have_the_bits_of_the_reference(on_emulated_gpu, inputs, direction):
    x_adv, clean, grad, eps, step = inputs
    scalars = torch.tensor(eps, dtype=torch.float32), torch.tensor(step, dtype=torch.float32)
    named = {"eps": scalars[0], "step": scalars[1], "direction": direction}
    want = reference.linf_step(x_adv, clean, grad, *scalars, direction, (0.0, 1.0))
    assert same_bits(ops.linf_step(x_adv, clean, grad, **named), want)


@given(step_inputs())
@FEW
def test_cuda_l2_kernels_agree_with_the_reference(on_emulated_gpu, inputs):
    x_adv, clean, grad, eps, step = inputs
    x_adv = torch.nan_to_num(x_adv)
    scalars = torch.tensor(3 * eps, dtype=torch.float32), torch.tensor(3 * step, dtype=torch.float32)
    got = ops.l2_step(x_adv, clean, grad, eps=scalars[0], step=scalars[1], direction=-1)
    want = reference.l2_step(x_adv, clean, grad, *scalars, -1, 0.0, 1.0)
    torch.testing.assert_close(got, want, rtol=0, atol=2.0**-22)


def test_cuda_l2_kernels_cross_pieces_of_a_large_sample(on_emulated_gpu):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.rand(2, 3, 31, 53, generator=generator), torch.randn(2, 3, 31, 53, generator=generator)
    got = ops.l2_step(x, x, grad, eps=0.5, step=0.7, direction=-1)
    want = reference.l2_step(x, x, grad, torch.tensor(0.5), torch.tensor(0.7), -1, 0.0, 1.0)
    torch.testing.assert_close(got, want, rtol=0, atol=2.0**-22)


@given(step_inputs(special=False), st.booleans(), st.sampled_from([0.0, 0.5]))
@FEW
def test_cuda_random_start_has_the_bits_of_the_counters(on_emulated_gpu, inputs, clip, probability):
    _, clean, _, eps, _ = inputs
    ids = torch.arange(len(clean)) * 1000003
    case = {"seed": 2**63 + 11, "epoch": 7, "draw": 2, "clean_probability": probability, "clip": clip}
    radius = torch.tensor(eps, dtype=torch.float32)
    got = ops.random_start(clean, ids, eps=radius, **case)
    assert same_bits(got, reference.random_start(clean, ids, ids, radius, box=(0.0, 1.0), **case))


@pytest.mark.skipif(build._nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("source", SOURCES)
def test_cuda_sources_compile_without_spills(source, tmp_path):
    command = [build._nvcc(), *build._CUDA_FLAGS[:3], "-Xptxas", "-v", "-arch=sm_90", "-c"]
    done = subprocess.run(
        [*command, str(build.source_folder() / source), "-o", str(tmp_path / "out.o")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill" in line]
    assert spills
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)
