"""What a traced step would hold had the weights not been lost to NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# What was computed a second time may take this much memory beside the job's own.
MAX_SHADOW_BYTES = 1 << 30
PRUNE_EVERY = 256


class Shadows:
    """Storages as they would be had the weights not been lost.

    A storage is clean (it has no shadow: what it holds is what it would hold), shadowed, or
    unknown: it was written by something that must not be run twice, as a collective.
    """

    def __init__(self, before: Mapping[int, torch.UntypedStorage]) -> None:
        self.given_up = ""
        self._known: dict[int, tuple[StorageWeakRef | None, torch.UntypedStorage | None]] = {
            key: (None, storage) for key, storage in before.items()
        }
        self._bytes = 0
        self._settled = 0

    def clear(self) -> None:
        self._known.clear()

    def of(self, tensor: Tensor) -> Tensor | None:
        """The tensor to look at in place of this one; None when that is unknown."""
        if not self._known or not has_storage(tensor):
            return tensor if has_storage(tensor) else None
        entry = self._known.get(storage_key(tensor))
        if entry is None:
            return tensor
        return None if entry[1] is None else _laid_out(entry[1], tensor)

    def compute(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], read: list[Tensor]
    ) -> Any:
        """The operation on shadows; None when none is among its inputs, or it cannot be run."""
        if not self._known:
            return None
        keys = [storage_key(tensor) for tensor in read if has_storage(tensor)]
        if not any(key in self._known for key in keys):
            return None
        if func.namespace not in ("aten", "prims") or any(
            key in self._known and self._known[key][1] is None for key in keys
        ):
            return None
        for tensor in mutated(func, args, kwargs):
            if storage_key(tensor) not in self._known:
                self._add(tensor, tensor.untyped_storage().clone())
        with _same_random_numbers(func, kwargs):
            try:
                return (func(*_replaced(args, self.of), **_replaced(kwargs, self.of)),)
            except Exception:
                return None  # its real twin speaks for itself

    def settle(
        self, read: list[Tensor], outputs: list[Tensor], shadow: Any, returned: list[Tensor]
    ) -> None:
        """Remember what an operation's outputs would be."""
        if not self._known:
            return
        depends = any(has_storage(item) and storage_key(item) in self._known for item in read)
        if not depends:
            return
        old = {storage_key(tensor) for tensor in read if has_storage(tensor)}
        if shadow is None:
            for tensor in outputs:
                self._add(tensor, None)
            return
        for tensor, twin in zip(returned, tensors_in(shadow), strict=True):
            if not has_storage(tensor) or storage_key(tensor) in old:
                continue  # a view of an input, whose storage is known
            same = tensor.shape == twin.shape and tensor.stride() == twin.stride()
            self._add(tensor, twin.untyped_storage() if same else None)

    def _add(self, tensor: Tensor, storage: torch.UntypedStorage | None) -> None:
        if not has_storage(tensor):
            return
        self._known[storage_key(tensor)] = (StorageWeakRef(tensor.untyped_storage()), storage)
        self._bytes += storage.nbytes() if storage is not None else 0
        self._settled += 1
        if self._settled % PRUNE_EVERY == 0 or self._bytes > MAX_SHADOW_BYTES:
            self._prune()

    def _prune(self) -> None:
        self._known = {
            key: entry
            for key, entry in self._known.items()
            if entry[0] is None or not entry[0].expired()
        }
        held = [storage for ref, storage in self._known.values() if ref and storage is not None]
        self._bytes = sum(storage.nbytes() for storage in held)
        if self._bytes > MAX_SHADOW_BYTES:
            self.given_up = f"computing it again took more than {MAX_SHADOW_BYTES >> 20} MB"
            # From here on everything that depends on the weights is unknown.
            self._known = {key: (ref, None) for key, (ref, _) in self._known.items()}


class _same_random_numbers:  # noqa: N801  # reads as what it does
    """What is drawn inside is drawn again after it."""

    def __init__(self, func: Any, kwargs: dict[str, Any]) -> None:
        self._draws = torch.Tag.nondeterministic_seeded in func.tags
        given = kwargs.get("generator")
        self._generator: torch.Generator = given if given is not None else torch.default_generator

    def __enter__(self) -> None:
        if self._draws:
            self._state = self._generator.get_state()

    def __exit__(self, *_: object) -> None:
        if self._draws:
            self._generator.set_state(self._state)


def storage_key(tensor: Tensor) -> int:
    """The identity of the memory that a tensor looks at, whichever view of it this is."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def has_storage(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        and tensor.layout == torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def tensors_in(nested: Any) -> Iterator[Tensor]:
    """Every tensor of nested tuples, lists and dicts, in order."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, tuple | list):
        for item in nested:
            yield from tensors_in(item)
    elif isinstance(nested, dict):
        for item in nested.values():
            yield from tensors_in(item)


def mutated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes in place, as its schema says."""
    found: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            found.extend(tensors_in(given))
    return found


def _replaced(nested: Any, of: Callable[[Tensor], Tensor | None]) -> Any:
    if isinstance(nested, Tensor):
        return of(nested)
    if isinstance(nested, tuple | list):
        items = [_replaced(item, of) for item in nested]
        return items if isinstance(nested, list) else tuple(items)
    if isinstance(nested, dict):
        return {key: _replaced(item, of) for key, item in nested.items()}
    return nested


def _laid_out(storage: torch.UntypedStorage, tensor: Tensor) -> Tensor:
    """A tensor like this one, over another storage."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
