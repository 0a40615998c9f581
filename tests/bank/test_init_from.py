import json

import pytest
import torch
from sparsify import SaeConfig as PeerConfig
from sparsify import SparseCoder
from tiny import (
    assert_equal,
    command_words,
    forbid_loading,
    tiny_llama,
    tiny_tokens,
    tiny_trainer,
    weights,
    whole_and_resumed,
)

import sae_accel.train as train
from sae_accel.bank.init_from import open_pretrained
from sae_accel.common.errors import InputError
from sae_accel.data.batches import Batches
from sae_accel.loading.auto import AutoSae
from sae_accel.models import SaeConfig, SaeModel, TranscoderConfig, TranscoderModel
from sae_accel.recipe.arguments import HeadArguments
from sae_accel.training.begin import begin


HEADS = [
    HeadArguments(hookpoints="layers.[12]", k=4, expansion_factor=4, auxk_alpha=0.1, dead_after_tokens=50),
    # The MLPs of a random LM give thousandths, so that larger steps would overshoot.
    HeadArguments(
        hookpoints="layers.1.mlp",
        type="transcoder",
        skip_connection=True,
        k=4,
        expansion_factor=4,
        learning_rate=1e-5,
    ),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    tiny_trainer(folder, HEADS, max_steps=20, optim="adam", learning_rate=1e-2).train()
    return folder


def _start(trainer):
    """The weights that a run starts from."""
    batches = Batches(trainer.train_dataset, trainer.args, trainer.accelerator, pad_token_id=0)
    begin(trainer.run_state, trainer.assembly, trainer.folder, batches, None)
    return trainer


def test_heads_start_from_those_of_the_same_name_with_counters_at_zero(tmp_path, trained):
    saved = AutoSae.from_pretrained(trained)
    trainer = _start(tiny_trainer(tmp_path, HEADS, max_steps=2, init_from=str(trained)))
    for name, head in trainer.heads.items():
        assert all(torch.equal(value, saved[name].state_dict()[key]) for key, value in head.state_dict().items())
    assert all((count == 0).all() for count in trainer.tokens_since_fired.values())
    assert trainer.state.global_step == 0


def test_training_goes_on_from_where_it_was(tmp_path, trained):
    first = json.loads((trained / "metrics.json").read_text())["train/tokens"]
    start = tiny_trainer(tmp_path / "a", HEADS, max_steps=1, init_from=str(trained), learning_rate=1e-6).train()
    fresh = tiny_trainer(tmp_path / "b", HEADS, max_steps=1, learning_rate=1e-6).train()
    assert first > 0 and start.training_loss < 0.8 * fresh.training_loss


def test_a_checkpoint_and_a_part_of_the_heads_can_be_started_from(tmp_path, trained):
    entry = HeadArguments(hookpoints="layers.2", k=2, expansion_factor=4)
    trainer = _start(tiny_trainer(tmp_path, [entry], max_steps=2, init_from=str(trained / "checkpoint-20")))
    head = trainer.heads["layers.2"]
    saved = AutoSae.from_pretrained(trained, hookpoint="layers.2")
    assert torch.equal(head.W_dec, saved.W_dec) and head.config.k == 2


def test_a_resumed_run_does_not_start_over_from_the_pretrained_heads(tmp_path, trained):
    options = dict(heads=HEADS, max_steps=6, save_steps=2, init_from=str(trained))
    whole, resumed = whole_and_resumed(tmp_path, lambda folder, **more: tiny_trainer(folder, **options, **more))
    assert_equal(weights(whole), weights(resumed))


def _save_peer(folder, hookpoint, norms=None, **options):
    torch.manual_seed(3)
    peer = SparseCoder(24, PeerConfig(expansion_factor=4, k=4, **options))
    if norms is not None:
        peer.W_dec.data.mul_(norms[:, None])
    torch.nn.init.normal_(peer.encoder.bias, std=0.1)
    peer.save_to_disk(folder / hookpoint)
    return peer


def test_heads_of_sparsify_are_started_from(tmp_path):
    peers = {name: _save_peer(tmp_path / "peer", name) for name in ("layers.1", "layers.2")}
    trainer = _start(tiny_trainer(tmp_path / "run", HEADS[:1], max_steps=1, init_from=str(tmp_path / "peer")))
    x = torch.randn(10, 24)
    for name, peer in peers.items():
        torch.testing.assert_close(trainer.heads[name](x).reconstruction, peer(x).sae_out)


def test_rows_that_were_not_kept_at_unit_norm_give_their_norm_to_the_encoder(tmp_path):
    norms = torch.rand(96, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.8
    peer = _save_peer(tmp_path / "peer", "layers.1", norms)
    entry = HeadArguments(hookpoints="layers.1", k=4, expansion_factor=4)
    head = _start(tiny_trainer(tmp_path / "run", [entry], max_steps=1, init_from=str(tmp_path / "peer"))).heads[
        "layers.1"
    ]
    torch.testing.assert_close(head.W_dec.norm(dim=-1), torch.ones(96))
    # With every latent selected the two are one function.
    x = torch.randn(10, 24)
    head.config.k = peer.cfg.k = 96
    torch.testing.assert_close(head(x).reconstruction, peer(x).sae_out)


def test_a_head_alone_in_its_folder_starts_the_one_head_of_a_run(tmp_path):
    SaeModel(SaeConfig(d_in=24, num_latents=96, k=4)).save_pretrained(tmp_path / "one")
    entry = HeadArguments(hookpoints="layers.1", k=4, expansion_factor=4)
    head = _start(tiny_trainer(tmp_path / "run", [entry], max_steps=1, init_from=str(tmp_path / "one"))).heads[
        "layers.1"
    ]
    assert torch.equal(head.W_dec, AutoSae.from_pretrained(tmp_path / "one").W_dec)


def test_what_matched_is_shown_before_the_lm_is_loaded(place, tmp_path, trained, capsys, monkeypatch):
    def load(*args, **kwargs):
        raise SystemExit("stopped")

    monkeypatch.setattr("sae_accel.training.run.load_lm", load)
    words = {"training.init_from": trained, "heads.hookpoints": "layers.2", "heads.k": 3}
    with pytest.raises(SystemExit, match="stopped"):
        train.main(command_words(place, tmp_path, **words))
    _, *lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Heads start from {trained}:"
    assert lines[2].split() == ["layers.2", "layers.2", "sae", "24", "->", "96", "->", "24", "4", "->", "3", "-"]
    assert lines[-1] == "Not used: layers.1, layers.1.mlp."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"heads.hookpoints": "layers.0"},
            "has no head for 'layers.0'. It holds 'layers.1', 'layers.1.mlp', 'layers.2'",
        ),
        ({"heads.expansion_factor": 8}, "has num_latents 96, but the recipe's 'layers.1' has 192"),
        ({"heads.type": "transcoder"}, "is of type sae, but the recipe's 'layers.1' is of type transcoder"),
        ({"heads.activation": "groupmax"}, "has activation topk, but the recipe's 'layers.1' has groupmax"),
        (
            {"heads.hookpoints": "layers.1.mlp", "heads.type": "transcoder"},
            "has skip_connection True, but the recipe's 'layers.1.mlp' has False",
        ),
        ({"training.overwrite_output_dir": "true", "training.output_dir": "{1}"}, "which overwrite_output_dir would"),
        ({"training.init_from": "nowhere/at-all"}, "training.init_from: "),
        ({"training.init_from": "{}/lm"}, "training.init_from: "),
    ],
)
def test_heads_that_do_not_match_are_refused_before_the_lm_is_loaded(
    place, tmp_path, trained, capsys, monkeypatch, changes, message
):
    forbid_loading(monkeypatch)
    changes = {"training.init_from": trained} | {
        key: str(value).format(place, trained) for key, value in changes.items()
    }
    assert train.main(command_words(place, tmp_path, **changes)) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "training.init_from" in error and message in error


