"""What is put away takes no memory, and comes back as it was, views included, whatever happens meanwhile."""

from __future__ import annotations

import pytest
import torch

from r1_megatron.train.offload import HostShelf


def test_there_and_back() -> None:
    shelf, whole, other = HostShelf(), torch.arange(12.0), torch.ones(3, dtype=torch.bfloat16)
    view = whole[4:8].view(2, 2)
    for round in range(2):
        with shelf.holding([view, whole, other, torch.empty(0)]):
            assert whole.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
            buffers = shelf._buffers
        assert torch.equal(whole, torch.arange(12.0) + round) and torch.equal(other, torch.ones(3).bfloat16())
        assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        whole += 1
        assert view[0, 0] == 5 + round
    with shelf.holding([view, whole, other]):
        assert shelf._buffers is buffers  # used again
    with shelf.holding([other]):
        assert [len(buffer) for buffer in shelf._buffers] == [6]


def test_it_comes_back_after_an_error() -> None:
    tensor = torch.arange(3.0)
    with pytest.raises(RuntimeError, match="in the rollout"), HostShelf().holding([tensor]):
        raise RuntimeError("in the rollout")
    assert torch.equal(tensor, torch.arange(3.0))
