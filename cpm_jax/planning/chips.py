"""TPU chips: published peaks, and the topologies that libtpu compiles for.

Peak bfloat16 FLOP/s, HBM capacity and bandwidth, and interconnect per chip are Google's:
v4 https://cloud.google.com/tpu/docs/v4, v5e https://cloud.google.com/tpu/docs/v5e,
v5p https://cloud.google.com/tpu/docs/v5p, v6e https://cloud.google.com/tpu/docs/v6e (read in November 2026).
The tables give the interconnect of a chip in both directions together (v5e 400, v5p 1,200, v6e 800 GB/s); a link in
one direction has that divided by twice the number of links. That of v4 is from the paper on it
(arXiv:2304.01433 §2: six links of 50 GB/s).
"""

import dataclasses
import math
import re

from cpm_jax.common.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        name: as in topology names.
        peak_flops: bfloat16 FLOP/s of the matrix units.
        hbm_bytes: capacity of its memory.
        hbm_bandwidth: of its memory, bytes/s.
        link_bandwidth: of one link to a neighbour in one direction, bytes/s. A torus axis has two links.
        num_axes: axes of the torus.
        torus_side: sides of this length or a multiple have wrap-around links.
        examples: topologies of it.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    num_axes: int
    torus_side: int
    examples: tuple[str, ...]


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * 2**30, 1.2e12, 50e9, 3, 4, ("2x2x1", "4x4x4", "8x8x8")),
        Chip("v5e", 197e12, 16 * 2**30, 819e9, 50e9, 2, 16, ("2x2", "4x4", "16x16")),
        Chip("v5p", 459e12, 95 * 2**30, 2.765e12, 100e9, 3, 4, ("2x2x1", "4x4x4", "8x8x8")),
        Chip("v6e", 918e12, 32 * 2**30, 1.64e12, 100e9, 2, 16, ("2x2", "4x4", "16x16")),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a pod.

    Attributes:
        chip: its chips.
        sides: chips along each axis of the torus.
    """

    chip: Chip
    sides: tuple[int, ...]

    @property
    def name(self) -> str:
        """As libtpu takes it: "v5p:8x8x8"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.sides))}"

    @property
    def num_chips(self) -> int:
        """Chips in all."""
        return math.prod(self.sides)

    def bandwidth(self, group_size: int) -> float:
        """Bytes/s that a chip can send at once to a group of neighbours on which a collective runs.

        A group spans as few axes of the torus as hold it, the longest first, and uses both directions of an axis that
        wraps around, one of an axis that does not.
        """
        held, links = 1, 0
        for side in sorted(self.sides, reverse=True):
            if held >= group_size:
                break
            if side > 1:
                held *= side
                links += 2 if side % self.chip.torus_side == 0 else 1
        return max(links, 1) * self.chip.link_bandwidth


def parse_topology(name: str) -> Topology:
    """Reads the name of a topology, such as "v5p:8x8x8".

    Raises:
        ConfigError: listing the chips, or the form of the sides, that are known.
    """
    known = ", ".join(f"{chip.name}:{chip.examples[-1]}" for chip in CHIPS.values())
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if match is None or match[1] not in CHIPS:
        raise ConfigError(
            f"PlanConfig.topology = {name!r}: must be a chip ({', '.join(CHIPS)}) and the sides of the slice, for "
            f"example {known}",
            field="PlanConfig.topology",
        )
    chip, sides = CHIPS[match[1]], tuple(int(side) for side in match[2].split("x"))
    if len(sides) != chip.num_axes or min(sides) < 1:
        raise ConfigError(
            f"PlanConfig.topology = {name!r}: a slice of {chip.name} has {chip.num_axes} sides of at least 1, for "
            f"example {', '.join(f'{chip.name}:{example}' for example in chip.examples)}",
            field="PlanConfig.topology",
        )
    return Topology(chip, sides)
