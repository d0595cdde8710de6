"""The notebook, run as a user runs it."""

import re

import nbclient
import nbformat
import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow


def test_quickstart_runs_from_search_to_tflite(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stdout"
    )
    # Of the Keras model, then of the int8 file.
    trained, converted = map(float, re.findall(r"test accuracy ([\d.]+)%", printed)[-2:])
    assert trained > 90
    assert converted > trained - 2
    assert "float operators: {}" in printed
    assert list(tmp_path.iterdir()) == []  # it removes what it wrote
