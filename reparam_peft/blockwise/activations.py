"""Outputs of blocks, in memory or on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..runtime.files import Scratch, writing


class Activations:
    """Outputs of blocks by key, in memory or as files of a temporary folder, which is deleted when the `with` block ends.

    What runs that were killed have left in the same place is deleted with the first folder that a process makes there.

    Args:
        folder: where the temporary folder is made; made itself where it does not exist; None: memory.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.scratch: Scratch | None = None
        if folder is not None:
            with writing(folder):
                Path(folder).mkdir(parents=True, exist_ok=True)
                self.scratch = Scratch(folder, "activations")
        self.kept: dict[tuple[Any, ...], Any] = {}
        self.files: dict[tuple[Any, ...], Path] = {}

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()
        if self.scratch is not None:
            self.scratch.__exit__(*error)

    def put(self, key: tuple[Any, ...], tree: Any) -> None:
        """Keep a tree of tensors and others in place of what is kept under the key; the caller must not change its tensors.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        self.drop(key)
        if self.scratch is None:
            self.kept[key] = tree
            return
        leaves, structure = tree_flatten(tree)
        path = self.scratch.folder / ("-".join(map(str, key)) + ".safetensors")
        tensors: dict[str, Tensor] = {}
        memory: set[int] = set()
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                apart = leaf.contiguous()
                shared = apart.untyped_storage().data_ptr() in memory  # a block may give one tensor twice
                tensors[str(index)] = apart.clone() if shared else apart
                memory.add(apart.untyped_storage().data_ptr())
        with writing(path):
            save_file(tensors, path)
        self.files[key] = path
        self.kept[key] = ([None if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)

    def clear(self) -> None:
        """Forget all."""
        for key in list(self.kept):
            self.drop(key)

    def holds(self, key: tuple[Any, ...]) -> bool:
        """Whether something is kept under a key."""
        return key in self.kept

    def get(self, key: tuple[Any, ...]) -> Any:
        """What was kept under a key, in tensors that may be changed.

        Raises:
            KeyError: nothing is kept under it.
        """
        if key not in self.files:
            return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.kept[key])
        leaves, structure = self.kept[key]
        tensors = load_file(self.files[key])
        return tree_unflatten([tensors.get(str(i), leaf) for i, leaf in enumerate(leaves)], structure)

    def drop(self, key: tuple[Any, ...]) -> None:
        """Forget what is kept under a key, if anything is."""
        self.kept.pop(key, None)
        if key in self.files:
            self.files.pop(key).unlink(missing_ok=True)