def test_a_head_without_a_decoder_is_refused(tmp_path):
    TranscoderModel(TranscoderConfig(d_in=24, num_latents=96, k=4, encoder_only=True)).save_pretrained(
        tmp_path / "heads" / "layers.1"
    )
    entry = HeadArguments(hookpoints="layers.1", type="transcoder", k=4, expansion_factor=4)
    with pytest.raises(InputError, match="holds no decoder, so it cannot train"):
        tiny_trainer(tmp_path / "run", [entry], max_steps=1, init_from=str(tmp_path / "heads")).train()


def test_each_best_head_is_the_one_with_the_lowest_fvu_of_its_own(tmp_path):
    held_out = tiny_tokens(16, seed=9)
    # Steps that are too large, so that the last evaluation is not the best.
    options = dict(optim="adam", learning_rate=0.1, lr_scheduler_type="constant", warmup_steps=0)
    trainer = tiny_trainer(tmp_path, HEADS, held_out=held_out, max_steps=17, eval_steps=1, save_best=True, **options)
    seen = []
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args: seen.append(evaluate(*args)) or seen[-1]
    trainer.train()
    lowest = {name: min(metrics[f"eval/fvu/{name}"] for metrics in seen) for name in trainer.heads}
    assert trainer.run_state.best == lowest
    assert any(lowest[name] < seen[-1][f"eval/fvu/{name}"] for name in lowest)
    best = AutoSae.from_pretrained(tmp_path / "best")
    again = _start(tiny_trainer(tmp_path / "again", HEADS, lm=tiny_llama(), held_out=held_out, max_steps=1))
    for name, head in again.heads.items():
        head.load_state_dict(best[name].state_dict())
    measured = again.evaluate()
    assert {name: measured[f"eval/fvu/{name}"] for name in lowest} == pytest.approx(lowest, rel=1e-5)


def test_a_folder_is_opened_as_a_mapping_even_with_one_head(trained, tmp_path):
    SaeModel(SaeConfig(d_in=24, num_latents=96, k=4)).save_pretrained(tmp_path)
    assert list(open_pretrained(str(tmp_path))) == [""]
    heads = AutoSae.open(trained)
    assert heads.config("layers.1.mlp").skip_connection and "(loaded)" not in repr(heads)
