"""What importing the package costs and needs, each in a fresh interpreter."""

import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_air_loads_nothing_heavy():
    code = "import air, sys; print([name for name in ('torch', 'numba', 'ray', 'numpy') if name in sys.modules])"
    assert run(code).strip() == "[]"


def test_importing_the_renderer_does_not_load_numba():
    assert run("import air.rendering.render, sys; print('numba' in sys.modules)").strip() == "False"


def test_rendering_and_fitting_need_no_ray_and_no_arrow():
    code = """
import sys
for name in ("ray", "pyarrow", "webdataset", "duckdb", "obstore", "pydantic"):
    sys.modules[name] = None  # importing it raises ImportError
import air
import torch
result = air.fit(torch.full((3, 8, 8), 0.5), steps=1)
print(tuple(air.render(result.gaussians, 8, 8).shape))
"""
    assert run(code).strip() == "(3, 8, 8)"
