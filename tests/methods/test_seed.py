"""What is drawn for a micro-batch."""

from __future__ import annotations

import torch

from pipeline.data.augment.views import Batch
from pipeline.methods.base import seed


def test_a_micro_batch_draws_what_torch_draws_with_its_seed() -> None:
    batch = Batch({"view": [torch.zeros(1)]}, torch.zeros(1), ["a"], [0], 0, seed=2**63 + 11)
    torch.manual_seed(batch.seed)
    wanted = torch.rand(3), torch.randperm(5)
    torch.manual_seed(1)
    seed(batch)
    assert torch.equal(torch.rand(3), wanted[0]) and torch.equal(torch.randperm(5), wanted[1])
