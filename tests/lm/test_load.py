import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from tiny import VOCAB, command_words, forbid_loading, tiny_llama
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

import sae_accel.train as train
from sae_accel.common.errors import InputError
from sae_accel.lm.load import load_architecture, load_lm
from sae_accel.lm.splice import splice
from sae_accel.loading.auto import AutoSae
from sae_accel.recipe.arguments import ModelArguments
from sae_accel.recipe.command_line import parse_command_line
from sae_accel.training.run import run


@pytest.fixture
def nothing_loads(monkeypatch):
    forbid_loading(monkeypatch)


@pytest.mark.parametrize(("quantization", "kind"), [("8bit", Linear8bitLt), ("4bit", Linear4bit)])
@pytest.mark.parametrize("loss", ["fvu", "kl"])
def test_heads_train_on_an_lm_in_8_or_4_bits(place, tmp_path, capfd, caplog, quantization, kind, loss):
    words = command_words(place, tmp_path, **{"model.quantization": quantization, "training.loss": loss})
    assert train.main(words) == 0
    lm = load_lm(ModelArguments(name_or_path=str(place / "lm"), quantization=quantization), with_lm_head=True)
    assert isinstance(lm.model.layers[1].mlp.down_proj, kind)
    head = AutoSae.from_pretrained(tmp_path / "run", hookpoint="layers.1")
    ids = torch.arange(32)[None]
    with torch.no_grad(), splice(lm, head, replace=False):
        assert lm(ids).logits.shape == (1, 32, VOCAB)
    shown = "".join(capfd.readouterr())
    assert "will be cast" not in shown + caplog.text and "arning" not in shown


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_an_lm_in_4_bits_computes_in_the_precision_of_its_other_weights(tmp_path, dtype, expected):
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path)
    lm = load_lm(ModelArguments(name_or_path=str(tmp_path), quantization="4bit", dtype=dtype))
    layer = lm.layers[0].mlp.up_proj
    assert layer.compute_dtype == expected and lm.norm.weight.dtype == expected
    assert lm(torch.arange(8)[None]).last_hidden_state.dtype == expected


def test_an_8_bit_lm_is_close_to_the_one_it_was_made_from(real_lm):
    text = AutoTokenizer.from_pretrained(real_lm)("The quick brown fox jumps over the lazy dog.", return_tensors="pt")
    plain = AutoModelForCausalLM.from_pretrained(real_lm)
    with torch.no_grad():
        expected = plain(**text).logits.log_softmax(-1)
        for quantization, limit in (("8bit", 0.2), ("4bit", 2.0)):
            lm = load_lm(ModelArguments(name_or_path=real_lm, quantization=quantization), with_lm_head=True)
            found = lm(**text).logits.log_softmax(-1)
            kl = (expected.exp() * (expected - found)).sum(-1).mean()
            assert 0 < kl < limit, quantization
            assert lm.get_memory_footprint() < 0.7 * plain.get_memory_footprint()


def test_adam8bit_is_the_optimizer_of_bitsandbytes(place, tmp_path):
    trainer = run(parse_command_line(command_words(place, tmp_path, **{"training.optim": "adam8bit"})))
    assert isinstance(trainer.optimizer.optimizer, bitsandbytes.optim.Adam8bit)


