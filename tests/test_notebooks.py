"""The notebooks of `examples/` run to their end, and show what their text says."""

import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode


ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
NAMES = ["train_your_first_sae", "splice_and_steer"]

# What the checks below look at, printed by a last cell.
VALUES = {
    "train_your_first_sae": """{
        "fvus": fvus, "eval_fvu": metrics["eval/fvu/layers.10"], "best": agreements[ranked[0]],
        "mismatched": mean_mismatched,
        "fvu_per_token": fvu_per_token.tolist(), "num_tokens": sentence_ids.shape[1],
    }""",
    "splice_and_steer": """{
        "clean": clean.mean().item(), "spliced": spliced.mean().item(), "mean": mean_only.mean().item(),
        "ablated": changes[important].mean().item(), "rise": rises[best], "median": rises[ranked[len(ranked) // 2]],
        "shares": list(shares.values()), "texts": [texts.tolist() for texts in samples.values()],
    }""",
}


@pytest.fixture(scope="module")
def working_folder(real_lm, tmp_path_factory):
    """What `make quickstart` makes, and the notebooks, in a folder of their own."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "quickstart").mkdir()
    (folder / "quickstart" / "SmolLM2-135M-Instruct").symlink_to(real_lm)
    spec = importlib.util.spec_from_file_location("prepare_quickstart", EXAMPLES / "prepare_quickstart.py")
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    prepare.make_text(folder / "quickstart" / "text" / "train.jsonl")
    (folder / "examples").mkdir()
    return folder


@pytest.fixture(scope="module")
def kernel_places(working_folder):
    """A kernel imports this checkout, and leaves nothing in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        for name in (
            "IPYTHONDIR",
            "JUPYTER_CONFIG_DIR",
            "JUPYTER_DATA_DIR",
            "JUPYTER_RUNTIME_DIR",
            "HF_DATASETS_CACHE",
        ):
            (working_folder / "kernel" / name).mkdir(parents=True)
            patch.setenv(name, str(working_folder / "kernel" / name))
        yield


def executed(name: str, folder: Path) -> tuple[NotebookNode, dict]:
    """A notebook with the outputs of its run in a folder, and the values of `VALUES`."""
    notebook = read(name)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json; print(json.dumps({VALUES[name]}))"))
    # No time limit for a cell: pytest has one for the whole.
    NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook, json.loads(notebook.cells.pop().outputs[0].text)


# Half a minute on two free cores; a busy machine may take far longer.
@pytest.mark.timeout(3600)
def test_the_first_sae_trains_and_can_be_read(working_folder, kernel_places):
    notebook, values = executed("train_your_first_sae", working_folder)
    check_outputs(notebook)
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) == 3
    assert values["fvus"][-1] < 0.75 * values["fvus"][0] and values["eval_fvu"] < 0.75 * values["fvus"][0]
    assert values["best"] > 0.4 and values["best"] > 10 * values["mismatched"]
    assert len(values["fvu_per_token"]) == values["num_tokens"] and min(values["fvu_per_token"]) > 0
    assert (working_folder / "runs" / "first_sae" / "layers.10" / "config.json").exists()


@pytest.mark.timeout(3600)
def test_an_sae_is_spliced_ablated_and_steered_with(working_folder, kernel_places):
    # From examples/, where an editor starts a notebook.
    notebook, values = executed("splice_and_steer", working_folder / "examples")
    check_outputs(notebook)
    assert values["clean"] < values["spliced"] < values["mean"]
    assert values["ablated"] > 0
    assert values["rise"] > 0.1 and values["rise"] > 10 * values["median"]
    clean, *_, steered, random = values["shares"]
    assert steered > 0.1 + clean and steered > 0.1 + random
    assert all(text not in values["texts"][0] for text in values["texts"][-2])
    assert not (working_folder / "examples" / "runs").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_with_outputs_of_a_whole_run(name):
    notebook = read(name)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    check_outputs(notebook)
    assert "widgets" not in notebook.metadata
    text = (EXAMPLES / f"{name}.ipynb").read_text()
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|Users)/", text)
    assert len(text) < 200_000
    assert "make quickstart" in notebook.cells[0].source


def read(name: str) -> NotebookNode:
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def check_outputs(notebook: NotebookNode) -> None:
    """No cell failed or warned."""
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    errors = [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    # A run tells its progress on stderr.
    lines = [line for text in errors for line in text.splitlines()]
    assert not [line for line in lines if not re.match(r"step \d+/|sae_accel: ", line)]
