"""Tensors of checkpoints, one at a time: safetensors, .pt files of tensors, sharded ones by their index, folders.

Nothing in a file is executed: pickles are read by torch's ``weights_only`` loader.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
# What libraries call the weights in a folder; before each an index of its shards.
WEIGHTS = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
# How the names of files beside the weights begin.
STATES = ("optim.", "optimizer.", "scheduler.", "scaler.", "training_args.", "rng_state")
_REOPEN = 1 << 30  # bytes, at 8 an element, of a mapped file that may stay in memory before it is opened again


@dataclass(frozen=True)
class Entry:
    """A tensor of a file that is not read yet; key finds it there, also are other names of the same memory."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    key: tuple[Any, ...]
    also: list[str]

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()


class Checkpoint:
    """The tensors of a path: ``entries``, and ``read`` for each.

    Args:
        path: a ``.safetensors`` file, a ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file of tensors (in dictionaries and
            lists, their names joined by dots), the ``.index.json`` of a sharded checkpoint, or a folder: of that the
            index, else ``model.safetensors`` or another usual name, else all files of one suffix but states of
            training (``optimizer.pt``).

    Raises:
        ValueError: no such file, a truncated or foreign one, one without tensors or that holds itself, two tensors of
            one name, one that an index names and its shard lacks; one line.

    Example:
        >>> import tempfile, torch
        >>> from altgrad.report.checkpoint import Checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"model": {"weight": torch.ones(2, 3)}}, f"{folder}/a.pt")
        ...     checkpoint = Checkpoint(f"{folder}/a.pt")
        ...     checkpoint.entries[0].name, checkpoint.read(checkpoint.entries[0])
        ('model.weight', tensor([[1., 1., 1.],
                [1., 1., 1.]]))
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        files = _files(self.path)
        owners = {name: file for file, names in files.items() for name in names}
        entries = (entry for file in files for entry in _entries(file))
        self.entries = [entry for entry in entries if owners.get(entry.name, entry.file) == entry.file]
        if not self.entries:
            raise ValueError(f"{path}: no tensors in it")
        _check_names(self.path, self.entries, files)
        self._open: tuple[Path, Any] | None = None
        self._mapped = 0

    def read(self, entry: Entry) -> Tensor:
        """The tensor, in a file mapped to memory where that is possible."""
        self._mapped += 8 * entry.count
        if self._open is None or self._open[0] != entry.file or self._mapped > _REOPEN:
            self._open = None  # what was mapped goes
            self._open, self._mapped = (entry.file, _load(entry.file)), 8 * entry.count
        value = self._open[1]
        if _is_safetensors(entry.file):
            return value.get_tensor(*entry.key)
        for key in entry.key:
            value = value[key]
        return value


def _is_safetensors(file: Path) -> bool:
    return file.suffix == ".safetensors"


def _files(path: Path) -> dict[Path, set[str]]:
    """The files of a path, with the tensors that an index says are in them."""
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if path.is_dir():
        return _files_of_folder(path)
    if path.name.endswith(".index.json"):
        return _files_of_index(path)
    if _is_safetensors(path) or path.suffix in PICKLES:
        return {path: set()}
    raise ValueError(f"{path}: expected .safetensors, {', '.join(PICKLES)}, .index.json or a folder with one of them")


def _files_of_folder(path: Path) -> dict[Path, set[str]]:
    for name in WEIGHTS:
        if (path / f"{name}.index.json").exists():
            return _files_of_index(path / f"{name}.index.json")
    for name in WEIGHTS:
        if (path / name).exists():
            return {path / name: set()}
    for suffix in (".safetensors", *PICKLES):
        files = sorted(file for file in path.iterdir() if file.suffix == suffix and not file.name.startswith(STATES))
        if files:
            return {file: set() for file in files}
    raise ValueError(f"{path}: no weights in the folder: no .safetensors and none of {', '.join(PICKLES)}")


def _files_of_index(path: Path) -> dict[Path, set[str]]:
    tensors: dict[str, set[str]] = {}
    try:
        for tensor, name in json.loads(path.read_text(encoding="utf-8"))["weight_map"].items():
            tensors.setdefault(name, set()).add(tensor)
        files = {path.parent / name: found for name, found in tensors.items() if Path(name).name == name}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not an index of shards: {_line(error)}") from error
    if len(files) < len(tensors):
        raise ValueError(f"{path}: a shard must lie beside its index, got {', '.join(map(repr, tensors))}")
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ValueError(f"{path}: missing shards: {', '.join(missing)}")
    return files


def _check_names(path: Path, entries: list[Entry], files: Mapping[Path, set[str]]) -> None:
    """Each tensor has a name of its own, and is where an index says."""
    found: dict[str, Path] = {}
    for entry in entries:
        for name in (entry.name, *entry.also):
            if name not in found:
                found[name] = entry.file
            elif found[name] == entry.file:
                raise ValueError(f"{path}: two tensors are called {name}: rename one of them")
            else:
                both = f"{found[name].name} and in {entry.file.name}"
                raise ValueError(f"{path}: {name} is in {both}: give one of them itself")
    for file, names in files.items():
        if missing := sorted(name for name in names if found.get(name) != file):
            raise ValueError(f"{path}: {file.name} lacks {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}")


def _load(file: Path) -> Any:
    if _is_safetensors(file):
        return _open_safetensors(file)
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)  # written before torch 1.6
    except Exception as error:  # whatever a foreign file makes of the unpickler
        raise ValueError(f"{file}: not a file of tensors, or truncated: {_line(error)}") from error


def _open_safetensors(file: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise ValueError(f"{file}: reading it needs safetensors: pip install 'altgrad[report]'") from error
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a safetensors file, or truncated: {_line(error)}") from error


def _line(error: BaseException) -> str:
    if found := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):  # behind lines of advice
        return f"it holds {found[1]}; of a model, save the state_dict"
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return text if len(text) < 160 else f"{text[:157]}..."


def _entries(file: Path) -> list[Entry]:
    content = _load(file)
    if _is_safetensors(file):
        return [_entry_of_slice(file, content, name) for name in content.keys()]  # noqa: SIM118  (no mapping)
    found: dict[tuple[Any, ...], Entry] = {}
    try:
        tensors = list(_walk(content, ()))
    except RecursionError as error:
        raise ValueError(f"{file}: something in it holds itself, or is nested too deeply") from error
    for key, tensor in tensors:
        name = ".".join(map(str, key))
        if (kind := _kind(tensor)) is not None:
            found[key] = Entry(name, (), kind, file, key, [])
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else key
        if place in found:
            found[place].also.append(name)
        else:
            found[place] = Entry(name, tuple(tensor.shape), dtype, file, key, [])
    return list(found.values())


def _kind(value: Any) -> str | None:
    """What a value is, unless a tensor with its numbers in memory one by one."""
    if not isinstance(value, Tensor):
        return "state of an optimizer"
    dtype = str(value.dtype).removeprefix("torch.")
    if value.is_nested:
        return f"nested {dtype}"
    if value.layout != torch.strided:
        return f"{str(value.layout).removeprefix('torch.')} {dtype}"
    return f"meta {dtype}" if value.is_meta else None


def _entry_of_slice(file: Path, content: Any, name: str) -> Entry:
    part = content.get_slice(name)
    dtype = part.get_dtype()
    return Entry(name, tuple(part.get_shape()), _DTYPES.get(dtype, dtype), file, (name,), [])


# safetensors' words for the dtypes that a report is about; all others are left out.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _walk(value: Any, key: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The tensors within, and as a whole the states of optimizers beside them."""
    is_state = isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()
    if isinstance(value, Tensor) or (is_state and key):
        yield key, value
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _walk(entry, (*key, name))
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from _walk(entry, (*key, index))
