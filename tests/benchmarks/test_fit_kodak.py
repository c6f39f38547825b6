"""`benchmarks/fit_kodak.py`: a line for each kind of fit and number of steps, and a point of the plot for each."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import air
from tests.support.paths import ROOT


def test_a_line_for_each_kind_of_fit_and_steps(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from fit_kodak import main

    plot = tmp_path / "curves.svg"
    options = ["--gaussians", "100", "200", "--patch-size", "8", "--rules", "adam", "--steps", "0", "3"]
    monkeypatch.setattr(sys, "argv", ["fit_kodak.py", str(photographs), *options, "--plot", str(plot)])
    main()
    count, _, _, *lines = capsys.readouterr().out.splitlines()
    assert count == "2 images, 1 thread(s)"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    kinds = ["grid, patch 8", "growing to 100, adam", "growing to 200, adam"]
    assert [(line[0], line[2]) for line in cells] == [(kind, steps) for steps in ("0", "3") for kind in kinds]
    images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(photographs.glob("*.png"))]
    reached = [air.fit(image, 3, num_gaussians=200, rule="adam").trajectory for image in images]
    psnr, loss = ([float(getattr(each, name)[-1]) for each in reached] for name in ("psnr", "loss"))
    assert cells[-1][3:5] == [f"{np.mean(psnr):.2f}", f"{min(psnr):.2f}"]
    assert float(cells[-1][6]) == pytest.approx(np.mean(loss), abs=2e-5)
    circles = list(ElementTree.parse(plot).getroot().iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == len(cells)
