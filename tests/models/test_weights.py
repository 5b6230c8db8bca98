"""Weights that exist as pickles alone: nothing but finite tensors of real numbers is built of them."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Shard

from jdm.errors import in_short
from jdm.models.weights import read_tensors


class Calls:
    """An object whose pickle calls a function with an argument."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(mark: Path) -> dict[str, object]:
    return {
        "open": Calls(open, str(mark), "w"), "shell": Calls(os.system, f"touch {mark}"),
        "exec": Calls(exec, f"open({str(mark)!r}, 'w')"), "touch": Calls(Path.touch, mark),
        "nested": Calls(getattr, Calls(__import__, "os"), "system"), "torch.load": Calls(torch.load, str(mark)),
        "jit": Calls(torch.jit.load, str(mark)), "module": torch.nn.Linear(1, 1), "placement": Shard(0),
        "mesh": DeviceMesh, "inner pickle": Calls(pickle.loads, b"cos\nsystem\n."), "a path": mark, "a set": {1, 2},
    }


@pytest.mark.parametrize("layout", ["zip", "old", "plain"])
@pytest.mark.parametrize("what", hostile(Path("x")))
@pytest.mark.hostile("pickle")
def test_a_hostile_pickle_builds_nothing(what, layout, tmp_path):
    mark, file, rest = tmp_path / "RAN", tmp_path / "w.pth", torch.ones(2)
    held = {"w": rest, "evil": hostile(mark)[what]}
    if layout == "plain":
        file.write_bytes(pickle.dumps(held))
    else:
        torch.save(held, file, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(Exception, match=r"weights_only|Unsupported|not named tensors|other than named tensors|Weights"):
        read_tensors(file)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["int8", "bool", "uint8", "complex64", "float8_e4m3fn", "float8_e5m2", "int64"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.hostile("weights")
def test_what_is_no_real_number_is_refused(kind, suffix, tmp_path):
    held, file = {"w": torch.ones(2).to(getattr(torch, kind))}, tmp_path / f"w{suffix}"
    torch.save(held, file) if suffix == ".pth" else save_file(held, file)
    with pytest.raises(ValueError, match=f"it holds w in torch.{kind}"):
        read_tensors(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.hostile("weights")
def test_what_is_not_finite_is_refused(value, suffix, tmp_path):
    held, file = {"w": torch.tensor([0.0, value])}, tmp_path / f"w{suffix}"
    torch.save(held, file) if suffix == ".pth" else save_file(held, file)
    with pytest.raises(ValueError, match="w is not finite"):
        read_tensors(file)


@pytest.mark.parametrize("held", [[1], 5, None, "x", {"w": 1}, {"state_dict": 5}, {"state_dict": [1]}], ids=repr)
@pytest.mark.hostile("weights")
def test_what_holds_no_named_tensors_is_refused(held, tmp_path):
    torch.save(held, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="other than named tensors"):
        read_tensors(tmp_path / "w.pt")


@pytest.mark.parametrize("harm", ["empty", "cut", "zip of others", "text"])
@pytest.mark.hostile("weights")
def test_a_damaged_file_is_refused(harm, tmp_path):
    whole, other = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.ones(9)}, whole)
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("data.pkl", b"cos\nsystem\n.")
    bytes_of = {"empty": b"", "cut": whole.getvalue()[:-40], "zip of others": other.getvalue(), "text": b"weights\n"}
    (tmp_path / "w.pt").write_bytes(bytes_of[harm])
    with pytest.raises((ValueError, RuntimeError, EOFError, pickle.UnpicklingError)) as caught:
        read_tensors(tmp_path / "w.pt")
    assert in_short(caught.value)


def test_named_tensors_are_read_and_types_stay_known(tmp_path):
    known = torch.serialization.get_safe_globals()
    torch.save({"epoch": 3, "state_dict": {"w": torch.ones(2), "a.position_ids": torch.arange(3)}}, tmp_path / "w.pt")
    assert read_tensors(tmp_path / "w.pt")["w"].tolist() == [1, 1]
    assert set(torch.serialization.get_safe_globals()) == set(known)
