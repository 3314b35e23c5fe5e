"""Checkpoints that do not know the world size: commit, verify, restore, retention.

`checkpoints/step-<n>/` is the state after n steps. `manifest.json`, written last, is the commit: a folder without it,
or with a file that differs from what it lists, is no checkpoint and is never read.

    adapter_model.safetensors, adapter_config.json   fp32 masters in PEFT's form   (adapter.kind: lora)
    model.safetensors                                fp32 masters                  (adapter.kind: full)
    optimizer-<i>-of-<n>.safetensors                 what rank i of n held of both Adam moments: flat pieces, by
                                                     `<parameter>/<moment>/<first element>`
    config.json                                      the model's config, context extension included
    state.json                                       step, fingerprints, config hash, attempt, eval/loss
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import file_digest, sha256
from itertools import compress
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from safetensors import torch as safetensors
from torch import Tensor
from transformers import PreTrainedModel
from upath import UPath

from longlora.adapters import adapter_keys, peft_key
from pipeline.config import ConfigError
from pipeline.optimizer import MOMENTS, Fragment, ParameterState
from pipeline.storage import create_once, is_local, json_bytes, read_bytes, read_json, remove_tree
from pipeline.tensor_file import FloatTensor, in_order, tensor_file

MANIFEST = "manifest.json"
Files = dict[str, dict[str, int | str]]
"""Entries of a manifest: size and sha256 of each file by its name."""
STEP_FOLDER = re.compile(r"step-(\d+)$")
FORMAT = 2
OTHER_VERSION = "format"
FILE = re.compile(r"(adapter_)?(model\.safetensors|config\.json)|state\.json|optimizer-\d+-of-\d+\.safetensors")


@dataclass(frozen=True)
class RunState:
    """What a checkpoint says beside its tensors. `step` steps are done; `position` sequences have been trained."""

    step: int
    position: int
    packs_fingerprint: str
    base_fingerprint: str
    training_hash: str
    attempt: int
    eval_loss: float | None
    format: int = FORMAT


def save(
    run_folder: UPath, state: RunState, network: PeftModel | PreTrainedModel, parameters: dict[str, ParameterState]
) -> UPath:
    """Writes and commits `checkpoints/step-<state.step>/`; called on one rank, with the parameters in full.

    An uncommitted or damaged folder of the same step is replaced. OSError (e.g. a full disk) leaves no commit behind.
    """
    folder = step_folder(run_folder, state.step)
    if folder.exists():
        remove_tree(folder)
    fragments = {name: Fragment(0, _flat(whole)) for name, whole in parameters.items()}
    files = write_fragments(folder, network, fragments, rank=0, world_size=1)
    masters = {name: [fragment.state.master.numpy()] for name, fragment in fragments.items()}
    files |= write_network(folder, network, masters, state)
    commit(folder, files)
    return folder


def step_folder(run_folder: UPath, step: int) -> UPath:
    return run_folder / "checkpoints" / f"step-{step}"


def write_fragments(
    folder: UPath, network: PeftModel | PreTrainedModel, fragments: dict[str, Fragment], rank: int, world_size: int
) -> Files:
    """Writes one rank's pieces of the moments; returns the manifest's entry of the file."""
    key = peft_key if isinstance(network, PeftModel) else str
    pieces = {
        f"{key(name)}/{moment}/{fragment.start}": _flat_tensor(getattr(fragment.state, moment))
        for name, fragment in fragments.items()
        for moment in MOMENTS
    }
    return _write(folder, f"optimizer-{rank + 1}-of-{world_size}.safetensors", *tensor_file(pieces))


def write_network(
    folder: UPath,
    network: PeftModel | PreTrainedModel,
    masters: Mapping[str, Sequence[npt.NDArray[np.float32]]],
    state: RunState,
) -> Files:
    """Writes the weights, given in flat pieces, the configs and state.json; returns the manifest's entries."""
    shapes = {name: tensor_shape(parameter) for name, parameter in network.named_parameters()}
    weights = {name: FloatTensor(shapes[name], pieces) for name, pieces in masters.items()}
    if isinstance(network, PeftModel):
        config = cast(PreTrainedModel, network.get_base_model()).config
        adapter = {key: weights[name] for key, name in adapter_keys(weights, network).items()}
        files = _write(folder, "adapter_model.safetensors", *tensor_file(adapter))
        files |= _write(folder, "adapter_config.json", _adapter_config(network))
    else:
        config = network.config
        files = _write(folder, "model.safetensors", *tensor_file(weights))
    files |= _write(folder, "config.json", config.to_json_string().encode())
    return files | _write(folder, "state.json", json_bytes(asdict(state)))


