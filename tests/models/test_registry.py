"""A kind of head from outside the package: one configuration, one model, and a line that registers them."""

import json

import pytest
import torch
from huggingface_hub.dataclasses import strict
from tiny import VOCAB, assert_equal, command_words, tiny_llama, tiny_tokens, tiny_trainer, weights, whole_and_resumed
from transformers import initialization as init

from sae_accel import AutoSae, HeadArguments, InputError, splice
from sae_accel.hub.release import Release
from sae_accel.loading.convert import convert
from sae_accel.models import HeadConfig, HeadModel, register, registry
from sae_accel.recipe.arguments import KINDS
from sae_accel.recipe.recipe import Recipe
from sae_accel.train import main


@strict
class ScaledConfig(HeadConfig):
    """Predicts a module's output from its input, each dimension on a scale of its own."""

    model_type = "elsewhere_scaled"
    kind = "scaled"
    reads_input = True
    tag = "scaled-transcoder"
    paper = ("Scaled transcoders", "Somebody et al. 2026", "2600.00001")
    normalize_decoder: bool = False
    apply_b_dec_to_input: bool = False
    d_out: int = 0


class ScaledModel(HeadModel):
    config: ScaledConfig

    def __init__(self, config: ScaledConfig):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.empty(config.d_out))
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ScaledModel):
            init.constant_(module.scale, 2.0)

    def _decode(self, acts, selection, tokens):
        return super()._decode(acts, selection, tokens) * self.scale


@strict
class PairConfig(HeadConfig):
    """Reads a module's input and output together, and rebuilds both."""

    model_type = "elsewhere_pair"
    kind = "pair"
    tag = "pair"
    d_out: int = 0

    @classmethod
    def reads_at(cls, hookpoint, source=None):
        return ((hookpoint, "input"), (hookpoint, "output"))

    @classmethod
    def predicts_at(cls, hookpoint):
        return cls.reads_at(hookpoint)


class PairModel(HeadModel):
    config: PairConfig

    def __init__(self, config: PairConfig):
        super().__init__(config)
        self.post_init()


@pytest.fixture
def kinds(monkeypatch):
    """Two kinds of heads that the package does not know."""
    monkeypatch.setattr(registry, "_BY_MODEL_TYPE", dict(registry._BY_MODEL_TYPE))
    register(ScaledConfig, ScaledModel)
    register(PairConfig, PairModel)
    yield
    del KINDS["scaled"], KINDS["pair"]


ENTRY = dict(hookpoints="layers.1.mlp", type="scaled", k=4, expansion_factor=4)


def test_the_kinds_of_recipes_are_those_that_are_registered():
    assert {config.kind for config, _ in registry._BY_MODEL_TYPE.values()} == set(KINDS) == {"sae", "transcoder"}


def test_a_kind_from_elsewhere_trains_saves_and_loads_by_a_recipe(kinds, place, tmp_path, capsys):
    words = {"heads.type": "scaled", "heads.hookpoints": "layers.1.mlp", "training.optim": "adam"}
    assert main(command_words(place, tmp_path, **words, **{"training.learning_rate": 0.01})) == 0
    assert "layers.1.mlp scaled 24 -> 96 -> 24" in " ".join(capsys.readouterr().out.split())
    head = AutoSae.from_pretrained(tmp_path / "run")
    assert isinstance(head, ScaledModel) and head.config.hookpoint == "layers.1.mlp"
    assert (head.scale != 2).all()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "A scaled on the activations" in card and "scaled-transcoder" in card and "2600.00001" in card
    assert "the input of module layers.1.mlp" in card
    assert "layers.1.mlp/model.safetensors" in Release(tmp_path / "run", "user/name").files


def test_a_kind_from_elsewhere_resumes_bit_for_bit(kinds, tmp_path):
    options = dict(heads=[HeadArguments(**ENTRY)], max_steps=6, save_steps=2)
    whole, resumed = whole_and_resumed(tmp_path, lambda folder, **more: tiny_trainer(folder, **options, **more))
    assert_equal(weights(whole), weights(resumed))
    assert any(name.endswith("scale") for name in weights(whole))


def test_a_kind_from_elsewhere_is_spliced_where_it_says_that_it_reads(kinds, tmp_path):
    lm = tiny_llama().eval()
    trainer = tiny_trainer(tmp_path, [HeadArguments(**ENTRY)], lm=lm, max_steps=2)
    trainer.train()
    head = AutoSae.from_pretrained(tmp_path)
    ids = torch.randint(0, VOCAB, (2, 9))
    with torch.no_grad():
        with splice(lm, head):
            found = lm(ids).logits
        mlp = lm.model.layers[1].mlp
        handle = mlp.register_forward_hook(lambda _, args, output: head(args[0], output).reconstruction)
        expected = lm(ids).logits
        handle.remove()
    torch.testing.assert_close(found, expected)


def test_what_a_head_reads_at_several_sites_is_joined(kinds, tmp_path):
    lm, data = tiny_llama().eval(), tiny_tokens(8)
    entry = HeadArguments(**ENTRY | {"type": "pair"})
    trainer = tiny_trainer(tmp_path, [entry], lm=lm, train=data, held_out=data, max_steps=2, loss="fvu")
    metrics = trainer.train().metrics
    seen = []
    handle = lm.model.layers[1].mlp.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        lm(torch.tensor(data["input_ids"]))
        handle.remove()
        both = torch.cat(seen[0], -1).flatten(0, 1)
        head = AutoSae.from_pretrained(tmp_path)
        error = (head(both).reconstruction - both).pow(2).sum()
    assert (head.config.d_in, head.config.d_out) == (48, 48)
    assert metrics["eval/fvu/layers.1.mlp"] == pytest.approx((error / (both - both.mean(0)).pow(2).sum()).item())
    with pytest.raises(InputError, match="A pair at 'layers.1.mlp' cannot be spliced in"), splice(lm, head):
        pass
    with pytest.raises(InputError, match="does not read one activation to replace the output"):
        tiny_trainer(tmp_path / "ce", [entry], lm=lm, loss="ce")


def test_a_kind_that_another_library_does_not_have_is_not_written_for_it(kinds, tmp_path):
    tiny_trainer(tmp_path / "run", [HeadArguments(**ENTRY)], max_steps=1).train()
    for layout in ("sparsify", "saelens"):
        with pytest.raises(InputError, match="scaled, which"):
            convert(str(tmp_path / "run"), tmp_path / layout, layout)
    convert(str(tmp_path / "run"), tmp_path / "ours", "sae_accel")
    assert json.loads((tmp_path / "ours" / "layers.1.mlp" / "config.json").read_text())["model_type"] == (
        "elsewhere_scaled"
    )


def test_a_kind_that_is_not_registered_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="expected one of sae, transcoder, found 'scaled'"):
        Recipe.from_dict({"heads": [{"type": "scaled"}]})
    with pytest.raises(InputError, match="heads.type: found 'saee'. Did you mean sae"):
        tiny_trainer(tmp_path, [HeadArguments(type="saee")])
