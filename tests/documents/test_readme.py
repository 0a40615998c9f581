"""README's code does what its text says, in a small world."""

import re

import torch
from small_world import smaller
from written import ROOT, blocks

from sae_accel.loading.auto import AutoSae


README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAIN, LOAD = (block.text for block in blocks(README) if block.language == "python")


def test_the_snippet_that_trains_leaves_every_other_layer(small_world):
    exec(smaller(TRAIN), {})
    assert list(AutoSae.from_pretrained("runs/smollm2")) == [f"layers.{i}" for i in range(0, 12, 2)]


def test_the_snippet_that_loads_reads_the_layer_that_it_names(small_world):
    names: dict = {}
    exec(LOAD, names)
    given = {}
    names["lm"].model.layers[10].register_forward_hook(lambda _, args, output: given.update(output=output))
    with torch.inference_mode():
        clean = names["lm"](**names["inputs"], labels=names["inputs"]["input_ids"]).loss
    expected = names["saes"]["layers.10"].encode(given["output"])
    assert torch.equal(names["top_indices"], expected.top_indices)
    assert torch.equal(names["top_acts"], expected.top_acts)
    assert names["loss"] != clean


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 130


def test_every_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`make ([\w-]+)", README))
    assert {"quickstart", "docs"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
