import pytest
import torch

from selfsight.data.batch import Batch


def make(images: int) -> Batch:
    views = [torch.arange(2 * images * 12).reshape(2, images, 3, 2, 2).to(torch.uint8)]
    return Batch(views, torch.arange(images), torch.arange(images) % 3)


def test_micro_batches_are_slices_along_the_images():
    batch = make(6)
    parts = batch.micro(3)
    assert [len(part) for part in parts] == [2, 2, 2]
    assert torch.equal(torch.cat([p.views[0] for p in parts], dim=1), batch.views[0])
    assert torch.equal(torch.cat([p.positions for p in parts]), batch.positions)
    assert torch.equal(torch.cat([p.labels for p in parts]), batch.labels)


def test_micro_batches_must_be_equal():
    with pytest.raises(ValueError, match="6 images a rank cannot be cut into 4"):
        make(6).micro(4)


def test_to_keeps_the_values():
    batch = make(4).to("cpu")
    assert torch.equal(batch.views[0], make(4).views[0]) and len(batch) == 4
