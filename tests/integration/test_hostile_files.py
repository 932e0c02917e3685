"""Files from a stranger, read by the commands that a user would type: nothing in them runs, nothing exhausts the memory.

Each case plants code that would make the folder ``MARKER``, a path that leaves its folder, or a size that is not there.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distributed_at.cli import main
from distributed_at.data.shards import SHARDS_NAME, write_shards
from distributed_at.engine.checkpoint import files
from distributed_at.engine.checkpoint.manager import CheckpointManager
from distributed_at.errors import CheckpointError

DATA = "__0_0.distcp"
MARKER = "planted-code-ran"
BOMB = 1 << 25  # index of a pickle's memo; an unpickler that believes it takes half a gigabyte
Case = tuple[Callable[[Path], list[str]], int, list[str]]  # arguments from a folder, exit code, phrases of the message


class Runs:
    """Unpickled by an ordinary reader, it calls ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def payload(folder: Path) -> Runs:
    return Runs(os.mkdir, str(folder / MARKER))


# ------------------------------------------------------------------ checkpoints, every hash and size of them in order


def state() -> dict[str, torch.Tensor]:
    return {"model.weight": torch.arange(12.0).view(4, 3), "buffer.count": torch.tensor(7)}


def checkpoint(folder: Path) -> Path:
    result = CheckpointManager(folder / "checkpoints").save(1, state(), {})
    assert result is not None
    assert result.ok
    return result.path


