"""The wheel outside the checkout, and what imports what."""

import json
import os
import subprocess
import sys

from tests.conftest import ROOT


def test_wheel_works_outside_the_checkout(tmp_path):
    """Built, unpacked elsewhere, and run on the embedded model from there."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path / "wheels"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=200)
    wheel, = (tmp_path / "wheels").glob("*.whl")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True, capture_output=True)
    script = tmp_path / "site" / "bin" / "sparse-expansion"
    finished = subprocess.run(
        [sys.executable, str(script), "run", "--model", "demo", "--dataset", "self", "--dataset-size", "2", "--eval-size", "1", "--seq-len", "16",
         "--num-clusters", "1", "--output-dir", str(tmp_path / "run"), "--json"],
        capture_output=True, text=True, timeout=200, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    assert result["perplexity"] > 1
    where = "import pipeline, actors, cli; print(pipeline.__file__, actors.__file__, cli.__file__)"
    imported = subprocess.run([sys.executable, "-c", where], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})
    assert all(file.startswith(str(tmp_path / "site")) for file in imported.stdout.split())


def test_pipeline_never_imports_ray():
    script = ("import pathlib, importlib, sys\n"
              f"for file in sorted(pathlib.Path({str(ROOT / 'pipeline')!r}).rglob('*.py')):\n"
              f"    importlib.import_module('.'.join(file.relative_to({str(ROOT)!r}).with_suffix('').parts).removesuffix('.__init__'))\n"
              "print([name for name in sys.modules if name == 'ray' or name.startswith('ray.')])")
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert finished.stdout.strip() == "[]", finished.stderr


def test_a_mistyped_option_loads_nothing_heavy():
    script = "import sys, cli\nfrom pipeline.config import make_job\nmake_job({'model': 'demo'})\nprint([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert finished.stdout.strip() == "[]", finished.stderr
