import ast
import subprocess
import sys
from pathlib import Path


PACKAGE = Path(__file__).parent.parent / "sae_accel"
# Each line may import from itself and those below it.
LAYERS = [
    {"train", "push", "convert"},
    {"memory"},
    {"rehearsal"},
    {"report", "trainer"},
    {"saving", "end_to_end"},
    {"local", "pretrained", "spliced_lm"},
    {"spread", "batches"},
    {"output_folder"},
    {"optim", "checkpoint", "publishing", "callbacks", "running_means", "interruption", "trackers"},
    {"bank", "logit_loss"},
    {"activations", "command_line", "lm"},
    {"adapters", "sharding"},
    {"hookpoints"},
    {"splicing", "probe", "recipe", "data"},
    {"hooks", "checks"},
    {"token_file"},
    {"models", "formats", "model_card", "hub", "release_files", "run_folder"},
    {"ops", "metrics", "text_sources"},
    {"processes"},
    {"arguments", "errors", "bitsandbytes_backend", "tables", "rows", "peak_memory", "globs", "plots"},
]


def _imports(path):
    """Modules of the package that a file imports, by the first part of their name."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            inside = path.relative_to(PACKAGE).parts[0] if node.level < depth else None
            yield from (
                [inside] if inside else [node.module.split(".")[0]] if node.module else [a.name for a in node.names]
            )


def test_imports_point_down_the_layers():
    height = {name: -i for i, names in enumerate(LAYERS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if here != "__init__":
            for other in _imports(path):
                assert height[other] <= height[here], f"{path.name} imports {other}, which lies above it"


def test_models_know_neither_accelerate_nor_an_lm():
    for path in [*PACKAGE.glob("models/*.py"), *PACKAGE.glob("ops/*.py"), PACKAGE / "metrics.py"]:
        assert "accelerate" not in path.read_text()


def test_no_module_is_longer_than_five_hundred_lines():
    assert all(len(path.read_text().splitlines()) <= 500 for path in PACKAGE.rglob("*.py"))


def test_importing_the_package_prints_nothing_and_offers_what_it_says():
    code = "import sae_accel; [getattr(sae_accel, name) for name in sae_accel.__all__]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
