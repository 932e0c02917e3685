"""A checkpoint that DeepSpeed itself wrote on two ranks is imported bit-equal, weights and optimiser state alike."""

from __future__ import annotations

from distributed_at.engine.checkpoint import tools
from tests.distributed import checkpoint_worker as worker


def save_native(root, optimizer):
    engine = worker.build(1, optimizer)
    worker.train(engine, range(3))
    engine.save_checkpoint(str(root), tag=f"step3-{optimizer}")
    return worker.digests(worker.tensors(engine, 0.0))


def digests_of_files(path):
    import hashlib

    tensors, _ = tools.read_checkpoint(path)
    return {name: hashlib.sha256(value.reshape(-1).numpy().tobytes()).hexdigest() for name, value in tensors.items()}


def both(root):
    return {optimizer: save_native(root, optimizer) for optimizer in ("sgd", "adam")}


def test_native_zero_checkpoint_is_imported_bit_equal(tmp_path):
    written = worker.run(tmp_path / "a", 2, both, tmp_path / "native")[0]
    for optimizer, expected in written.items():
        source = tmp_path / "native" / f"step3-{optimizer}"
        path = tools.checkpoint_convert(source, tmp_path / optimizer, allow_pickle=True)
        found = digests_of_files(path)
        assert found == {name: digest for name, digest in expected.items() if not name.startswith("ema.")}
