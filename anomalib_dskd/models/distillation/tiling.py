"""Tiling of images that are much larger than their defects, as anomalib's ``TilerConfigurationCallback`` sets it up."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler, compute_new_image_size, upscale_image
from lightning import Trainer
from torch import Tensor

from anomalib_dskd.errors import ArgumentError

__all__ = ["create_tiler", "map_tiles", "prepare_callback", "random_tiles", "tiler_settings"]

TILE_BATCH = 16  # tiles that pass through the networks together in evaluation: their features bound the memory


def prepare_callback(trainer: Trainer) -> None:
    """Give a ``TilerConfigurationCallback`` without ``stride`` the one that it documents, the tile size.

    anomalib's ``Tiler`` fails without one; ``test_anomalib_still_needs_a_stride`` tells when it does not.

    Raises:
        ArgumentError: ``remove_border_count`` is not 0.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, TilerConfigurationCallback):
            if callback.remove_border_count:
                msg = (
                    f"TilerConfigurationCallback with remove_border_count {callback.remove_border_count} is not "
                    "supported: anomalib's Tiler would set borders of anomaly maps to 0, and defects there would be "
                    "missed. Leave it out, and give a smaller stride for tiles that overlap."
                )
                raise ArgumentError(msg)
            if callback.stride is None:
                callback.stride = callback.tile_size


def random_tiles(images: Tensor, tiler: Tiler, generator: torch.Generator | None = None) -> Tensor:
    """Return one tile of each image, chosen at random: training needs the memory of a batch of tiles.

    The tiles are those of ``tiler.tile``, which would copy all of them.

    Args:
        images: ``(B, 3, H, W)``.
        tiler: anomalib's.
        generator: of random numbers on the CPU. Default: torch's.

    Returns:
        Tiles ``(B, 3, h, w)``.
    """
    tile, stride = (tiler.tile_size_h, tiler.tile_size_w), (tiler.stride_h, tiler.stride_w)
    size = compute_new_image_size(tuple(images.shape[-2:]), tile, stride)
    whole = upscale_image(images, size, tiler.mode)
    rows, columns = ((extent - side) // step + 1 for extent, side, step in zip(size, tile, stride, strict=True))
    chosen = torch.randint(rows * columns, (len(images),), generator=generator).tolist()
    corners = [(index // columns * stride[0], index % columns * stride[1]) for index in chosen]
    tiles = [
        image[:, top : top + tile[0], left : left + tile[1]] for image, (top, left) in zip(whole, corners, strict=True)
    ]
    return torch.stack(tiles)


def map_tiles(images: Tensor, tiler: Tiler, anomaly_map: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the anomaly map of images from those of their tiles; tiles that overlap are averaged.

    Args:
        images: ``(B, 3, H, W)``.
        tiler: anomalib's.
        anomaly_map: of tiles ``(N, 3, h, w)``; called with few at a time.

    Returns:
        Map ``(B, 1, H, W)``.
    """
    batch = images.shape[0]
    tiler = copy.copy(tiler)  # it keeps the images' sizes, which are symbols in exports
    tiles = tiler.tile(images)
    tiles = tiles.reshape(batch, -1, *tiles.shape[1:]).transpose(0, 1)  # (tiles, B, 3, h, w)
    # the number of images is a symbol in exports
    positions = TILE_BATCH if torch.compiler.is_exporting() else max(1, TILE_BATCH // batch)
    maps: list[Tensor] = []  # (B, 1, h, w) of each position
    for part in torch.split(tiles, positions):
        found = anomaly_map(part.flatten(0, 1))
        maps += found.reshape(len(part), batch, *found.shape[1:]).unbind()
    # stacked, since OpenVINO takes a transposition here for a shuffling of channels, and fails
    whole: Tensor = tiler.untile(torch.stack(maps, dim=1).flatten(0, 1))
    return whole


def tiler_settings(tiler: Tiler | None) -> dict[str, Any] | None:
    """Return the arguments that a tiler was created with; None without one."""
    if tiler is None:
        return None
    return {
        "tile_size": (tiler.tile_size_h, tiler.tile_size_w),
        "stride": (tiler.stride_h, tiler.stride_w),
        "remove_border_count": tiler.remove_border_count,
        "mode": str(tiler.mode.value),
    }


def create_tiler(settings: dict[str, Any] | None, given: Tiler | None) -> Tiler | None:
    """Return the tiler of a checkpoint.

    Args:
        settings: of the checkpoint, from :func:`tiler_settings`.
        given: by a ``TilerConfigurationCallback`` now, if there is one.

    Raises:
        ArgumentError: both differ.
    """
    if given is not None and tiler_settings(given) != settings:
        msg = (
            f"tiling: checkpoint has {settings}, TilerConfigurationCallback has {tiler_settings(given)}. Leave "
            "the callback out to use the checkpoint's tiles, or train with it."
        )
        raise ArgumentError(msg)
    return None if settings is None else Tiler(**{**settings, "mode": ImageUpscaleMode(settings["mode"])})
