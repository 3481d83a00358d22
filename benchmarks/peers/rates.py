"""What the processor can do, measured on the spot: matrix products in the dtype Coterie picks here, reading memory.

spec: seconds (of one measurement). go: {}. Every limit in the results is of these rates.
"""

from __future__ import annotations

import torch
from protocol import Facts, Repetition, serve, versions

from coterie.lm.base import native_bfloat16
from coterie.lm.cost import matmul_rate, read_rate


def prepare(spec: Facts) -> tuple[Facts, Repetition]:
    cpu = torch.device("cpu")
    dtype = torch.bfloat16 if native_bfloat16(cpu) else torch.float32

    def repeat(asked: Facts) -> Facts:
        return {
            "matmul": matmul_rate(dtype, cpu, spec["seconds"]),
            "read": read_rate(cpu, spec["seconds"] / 2),
        }

    repeat({})
    return {
        "versions": versions("torch", "coterie"),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
    }, repeat


if __name__ == "__main__":
    serve(prepare)
