"""The index of a checkpoint of several processes: torch's own is read, and nothing else is built of a pickle."""

import os
import pickle
import subprocess

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from jdm.errors import UsageError
from jdm.training import checkpoint, sharded


@pytest.fixture
def place(tmp_path):
    """A checkpoint in torch's format, of a layer with two parameters."""
    folder = tmp_path / "checkpoints" / "step-0000001"
    layer = nn.Linear(3, 2)
    state = checkpoint.State({"net": layer}, {}, {}, {})
    dcp.save(checkpoint._tensors(state), checkpoint_id=folder, no_dist=True)
    (folder / "state.json").write_text('{"step": 1, "optimizers": {}}')
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    return folder


def loaded(place):
    layer = nn.Linear(3, 2)
    checkpoint.load(checkpoint.State({"net": layer}, {}, {}, {}), place, alone=True)
    return layer


def test_a_checkpoint_of_torch_is_read(place):
    was = torch.load(place.parents[1] / "layer.pt")
    assert all(torch.equal(value, was[key]) for key, value in loaded(place).state_dict().items())


class Touch:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize("hostile", [
    lambda ran: Touch(open, str(ran), "w"), lambda ran: Touch(os.system, f"touch {ran}"),
    lambda ran: Touch(subprocess.check_call, ["touch", str(ran)]), lambda ran: Touch(eval, f"open({str(ran)!r}, 'w')"),
    lambda ran: Touch(torch.load, str(ran)), lambda ran: Touch(getattr, torch.Size, "numel"),
    lambda ran: nn.Linear(1, 1),
    lambda ran: [1], lambda ran: None, lambda ran: BytesStorageMetadata(), lambda ran: MetadataIndex("x"),
], ids=range(11))
@pytest.mark.hostile("pickle")
def test_a_hostile_index_builds_nothing(hostile, place, tmp_path):
    (place / ".metadata").write_bytes(pickle.dumps(hostile(tmp_path / "RAN")))
    with pytest.raises(UsageError, match=r"step-0000001 is damaged .* delete it"):
        loaded(place)
    assert not (tmp_path / "RAN").exists()


def changed(place, change):
    index = dcp.FileSystemReader(place).read_metadata()
    change(index)
    (place / ".metadata").write_bytes(pickle.dumps(index))


def first(index):
    return next(iter(index.storage_data.values()))


@pytest.mark.parametrize(("change", "said"), [
    (lambda index: setattr(first(index), "relative_path", "../../layer.pt"), "no file of the checkpoint"),
    (lambda index: setattr(first(index), "relative_path", "/etc/passwd"), "no file of the checkpoint"),
    (lambda index: setattr(first(index), "transform_descriptors", ["zstd"]), "no file of the checkpoint"),
    (lambda index: setattr(index.state_dict_metadata["module.net.weight"], "size", torch.Size([2**40, 2])), "larger"),
    (lambda index: setattr(index.state_dict_metadata["module.net.weight"], "size", 5), "no type or shape"),
    (lambda index: index.state_dict_metadata.update(x=BytesStorageMetadata()), "BytesStorageMetadata"),
    (lambda index: setattr(index, "storage_data", None), "not the index"),
    (lambda index: setattr(index, "state_dict_metadata", []), "of another type"),
])
@pytest.mark.hostile("checkpoints")
def test_an_index_cannot_lead_elsewhere(change, said, place):
    changed(place, change)
    with pytest.raises(UsageError, match=rf"step-0000001 is damaged .*{said}"):
        loaded(place)


@pytest.mark.hostile("checkpoints")
def test_a_cut_index_is_damaged(place):
    whole = (place / ".metadata").read_bytes()
    for length in range(0, len(whole), 97):
        (place / ".metadata").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not the index of a checkpoint"):
            sharded.Reader(place).read_metadata()
