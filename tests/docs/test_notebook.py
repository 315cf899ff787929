"""The notebook runs from its first cell to its last; it is kept without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from runs import write_images

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"
SMALL = [
    "optimizer.batch_size=16",
    "data.num_workers=0",
    "accelerator=cpu",
    "method_kwargs.proj_hidden_dim=16",
    "method_kwargs.proj_output_dim=16",
    "method_kwargs.contrastive_hidden_dim=16",
    "+enable_progress_bar=False",
]


def test_it_is_kept_without_outputs() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    (parameters,) = (
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())
    )
    data = write_images(tmp_path / "images", classes=4, train=8, val=4)
    parameters.source = f"EPOCHS = 1\nDATA = {str(data)!r}\nOVERRIDES = {SMALL!r}\n"
    client = NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    printed = "".join(
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )
    assert "checkpoint: trained_models/metamask/" in printed
    assert "effective_dims" in printed and "the right class" in printed
