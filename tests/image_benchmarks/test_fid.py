"""FID through torch-fidelity: the real Inception with random weights, the distance by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import sqrtm

from fastvar.image_benchmarks import FID, Item, class_items, folder_items, run_benchmark
from tests.helpers.pictures import save_images, smooth_images


def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"torch-fidelity is needed: pip install .*\[fid\]"):
        FID(class_items(2, 4), tmp_path, tmp_path)


def test_items(tmp_path: Path) -> None:
    save_images(tmp_path, ["b", "c/a.1"], smooth_images(2))
    assert folder_items(tmp_path) == [Item("b", "", "b.png"), Item("c/a.1", "", "c/a.1.png")]
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match="expected a folder of at least 2 images, got 1 in"):
        folder_items(tmp_path)
    assert [item.prompt for item in class_items(3, 5)] == [0, 1, 2, 0, 1]
    assert class_items(3, 5)[4].name == "000004"


def test_by_hand(tmp_path: Path, inception: Path) -> None:
    """Against a folder, and against the statistics of that folder in a file."""
    images, real = smooth_images(5, seed=1), smooth_images(4, 30, 30, seed=2)
    save_images(tmp_path / "images", "abcde", images)
    save_images(tmp_path / "real", ["x/1", "x/2", "y/1", "y/2"], real, ".bmp")
    items = folder_items(tmp_path / "images")
    fid = FID(items, tmp_path / "real", tmp_path / "out/reference", weights=inception, features="64")
    figures = run_benchmark(fid, tmp_path / "images", tmp_path / "out")["figures"]
    assert figures["reference_images"] == 4

    pixels = [(part * 255).round().byte() for part in (images, real)]
    first, second = (fid.network(part)[0].double().numpy() for part in pixels)
    mu, sigma = second.mean(0), np.cov(second, rowvar=False)
    own = np.cov(first, rowvar=False)
    gap = np.square(first.mean(0) - mu).sum()
    expected = gap + np.trace(own) + np.trace(sigma) - 2 * np.trace(sqrtm(own @ sigma).real)
    assert figures["fid_95"] is None
    assert gap > 0 and figures["fid"] == pytest.approx(expected, rel=1e-3)

    np.savez(tmp_path / "real.npz", mu=mu, sigma=sigma)
    given = FID(items, tmp_path / "real.npz", tmp_path / "out/reference", weights=inception, features="64")
    again = run_benchmark(given, tmp_path / "images", tmp_path / "out")["figures"]
    assert again["fid"] == pytest.approx(figures["fid"], rel=1e-6) and "reference_images" not in again
    np.savez(tmp_path / "real.npz", mu=mu[:3], sigma=sigma[:3, :3])
    with pytest.raises(ValueError, match="reference: expected statistics of 64 features, got 3"):
        run_benchmark(
            FID(items, tmp_path / "real.npz", tmp_path, weights=inception, features="64"),
            *(tmp_path / "images", tmp_path / "out"),
        )
    np.savez(tmp_path / "real.npz", mean=mu)
    (tmp_path / "damaged.npz").write_bytes((tmp_path / "real.npz").read_bytes()[:50])
    with pytest.raises(ValueError, match=r'data: expected "mu" and "sigma" in .*damaged\.npz'):
        FID(items, tmp_path / "damaged.npz", tmp_path, weights=inception, features="64")
    with pytest.raises(ValueError, match=r'data: expected "mu" and "sigma" in .*real\.npz'):
        FID(items, tmp_path / "real.npz", tmp_path, weights=inception, features="64")
