"""pytest-benchmark over the registry, hdrops alone: `pytest benches --benchmark-only`."""

import pytest
import torch

from benches.registry import Case, cases


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_case(benchmark, case: Case) -> None:
    torch.set_num_threads(1)
    function = case.build()["hdrops"]
    benchmark.extra_info.update(torch=torch.__version__, flops=case.flops, bytes=case.bytes)
    benchmark.pedantic(function, warmup_rounds=1, rounds=5)
