"""Forget: make torch let go of a mesh that is closed.

DTensor keeps what it works out about a mesh for the life of the process, in caches keyed by the mesh. A process that
lives through many generations would keep every one's groups open: 8 descriptors and 6 threads a generation (measured).

Rule of this file: torch's private parts (2.13), each by name. One that is gone in another version is passed over,
because to forget less is no fault; `tests/parallel/test_mesh.py` counts descriptors and threads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from torch.distributed.device_mesh import DeviceMesh


def forget(mesh: DeviceMesh) -> None:
    """Drop the groups that a mesh holds, and every cache entry about any mesh, on this thread."""
    registry = getattr(mesh, "_pg_registry", None)
    if isinstance(registry, dict):
        registry.clear()
    for clear in (_operators, _redistributions, _shapes, _topologies):
        _tolerantly(clear)


def _tolerantly(clear: Callable[[], None]) -> None:
    with suppress(ImportError, AttributeError):
        clear()


def _operators() -> None:
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()


def _redistributions() -> None:
    from torch.distributed.tensor import _redistribute

    _redistribute.clear_redistribute_planner_cache()
    _redistribute._gen_transform_infos.cache_clear()


def _shapes() -> None:
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    ShardingPropagator._propagate_tensor_meta_cached.cache_clear()


def _topologies() -> None:
    from torch.distributed.tensor._collective_utils import MeshTopoInfo

    MeshTopoInfo.build_from_mesh.cache_clear()