def commit(folder: UPath, files: Files) -> None:
    """Makes a checkpoint of files that are written. RuntimeError if another writer has committed this step."""
    if not create_once(folder / MANIFEST, json_bytes({"format": FORMAT, "files": files})):
        raise RuntimeError(f"{folder}: was committed by another writer")


def discard_uncommitted(run_folder: UPath, restored: UPath | None = None) -> list[int]:
    """Deletes what interrupted saves left behind, and damaged checkpoints; returns their steps.

    Called by one rank before training goes on, when nobody writes: their steps will be saved again.
    restored: what `newest` has given; of it and of older ones only the sizes of the files are looked at.
    """
    folder = run_folder / "checkpoints"
    found = [STEP_FOLDER.search(path.name) for path in folder.iterdir()] if folder.exists() else []
    present = [int(match[1]) for match in found if match]
    verified = read_state(restored).step if restored is not None else -1
    reasons = {step: damage(step_folder(run_folder, step), contents=step > verified) for step in sorted(present)}
    dropped = [step for step, reason in reasons.items() if reason and not reason.startswith(OTHER_VERSION)]
    for step in dropped:
        _remove(step_folder(run_folder, step))
    return dropped


def steps(run_folder: UPath) -> list[int]:
    """Steps of the folders that have a manifest, ascending; their files have not been verified."""
    folder = run_folder / "checkpoints"
    if not folder.exists():
        return []
    matches = [STEP_FOLDER.search(path.name) for path in folder.iterdir() if (path / MANIFEST).exists()]
    return sorted(int(match[1]) for match in matches if match)


def newest(run_folder: UPath) -> UPath | None:
    """The newest checkpoint that verifies, or None; ConfigError if it was written by another version."""
    for step in reversed(steps(run_folder)):
        folder = step_folder(run_folder, step)
        reason = damage(folder)
        if reason.startswith(OTHER_VERSION):
            raise ConfigError(f"{folder}: {reason}; go on with the version that wrote it, or give the run another name")
        if not reason:
            return folder
    return None


def damage(folder: UPath, contents: bool = True) -> str:
    """What is wrong with a committed checkpoint, in words; empty if every file is as its manifest says.

    Without `contents` the files' sizes are compared, and what is in them is not read. OSError for a storage that does
    not answer: what cannot be read now may be whole, and must not be passed over or deleted.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["format"] != FORMAT:
            if read_json(folder / "state.json")["format"] == FORMAT:
                return f"{MANIFEST} differs from state.json"
            return f"{OTHER_VERSION} {manifest['format']}, this version reads {FORMAT}"
        files = manifest["files"]
        for name in files:
            if not FILE.fullmatch(name):
                return f"{name!r} is no file of a checkpoint"
        with ThreadPoolExecutor() as pool:  # one core hashes more slowly than a disk reads
            differ = pool.map(lambda name: _differs(folder / name, files[name], contents), files)
            for name in compress(files, differ):
                return f"{name} differs from the manifest"
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def read_state(folder: UPath) -> RunState:
    return RunState(**read_json(folder / "state.json"))


def read_parameters(folder: UPath, network: PeftModel | PreTrainedModel) -> dict[str, ParameterState]:
    """The parameter states of a verified checkpoint, by the names of `network`'s trainable parameters."""
    lora = isinstance(network, PeftModel)
    masters = _load(folder / ("adapter_model.safetensors" if lora else "model.safetensors"))
    pieces = _load_pieces(folder)
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    key = {name: peft_key(name) if lora else name for name in names}
    missing = [name for name in names if key[name] not in masters]
    if missing:
        raise ConfigError(f"{folder}: has no weights for {missing[0]}: adapter settings differ from those of the run")
    return {
        name: ParameterState(
            masters[key[name]],
            *(_joined(pieces.get(f"{key[name]}/{moment}", {}), masters[key[name]], name) for moment in MOMENTS),
        )
        for name in names
    }


