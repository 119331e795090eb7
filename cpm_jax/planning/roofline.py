"""From costs to time, by the chip's published peaks.

Each operation takes the longer of its FLOPs at the peak of the matrix units and its bytes at the bandwidth of the
memory, and a region (the program, a loop's body) never less than all its bytes at that bandwidth. Each collective takes
its bytes at the bandwidth of the torus axes that its group spans. Those that the compiler runs beside computation cost
only what exceeds the computation of their region; the others are added. Nothing else is: no latency, no kernel below
its peak, no waiting for input. The result is what the hardware allows, an estimate from below.
"""

import dataclasses
from collections import defaultdict

from cpm_jax.planning.chips import Topology
from cpm_jax.planning.hlo_costs import Costs


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Estimated seconds of a step.

    Attributes:
        matmul: FLOPs at the peak: what a chip needs at least.
        memory: all traffic with the memory at its bandwidth.
        compute: of all operations; at least the larger of the two above.
        exposed: collectives that nothing hides.
        hidden: collectives beside computation.
    """

    matmul: float
    memory: float
    compute: float
    exposed: float
    hidden: float

    @property
    def total(self) -> float:
        """Of the step."""
        return self.compute + self.exposed


def step_time(costs: Costs, topology: Topology) -> StepTime:
    """Estimates how long a step takes on a slice of a pod."""
    chip = topology.chip
    busy, traffic = defaultdict[str, float](float), defaultdict[str, float](float)
    for operation in costs.operations:
        seconds = operation.hbm_bytes / chip.hbm_bandwidth
        traffic[operation.region] += operation.executions * seconds
        if not operation.prefetch:
            busy[operation.region] += operation.executions * max(seconds, operation.flops / chip.peak_flops)
    beside, alone = defaultdict[str, float](float), 0.0
    for collective in costs.collectives:
        seconds = collective.executions * collective.wire_bytes / topology.bandwidth(collective.group_size)
        if collective.overlapped:
            beside[collective.region] += seconds
        else:
            alone += seconds
    compute = {region: max(busy[region], traffic[region]) for region in busy.keys() | traffic.keys()}
    uncovered = {region: max(seconds - compute.get(region, 0.0), 0.0) for region, seconds in beside.items()}
    return StepTime(
        matmul=costs.flops / chip.peak_flops,
        memory=costs.hbm_bytes / chip.hbm_bandwidth,
        compute=sum(compute.values()),
        exposed=alone + sum(uncovered.values()),
        hidden=sum(beside.values()) - sum(uncovered.values()),
    )