def rewrite_manifest(step: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    body = json.loads((step / files.MANIFEST).read_text())
    change(body)
    del body["sha256"]
    (step / files.MANIFEST).write_text(json.dumps({**body, "sha256": files._digest(body)}))


def write(step: Path, name: str, content: bytes) -> None:
    """Replace one file and make the manifest agree with it."""
    (step / name).write_bytes(content)
    size, digest = files.hash_file(step / name)
    rewrite_manifest(step, lambda body: body["files"].update({name: {"bytes": size, "sha256": digest}}))


def metadata_runs(folder: Path, step: Path) -> None:
    write(step, ".metadata", pickle.dumps(payload(folder)))


def metadata_asks_for_memory(folder: Path, step: Path) -> None:
    write(step, ".metadata", b"\x80\x02Nr" + BOMB.to_bytes(4, "little") + b".")


def metadata_points_outside(folder: Path, step: Path) -> None:
    raw = (step / ".metadata").read_bytes()
    assert raw.count(DATA.encode())
    assert len(DATA) == len("../../secret")
    write(step, ".metadata", raw.replace(DATA.encode(), b"../../secret"))


def metadata_claims_a_terabyte(folder: Path, step: Path) -> None:
    table = pickle.loads((step / ".metadata").read_bytes())
    table.state_dict_metadata["model.weight"].size = torch.Size([1 << 38])
    write(step, ".metadata", pickle.dumps(table))
    rewrite_manifest(step, lambda body: body["shapes"].update({"model.weight": [1 << 38]}))


def plant_tensor(step: Path, container: bytes) -> None:
    """Let the table's tensors all be ``container``, which is put behind the real ones."""
    raw, table = (step / DATA).read_bytes(), pickle.loads((step / ".metadata").read_bytes())
    for info in table.storage_data.values():
        info.offset, info.length = len(raw), len(container)
    write(step, DATA, raw + container)
    write(step, ".metadata", pickle.dumps(table))


def tensor_runs(folder: Path, step: Path) -> None:
    bad = io.BytesIO()
    torch.save(payload(folder), bad)
    plant_tensor(step, bad.getvalue())


def tensor_is_a_zip_bomb(folder: Path, step: Path) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as container:
        container.writestr("archive/data/0", bytes(1 << 24))
    plant_tensor(step, bomb.getvalue())


def manifest_names(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, step: rewrite_manifest(
        step, lambda body: body["files"].update({name: {"bytes": 0, "sha256": ""}})
    )


def manifest_claims_a_petabyte(folder: Path, step: Path) -> None:
    rewrite_manifest(step, lambda body: body["files"][DATA].update(bytes=1 << 50))


ESCAPES = ("../secret", "/etc/passwd", "a/b", "..", "__0_0.distcp/../../x", "")
# what is done to a good checkpoint, and what its reader says
CHECKPOINTS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "code in .metadata": (metadata_runs, ".metadata asks for posix.mkdir, which no checkpoint needs; nothing was run"),
    "memory bomb in .metadata": (metadata_asks_for_memory, ".metadata does not hold a table of tensors"),
    "path escape in .metadata": (metadata_points_outside, "points to a file outside the manifest: '../../secret'"),
    "size claim in .metadata": (metadata_claims_a_terabyte, "promises 1099511627784 bytes of tensors, the files have"),
    "code in a .distcp": (tensor_runs, "it names posix.mkdir, which tensors do not need; nothing in it was run"),
    "zip bomb in a .distcp": (tensor_is_a_zip_bomb, "container is compressed, which no checkpoint is"),
    "size claim in the manifest": (manifest_claims_a_petabyte, "its manifest says 1125899906842624"),
    **{
        f"path escape in the manifest: {name!r}": (manifest_names(name), "names a file that no checkpoint has")
        for name in ESCAPES
    },
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused_by_a_run_that_would_resume_from_it(name, tmp_path):
    spoil, phrase = CHECKPOINTS[name]
    step = checkpoint(tmp_path)
    spoil(tmp_path, step)
    target = {key: torch.zeros_like(value) for key, value in state().items()}
    with pytest.raises(CheckpointError) as caught:
        CheckpointManager(tmp_path / "checkpoints").load(step, target)
    assert not (tmp_path / MARKER).exists()
    assert phrase in str(caught.value) or "does not fit this run" in str(caught.value)
    assert all(not value.any() for value in target.values())


def convert(spoil: Callable[[Path, Path], None]) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        step = checkpoint(folder)
        spoil(folder, step)
        return ["checkpoint", "convert", str(step), str(folder / "weights.pt")]

    return build


# ----------------------------------------------------------------------------------------------- weights of others


def hostile_weights(folder: Path) -> list[str]:
    torch.save({"w": payload(folder)}, folder / "weights.pt")
    return ["checkpoint", "convert", str(folder / "weights.pt"), str(folder / "imported")]


def bare_pickle(folder: Path) -> list[str]:
    (folder / "weights.pt").write_bytes(pickle.dumps({"conv1.weight": payload(folder)}, 4))
    return ["checkpoint", "convert", str(folder / "weights.pt"), str(folder / "imported")]


def deepspeed_without_consent(folder: Path) -> list[str]:
    source = folder / "global_step3"
    source.mkdir()
    for name in ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"):
        torch.save(payload(folder), source / name)
    return ["checkpoint", "convert", str(source), str(folder / "imported")]


# -------------------------------------------------------------------------------------------------- pickles of images

ATTACKS: dict[str, Callable[[Path], Any]] = {
    "a shell command": lambda folder: Runs(os.system, f"mkdir {folder / MARKER}"),
    "eval": lambda folder: Runs(eval, f"__import__('os').mkdir({str(folder / MARKER)!r})"),
    "a function of numpy": lambda folder: Runs(np.save, str(folder / MARKER), np.zeros(1)),
    "code among the labels": lambda folder: {"data": np.zeros((2, 3072), np.uint8), "labels": [0, payload(folder)]},
    "code in an array of objects": lambda folder: {"data": np.array([payload(folder)], dtype=object)},
}


def verify_pickle(attack: str, protocol: int) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        path = folder / "extra.pickle"
        path.write_bytes(pickle.dumps(ATTACKS[attack](folder), protocol))
        return ["data", "verify", str(path)]

    return build


def cifar_batch(folder: Path) -> list[str]:
    batches = folder / "cifar" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (batches / name).write_bytes(pickle.dumps({b"data": payload(folder), b"labels": [0]}, 2))
    return ["train", "cifar/smoke.yaml", f"data.path={folder / 'cifar'}", "--workers", "1"]


def memory_bomb(folder: Path) -> list[str]:
    path = folder / "extra.pickle"
    path.write_bytes(b"\x80\x02Nr" + BOMB.to_bytes(4, "little") + b".")
    return ["data", "verify", str(path)]


def svhn_file(folder: Path) -> list[str]:
    from scipy.io import savemat

    cell = np.array([pickle.dumps(payload(folder)), "x"], dtype=object)
    for split in ("train", "test"):
        savemat(folder / f"{split}_32x32.mat", {"X": cell, "y": cell})
    return ["train", "cifar/smoke.yaml", "data.dataset=svhn", f"data.path={folder}", "--workers", "1"]


def svhn_pickle(folder: Path) -> list[str]:
    for split in ("train", "test"):
        (folder / f"{split}_32x32.mat").write_bytes(pickle.dumps(payload(folder), 2))
    return ["train", "cifar/smoke.yaml", "data.dataset=svhn", f"data.path={folder}", "--workers", "1"]


# ------------------------------------------------------------------------------------------- archives of extra images


def archive(**members: bytes) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        with zipfile.ZipFile(folder / "extra.npz", "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in members.items():
                file.writestr(f"{name}.npy", content)
        return ["data", "verify", str(folder / "extra.npz")]

    return build


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npy_header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue() + bytes(64)


LABELS = npy(np.zeros(2, np.int64))
IMAGES = npy(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))


def objects_in_archive(folder: Path) -> list[str]:
    return archive(image=npy(np.array([payload(folder)] * 2, dtype=object)), label=LABELS)(folder)


def escaping_member(folder: Path) -> list[str]:
    return archive(**{"../../ran/image": IMAGES, "label": LABELS})(folder)


# ----------------------------------------------------------------------------------------------------------- tar shards


def shards(spoil: Callable[[Path, Path], None]) -> Callable[[Path], list[str]]:
    """Pack two images, then let ``spoil(folder, shards)`` change what was packed."""

    def build(folder: Path) -> list[str]:
        source = folder / "source" / "n01"
        source.mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (8, 8), (k, 0, 0)).save(source / f"{k}.png")
        write_shards(folder / "source", folder / "packed" / "train", size=1)
        spoil(folder, folder / "packed" / "train")
        return ["data", "verify", str(folder / "packed")]

    return build


def edit_index(target: Path, **changes: np.ndarray) -> None:
    with np.load(target / SHARDS_NAME) as content:
        values = dict(content)
    np.savez(target / SHARDS_NAME, **{**values, **changes})


def shard_named(name: str) -> Callable[[Path, Path], None]:
    names = np.frombuffer(f"shard-00000.tar\0{name}".encode(), dtype=np.uint8)
    return lambda folder, target: edit_index(target, shard_names=names)


def shard_is_a_link(folder: Path, target: Path) -> None:
    (target / "shard-00001.tar").rename(folder / "elsewhere.tar")
    os.symlink(folder / "elsewhere.tar", target / "shard-00001.tar")


def image_at(**column: int) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, target: Path) -> None:
        ((key, value),) = column.items()
        with np.load(target / SHARDS_NAME) as content:
            changed = content[key].copy()
        changed[1] = value
        edit_index(target, **{key: changed})

    return spoil