@pytest.mark.parametrize(
    "changes", [{"model.quantization": "8bit"}, {"model.quantization": "4bit"}, {"training.optim": "adam8bit"}]
)
def test_without_a_backend_for_bitsandbytes_nothing_is_loaded(
    place, tmp_path, capsys, monkeypatch, nothing_loads, changes
):
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    assert train.main(command_words(place, tmp_path, **changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    ((field, value),) = changes.items()
    assert len(error) == 1 and error[0].startswith(f"sae_accel: {field}: {value} needs bitsandbytes with a backend")


@pytest.mark.parametrize("loss", ["fvu", "ce"])
def test_an_lm_that_lies_in_part_on_disk_gives_the_same_heads(place, tmp_path, loss):
    """Modules that are on disk are read in as they run, as those of another device are reached."""
    prefix = "" if loss == "fvu" else "model."
    placed = {f"{prefix}{name}": "cpu" for name in ("embed_tokens", "layers.0", "layers.3", "norm", "rotary_emb")}
    placed |= {f"{prefix}layers.1": "disk", f"{prefix}layers.2": "disk"} | (
        {} if loss == "fvu" else {"lm_head": "cpu"}
    )
    words = {"training.loss": loss, "training.optim": "adam"}
    plain = run(parse_command_line(command_words(place, tmp_path / "plain", **words)))
    recipe = parse_command_line(command_words(place, tmp_path / "placed", **words))
    recipe.model.device_map, recipe.model.max_memory = placed, {"cpu": "8GiB"}
    spread = run(recipe)
    assert spread.activations.base_model.get_submodule("layers.1.mlp.up_proj").weight.device.type == "meta"
    for name, head in plain.heads.items():
        for first, second in zip(head.parameters(), spread.heads[name].parameters(), strict=True):
            assert torch.equal(first, second)


def test_an_lm_all_of_which_lies_on_disk_is_read_from(place, tmp_path):
    words = {"model.device_map": "auto", "model.max_memory": "{cpu: 1KiB}", "training.loss": "ce"}
    assert train.main(command_words(place, tmp_path, **words)) == 0


def test_device_map_and_max_memory_reach_transformers(place, monkeypatch):
    def stop(name, **kwargs):
        raise OSError(f"{kwargs['device_map']} {kwargs['max_memory']}")

    monkeypatch.setattr(AutoModel, "from_pretrained", stop)
    arguments = ModelArguments(
        name_or_path=str(place / "lm"), device_map="auto", max_memory={"cpu": "8GiB", "0": "1GiB"}
    )
    with pytest.raises(InputError, match="auto {'cpu': '8GiB', 0: '1GiB'}"):
        load_lm(arguments)


def test_an_end_to_end_loss_needs_files_with_an_lm_head(place, tmp_path, capsys, nothing_loads):
    bert = BertModel(BertConfig(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=1, num_attention_heads=4))
    bert.save_pretrained(tmp_path / "bert")
    tiny_llama().base_model.save_pretrained(tmp_path / "headless")
    for name, reason in (
        ("bert", "a bert model predicts masked tokens"),
        ("headless", "those of a LlamaModel, which has no LM head"),
    ):
        words = command_words(place, tmp_path, **{"model.name_or_path": tmp_path / name, "training.loss": "ce"})
        assert train.main(words) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and reason in error[0], error


def test_weights_of_the_head_that_are_not_in_the_files_are_an_error(tmp_path):
    tiny_llama().base_model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"LlamaModel"', '"LlamaForCausalLM"')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match="lack 'lm_head.weight'"):
        load_lm(ModelArguments(name_or_path=str(tmp_path)), with_lm_head=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.max_memory": "{cpu: 8GiB, 0: 1GiB}"}, "model.max_memory: it needs model.device_map"),
        ({"model.device_map": "somewhere"}, "model.device_map is 'somewhere', but there is no such device"),
        ({"model.device_map": "meta"}, "model.device_map is 'meta'"),
        ({"model.quantization": "3bit"}, "expected one of 8bit, 4bit"),
        ({"training.fvu_weight": 1}, "training.fvu_weight"),
        ({"training.save_best": "true"}, "training.save_best: it needs evaluations"),
    ],
)
def test_bad_input_ends_with_status_2(place, tmp_path, capsys, changes, message):
    assert train.main(command_words(place, tmp_path, **changes)) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_an_architecture_has_no_values(place):
    lm = load_architecture(ModelArguments(name_or_path=str(place / "lm")), with_lm_head=True)
    assert {parameter.device.type for parameter in lm.parameters()} == {"meta"}
    assert lm.get_output_embeddings() is not None
