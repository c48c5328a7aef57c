"""What the stored W(1+1) weights look like: which levels they use, how dense bitmaps are, where levels lie.

Weights are read one matrix at a time, so that no model is too large for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

BINS = 64
"""Bins of a histogram of levels, each of four of the int8 values -128 to 127."""

LEVELS = 4

CLIP = ".input_clip"
"""How paths of clip factors end."""


@dataclass(frozen=True)
class WeightStatistics:
    """One matrix (or stack of experts).

    Attributes:
        linear: its module path.
        layer: its decoder layer.
        shape: ``[..., N, K]``, outlier columns not counted.
        codes: shares of the elements that have level 0 (lowest) to 3.
        histograms: of each level's int8 values, ``[4, BINS]``, counted in groups.
    """

    linear: str
    layer: int
    shape: tuple[int, ...]
    codes: tuple[float, ...]
    histograms: np.ndarray

    @property
    def density(self) -> float:
        """Share of the bitmap's bits that are set: elements with one of the two inner levels."""
        return self.codes[1] + self.codes[2]


def statistics(directory: Path, files: Iterable[str], matrices: Iterable[Mapping[str, Any]]) -> list[WeightStatistics]:
    """Statistics of an artifact's W(1+1) matrices, in the order they are named.

    Args:
        directory: a checked artifact.
        files: names of its safetensors files.
        matrices: ``linear`` (module path), ``layer`` and ``shape`` of each, as ``ptq`` reports them; one whose planes
            are not stored is left out.
    """
    shards = [safe_open(str(directory / name), framework="np") for name in files]
    places = {path: shard for shard in shards for path in shard.keys()}  # noqa: SIM118 - not a mapping
    found = []
    for row in matrices:
        names = [f"{row['linear']}.weight.{part}" for part in ("sign", "bitmap", "levels")]
        if not all(name in places for name in names):
            continue
        sign, bitmap, levels = (places[name].get_tensor(name) for name in names)
        shape = tuple(row["shape"])
        codes = code_shares(sign, bitmap, int(np.prod(shape)))
        found.append(WeightStatistics(row["linear"], row["layer"], shape, codes, level_histograms(levels)))
    return found


def clip_factors(directory: Path, files: Iterable[str]) -> dict[str, tuple[float, float]]:
    """What is left of the inputs' maxima and minima behind the clip, by path of the (first) linear that reads them."""
    found = {}
    for name in files:
        with safe_open(str(directory / name), framework="np") as shard:
            for path in shard.keys():  # noqa: SIM118 - not a mapping
                if path.endswith(CLIP):
                    high, low = shard.get_tensor(path).tolist()
                    found[path.removesuffix(CLIP)] = (high, low)
    return found


def code_shares(sign: np.ndarray, bitmap: np.ndarray, elements: int) -> tuple[float, ...]:
    """Shares of the codes 0 to 3 among ``elements``, from packed planes ``uint8 [..., N, ceil(K / 8)]``.

    Padding bits are zero in both planes, as code 0 has them; so code 0 is what the others leave.
    """
    upper, inner, both = (_bits(plane) for plane in (sign, bitmap, sign & bitmap))
    counts = (inner - both, both, upper - both)
    return tuple(count / elements for count in (elements - sum(counts), *counts))


def level_histograms(levels: np.ndarray) -> np.ndarray:
    """How often each of the four levels ``int8 [..., 4]`` falls into each of :data:`BINS` bins: ``int64 [4, BINS]``."""
    bins = (levels.reshape(-1, LEVELS).astype(np.int64) + 128) * BINS // 256
    return np.stack([np.bincount(bins[:, level], minlength=BINS) for level in range(LEVELS)])


def by_layer(found: Sequence[WeightStatistics]) -> dict[int, np.ndarray]:
    """Histograms ``[4, BINS]`` of all matrices of a decoder layer together."""
    result: dict[int, np.ndarray] = {}
    for item in found:
        result[item.layer] = result.get(item.layer, 0) + item.histograms
    return result


def _bits(plane: np.ndarray) -> int:
    return int(np.bitwise_count(plane).sum(dtype=np.int64))