def retain(run_folder: UPath, keep_last: int, keep_best: int) -> list[int]:
    """Deletes all but the newest `keep_last` and the `keep_best` of lowest eval/loss; returns the deleted steps.

    Folders that lack files count for nothing and stay, for `discard_uncommitted`: a stale writer's manifest, committed
    after its files were discarded, must not push out a checkpoint.
    """
    folders = {step: step_folder(run_folder, step) for step in steps(run_folder)}
    present = [step for step, folder in folders.items() if _is_whole(folder)]
    losses = {step: read_state(folders[step]).eval_loss for step in present}
    scored = sorted((loss, step) for step, loss in losses.items() if loss is not None)
    kept = set(present[-keep_last:]) | {step for _, step in scored[:keep_best]}
    dropped = [step for step in present if step not in kept]
    for step in dropped:
        _remove(folders[step])
    return dropped


def _is_whole(folder: UPath) -> bool:
    """By its files' sizes; one that cannot be looked at now counts for nothing and stays, as one that lacks files."""
    try:
        return not damage(folder, contents=False)
    except OSError:
        return False


def check_resumable(state: RunState, packs_fingerprint: str, base_fingerprint: str) -> None:
    """ConfigError with the reason if a checkpoint belongs to other data or another base model."""
    for what, saved, current in (
        ("the packs", state.packs_fingerprint, packs_fingerprint),
        ("the base weights", state.base_fingerprint, base_fingerprint),
    ):
        if saved != current:
            raise ConfigError(
                f"run.name: {what} differ from those that the run was trained on ({saved} then, {current} now); "
                "give the run another name, or the old data"
            )


def base_fingerprint(folder: str) -> str:
    """Hash of a model folder's weight files: names, sizes, first and last MiB. A hub name stands for itself."""
    digest = sha256()
    files = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    if not files:
        return folder
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def tensor_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Of the whole parameter, also where ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _flat_tensor(part: Tensor) -> FloatTensor:
    return FloatTensor(part.shape, [part.numpy()])


def _write(folder: UPath, name: str, *content: bytes | memoryview) -> Files:
    """Writes a file and hashes it at the same time; returns the manifest's entry."""
    with ThreadPoolExecutor() as pool:
        digest = pool.submit(_sha256, content)
        if not create_once(folder / name, *content):  # a stale writer must not touch what another has committed
            raise RuntimeError(f"{folder / name}: was written by another writer")
        return {name: {"size": sum(map(len, content)), "sha256": digest.result()}}


def _sha256(content: Sequence[bytes | memoryview]) -> str:
    digest = sha256()
    for part in content:
        digest.update(part)
    return digest.hexdigest()


def _differs(path: UPath, expected: dict[str, int | str], contents: bool) -> bool:
    """Whether a file is not as the manifest's entry says."""
    if path.stat().st_size != expected["size"]:
        return True
    if not contents:
        return False
    with path.open("rb") as file:
        digest = file_digest(file, "sha256")  # type: ignore[arg-type]  # has `readinto`, on disks and object stores
    return digest.hexdigest() != expected["sha256"]


def _remove(folder: UPath) -> None:
    """Deletes a checkpoint, the manifest first: a folder that is half deleted must not look committed."""
    if (folder / MANIFEST).exists():
        (folder / MANIFEST).unlink()
    remove_tree(folder)


def _flat(state: ParameterState) -> ParameterState:
    return ParameterState(*(tensor.flatten() for tensor in (state.master, state.exp_avg, state.exp_avg_sq)))


def _load_pieces(folder: UPath) -> dict[str, dict[int, Tensor]]:
    """`<parameter>/<moment>` → first element → piece, of all the files that the manifest lists."""
    pieces: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name in read_json(folder / MANIFEST)["files"]:
        if name.startswith("optimizer-"):
            for key, piece in _load(folder / name).items():
                tensor, _, start = key.rpartition("/")
                pieces[tensor][int(start)] = piece
    return pieces


def _joined(pieces: dict[int, Tensor], like: Tensor, name: str) -> Tensor:
    """Pieces of a flat tensor, put together in the shape of `like`; ConfigError if they do not fill it."""
    try:
        ordered = in_order(name, pieces, like.numel())
    except ValueError as error:
        raise ConfigError(f"the optimizer's state of {error}") from None
    return (ordered[0] if len(ordered) == 1 else torch.cat(ordered)).reshape(like.shape)


def _adapter_config(network: PeftModel) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        network.active_peft_config.save_pretrained(folder)
        return (Path(folder) / "adapter_config.json").read_bytes()


def _load(path: UPath) -> dict[str, Tensor]:
    """The tensors of a file; of a local one only what is used is read."""
    return safetensors.load_file(str(path)) if is_local(path) else safetensors.load(read_bytes(path))
