"""Weights in safetensors files, those that are encoded as :class:`Blocks`: packed codes and a scale for each block.

Needs the library safetensors, ``pip install 'altgrad[storage]'``, and nothing else imports this module. In a file the
tensor ``w`` in a block format is ``w.codes``, ``w.scales`` and, where there is one, ``w.tensor_scale``; every other
tensor is itself. The metadata has under ``"altgrad"`` a JSON object with the names of the state dict in their order:
with the fields of :class:`Blocks`, with the name whose memory they share, or null.
"""

import json
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ops_registry.checks import FLOAT_DTYPES

from .quantization import BlockFormat, Blocks, PerAxis, PerBlock, PerTensor, decode_blocks, encode_blocks
from .quantization.granularity import Granularity

__all__ = ["load", "save"]

_VERSION = 1
_GRANULARITIES = {granularity.__name__: granularity for granularity in (PerTensor, PerAxis, PerBlock)}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


def save(
    model: nn.Module | Mapping[str, Tensor | Blocks],
    path: str | Path,
    formats: BlockFormat | Mapping[str, BlockFormat | None] | None = None,
) -> None:
    """Writes a model's tensors to a safetensors file, its weights in a block format: ``save(model, path, MXFP4)``.

    Encoded are floating-point tensors of two dimensions and more, a module's buffers too, by
    :func:`altgrad.quantization.encode_blocks`. Biases, norms, counters, ``Blocks``, and what has infinities or NaN (a
    causal mask), of which a block would become NaN, stay as they are. Tensors of one memory (tied weights) are
    written once. The file appears under its name when it is whole, and until then one of that name stays as it was.

    Args:
        model: a module, whose state dict is taken, or a state dict, in which tensors may be ``Blocks`` already.
        path: the file, by convention ``*.safetensors``.
        formats: for all weights, or {pattern: format} with shell patterns of names, of which the first that matches
            decides; None, and no match: as they are.

    Raises:
        TypeError: an entry that is no tensor (a module's extra state), a DTensor, without data (meta, sparse), or of a
            dtype that safetensors has not.
        ValueError: a pattern that matches no weight, tied weights of different formats, names that would collide in the
            file, a name or path that is not UTF-8, and what ``encode_blocks`` refuses.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from altgrad.quantization import MXFP4
        >>> from altgrad.storage import load, save
        >>> model = torch.nn.Linear(64, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/model.safetensors", MXFP4)
        ...     stored = load(f"{folder}/model.safetensors", decode=False)
        ...     model.load_state_dict(load(f"{folder}/model.safetensors"))
        <All keys matched successfully>
        >>> stored["weight"].nbytes * 8 / model.weight.numel(), stored["bias"].dtype
        (4.25, torch.float32)
    """
    if not isinstance(model, nn.Module | Mapping):
        raise TypeError(f"model must be a module or a state dict, got {type(model).__name__}")
    _check_text("path", str(path))
    state: dict[str, Any] = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    for name, value in state.items():
        _check(name, value)
    chosen = _chosen(state, formats)
    index: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    first_at: dict[Any, str] = {}
    for name, value in state.items():
        first = first_at.setdefault(_place(name, value), name)
        if first != name:
            if chosen.get(first) != chosen.get(name):
                raise ValueError(f"{first} and {name} are tied, and their formats differ: give both the same")
            index[name] = first
            continue
        block_format = chosen.get(name)
        stored = value if block_format is None else encode_blocks(value.detach(), **block_format)
        index[name] = _fields(stored) if isinstance(stored, Blocks) else None
        for key, tensor in _parts(name, stored).items():
            if key in tensors:
                raise ValueError(f"two tensors would be called {key!r} in the file: rename one of them")
            tensors[key] = tensor.detach().resolve_conj().resolve_neg()  # safetensors takes the memory as it is
    _write(_apart(tensors), {"altgrad": json.dumps({"version": _VERSION, "tensors": index})}, Path(path))