def tar_holds(**fields: Any) -> Callable[[Path, Path], None]:
    """Put a member that the index does not know into a shard whose size and hash then agree with the index again."""

    def spoil(folder: Path, target: Path) -> None:
        import hashlib

        path = target / "shard-00001.tar"
        with tarfile.open(path, "a") as tar:
            member = tarfile.TarInfo(f"../../{MARKER}")
            for key, value in fields.items():
                setattr(member, key, value)
            tar.addfile(member)
        with np.load(target / SHARDS_NAME) as content:
            sizes, digests = content["shard_sizes"].copy(), bytes(content["shard_digests"]).decode().split("\0")
        sizes[1], digests[1] = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        packed = np.frombuffer("\0".join(digests).encode(), dtype=np.uint8)
        edit_index(target, shard_sizes=sizes, shard_digests=packed)

    return spoil


def index_runs(folder: Path, target: Path) -> None:
    edit_index(target, labels=np.array([payload(folder)] * 2, dtype=object))


# --------------------------------------------------------------------------------------------------------- all of them

CASES: dict[str, Case] = {
    **{f"checkpoint: {name}": (convert(spoil), 3, [phrase]) for name, (spoil, phrase) in CHECKPOINTS.items()},
    "weights: code in a .pt": (hostile_weights, 3, ["cannot read weights", "weights.pt", "it names posix.mkdir"]),
    "weights: a bare pickle": (bare_pickle, 3, ["cannot read weights", "weights.pt", "nothing in it was run"]),
    "weights: DeepSpeed's pickles without consent": (
        deepspeed_without_consent, 2, ["which can run any code when it is opened", "--allow-pickle"],
    ),
    **{
        f"extra images: {attack}, protocol {protocol}": (
            verify_pickle(attack, protocol), 2, ["refused to read: the file names", "Nothing in it was run"],
        )
        for attack in ATTACKS
        for protocol in (0, 2, 4)
    },
    "extra images: memory bomb in a pickle": (memory_bomb, 2, ["extra.pickle"]),
    "extra images: code in an .npz": (objects_in_archive, 2, ["'image' holds Python objects", "nothing was run"]),
    "extra images: size claim in an .npz": (
        archive(image=npy_header((1 << 40, 32, 32, 3)), label=LABELS), 2, ["'image' says uint8", "and holds 192"],
    ),
    "extra images: zip bomb in an .npz": (
        archive(image=npy(np.zeros((8192, 32, 32, 3), np.uint8)), label=LABELS), 2, ["'image' would unpack", "25,165,952"],
    ),
    "extra images: path escape in an .npz": (escaping_member, 2, ["holds no 'image'", "'../../ran/image'"]),
    "CIFAR: code in a batch": (cifar_batch, 2, ["data_batch_1", "refused to read", "Nothing in it was run"]),
    "SVHN: code in a cell": (svhn_file, 2, ["train_32x32.mat", "'X' must be uint8"]),
    "SVHN: a pickle": (svhn_pickle, 2, ["train_32x32.mat", "not a complete MAT file"]),
    **{
        f"shards: path escape in the index: {name!r}": (shards(shard_named(name)), 2, [f"names a shard {name!r}"])
        for name in ("../shard-00000.tar", "/etc/passwd", "sub/shard-00000.tar", "shard-0.tar")
    },
    "shards: a link": (shards(shard_is_a_link), 3, ["shard-00001.tar: the shard is absent or no plain file"]),
    "shards: an absurd size": (shards(image_at(length=1 << 50)), 2, ["image 1 lies outside its shard"]),
    "shards: a negative size": (shards(image_at(length=-1)), 2, ["image 1 lies outside its shard"]),
    "shards: an offset past the end": (shards(image_at(offset=1 << 50)), 2, ["image 1 lies outside its shard"]),
    "shards: a shard that does not exist": (shards(image_at(shard=99)), 2, ["image 1 lies outside its shard"]),
    "shards: code in the index": (shards(index_runs), 2, ["shards.npz: cannot be read", "allow_pickle=False"]),
    "shards: path escape in a tar": (shards(tar_holds()), 3, ["damaged: train/shard-00001.tar", f"'../../{MARKER}'"]),
    "shards: a link in a tar": (
        shards(tar_holds(type=tarfile.SYMTYPE, linkname="/etc/passwd")), 3, ["damaged: train/shard-00001.tar"],
    ),
    "shards: a folder in a tar": (shards(tar_holds(type=tarfile.DIRTYPE)), 3, ["damaged: train/shard-00001.tar"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused_and_nothing_in_it_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    build, wanted, phrases = CASES[name]
    words = build(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        code = main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    message = capsys.readouterr().err
    assert [*tmp_path.rglob(f"{MARKER}*"), *tmp_path.parent.glob(f"{MARKER}*")] == [], "planted code ran"
    assert code == wanted, message
    assert "Traceback" not in message
    for phrase in phrases:
        assert phrase in message, message
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 400, f"reading it took {grown:.0f} MB"


@pytest.mark.parametrize("name", ATTACKS)
def test_each_planted_attack_would_run_in_an_ordinary_reader(name, tmp_path):
    pickle.loads(pickle.dumps(ATTACKS[name](tmp_path)))
    assert list(tmp_path.glob(f"{MARKER}*")), "the attack is harmless, so that refusing it proves nothing"