def load(path: str | Path, *, decode: bool = True, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state dict that :func:`save` wrote, in its order: ``model.load_state_dict(load(path))``.

    Args:
        path: the file.
        decode: whether ``Blocks`` become tensors of the dtype that was encoded; False: they stay ``Blocks``.
        device: where the tensors are to be.

    Returns:
        A dictionary of tensors, and of ``Blocks`` with ``decode=False``. Tied tensors are the same object.

    Raises:
        ValueError: a file that is truncated or not safetensors, that :func:`save` did not write, whose metadata is
            damaged, or that lacks tensors or has tensors of wrong shapes; it names them.
        FileNotFoundError: no such file.

    Example:
        >>> import tempfile, torch
        >>> from altgrad.quantization import NVFP4, quantize_blocks
        >>> from altgrad.storage import load, save
        >>> w = torch.randn(4, 32, dtype=torch.bfloat16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save({"w": w}, f"{folder}/w.safetensors", NVFP4)
        ...     load(f"{folder}/w.safetensors")["w"].equal(quantize_blocks(w, **NVFP4))
        True
    """
    path = Path(path)
    if torch.device(device).type == "meta":
        raise ValueError(f"device must be one that holds data, got {device}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            index = _index(path, file.metadata(), set(file.keys()))
            stored = {name: _read(file, name, entry) for name, entry in index.items() if not isinstance(entry, str)}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or truncated: {error}") from error
    for name, value in stored.items():
        if isinstance(value, Blocks):
            _check_blocks(path, name, value)
            stored[name] = decode_blocks(value) if decode else value
    return {name: stored[entry if isinstance(entry, str) else name] for name, entry in index.items()}


def _check(name: str, value: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"names must be strings, got {name!r}")
    _check_text("names", name)
    if name == "__metadata__":
        raise ValueError("safetensors keeps the name '__metadata__' for itself: rename that tensor")
    for tensor in _parts(name, value).values():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor or Blocks, got {type(tensor).__name__} {tensor!r:.80}")
        if is_traceable_wrapper_subclass(tensor):
            raise TypeError(f"{name} must be a plain tensor, got a {type(tensor).__name__}: of a DTensor full_tensor()")
        if tensor.is_meta or tensor.layout != torch.strided:
            raise TypeError(
                f"{name} must be a strided tensor with data, got layout {tensor.layout}, device {tensor.device}"
            )


def _check_text(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} must be text in UTF-8, which safetensors takes, got {text!r}") from error


def _chosen(
    state: Mapping[str, Any], formats: BlockFormat | Mapping[str, BlockFormat | None] | None
) -> dict[str, BlockFormat]:
    """The format of each weight that is encoded."""
    if formats is None:
        return {}
    if not isinstance(formats, Mapping):
        raise TypeError(f"formats must be a BlockFormat or a mapping from patterns to them, got {formats!r}")
    patterns: Any = {"*": formats} if "granularity" in formats else formats
    for pattern, block_format in patterns.items():
        if block_format is not None and not (isinstance(block_format, Mapping) and "granularity" in block_format):
            raise TypeError(f"the format of pattern {pattern!r} must be a BlockFormat or None, got {block_format!r}")
    weights = [n for n, t in state.items() if isinstance(t, Tensor) and t.ndim > 1 and t.dtype in FLOAT_DTYPES]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in weights):
            raise ValueError(f"pattern {pattern!r} matches no weight: {', '.join(weights) or 'there is none'}")
    chosen = {name: next((f for p, f in patterns.items() if fnmatchcase(name, p)), None) for name in weights}
    return {name: f for name, f in chosen.items() if f is not None and state[name].isfinite().all()}


def _place(name: str, value: Tensor | Blocks) -> Any:
    """What two entries have in common only if they are one."""
    tensors = _parts(name, value).values()
    if not all(t.numel() for t in tensors):
        return name
    fields = json.dumps(_fields(value)) if isinstance(value, Blocks) else None
    return fields, *((t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_conj(), t.is_neg()) for t in tensors)


def _parts(name: str, value: Any) -> dict[str, Any]:
    """The tensors of an entry by their names in the file."""
    if not isinstance(value, Blocks):
        return {name: value}
    parts = {"codes": value.codes, "scales": value.scales, "tensor_scale": value.tensor_scale}
    return {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Dense tensors with a memory of their own each, which is what safetensors takes."""
    used: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in used else tensor
        result[name] = result[name].contiguous()
        used.add(memory)
    return result


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    except KeyError as error:  # how it says so
        names = [name for name, tensor in tensors.items() if tensor.dtype == error.args[0]]
        raise TypeError(f"safetensors has no {error.args[0]}, which is the dtype of {', '.join(names)}") from error
    finally:
        partial.unlink(missing_ok=True)


def _fields(blocks: Blocks) -> dict[str, Any]:
    """The fields of Blocks that are no tensors, in JSON's types."""
    g = blocks.granularity
    sizes = g.axes if isinstance(g, PerAxis) else dict(g.sizes) if isinstance(g, PerBlock) else None
    return {
        "format": blocks.format,
        "scale_format": blocks.scale_format,
        "has_tensor_scale": blocks.tensor_scale is not None,
        "granularity": {type(g).__name__: sizes},
        "n": blocks.n,
        "dtype": str(blocks.dtype).removeprefix("torch."),
    }


def _granularity(data: dict[str, Any]) -> Granularity:
    ((name, sizes),) = data.items()
    if isinstance(sizes, dict):  # whose keys are strings in JSON
        sizes = {int(dim): size for dim, size in sizes.items()}
    made: Granularity
    made = _GRANULARITIES[name](*[] if sizes is None else [tuple(sizes) if isinstance(sizes, list) else sizes])
    return made


def _index(path: Path, metadata: dict[str, str] | None, present: set[str]) -> dict[str, Any]:
    """What the metadata says of each name, with the fields of Blocks made; the file has all of their tensors."""
    if not metadata or "altgrad" not in metadata:
        raise ValueError(f"{path}: not written by altgrad.storage.save: its metadata has no 'altgrad'")
    try:
        data = json.loads(metadata["altgrad"])
        version, index = data["version"], dict(data["tensors"])
        if version != _VERSION:
            raise ValueError(f"its version is {version!r}, and this altgrad reads {_VERSION}")
        for name, entry in index.items():
            if isinstance(entry, str):
                if isinstance(index[entry], str):
                    raise ValueError(f"{name} is tied to {entry}, which is tied itself")
            elif entry is not None:
                scale = torch.empty(()) if entry["has_tensor_scale"] else None
                fields = entry["format"], entry["scale_format"], _granularity(entry["granularity"])
                index[name] = Blocks(
                    torch.empty(0), torch.empty(0), scale, *fields, entry["n"], _DTYPES[entry["dtype"]]
                )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its metadata is damaged: {type(error).__name__} {error}") from error
    wanted = {key for name, entry in index.items() if not isinstance(entry, str) for key in _parts(name, entry)}
    for what, names in (("missing", wanted - present), ("unexpected", present - wanted)):
        if names:
            raise ValueError(f"{path}: {what} tensors: {', '.join(sorted(names))}")
    return index


def _read(file: Any, name: str, entry: Blocks | None) -> Tensor | Blocks:
    if entry is None:
        return file.get_tensor(name)
    parts = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in _parts(name, entry)}
    return entry._replace(**parts)


def _check_blocks(path: Path, name: str, blocks: Blocks) -> None:
    """Decodes their shapes and dtypes."""
    try:
        decode_blocks(blocks.to("meta"))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: the tensors of {name} do not fit together: {error}") from error
