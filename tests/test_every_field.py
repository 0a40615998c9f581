"""Every field of a recipe does what its help says: runs that differ in the field differ as the help says."""

import math
import shutil
from dataclasses import fields
from pathlib import Path

import field_checks
import pytest
import torch
from field_checks import (
    ADAM,
    ALL_LAYERS,
    CONSTANT,
    COUNTING,
    DATASET,
    EVERY_STEP,
    IN_ORDER,
    JUMPRELU,
    LOGS,
    LORA,
    NULLS,
    ON_DISK,
    PLANNED,
    PUSH,
    TRANSCODER,
    WHOLE_PASS,
    Check,
    Says,
    Shows,
    both,
)
from field_files import write_data, write_lms
from hub_repos import File, read_folder
from hub_server import HubServer
from one_run import Runs
from pytest import approx
from tiny import tiny_llama

from sae_accel.recipe.arguments import SECTIONS


# The Hub's client passes files to httpx in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


SAVED, END = [f"Training in progress, step {step}" for step in (2, 3)], "End of training"

FIELDS: dict[str, Check] = {
    "model.name_or_path": Shows(
        "names",
        {"lm": ["layers.0", "layers.1", "layers.2", "layers.3"], "small": ["layers.0", "layers.1"]},
        ALL_LAYERS,
    ),
    "model.revision": Shows(
        "names", {None: ["layers.1", "layers.2"], "small": ["layers.1"]}, {"model.name_or_path": "user/lm"}
    ),
    "model.token": both(
        Shows("refusal", {None: Says("or it is private"), "hf_secret": None}, {"model.name_or_path": "owner/lm"}),
        field_checks.is_never_saved,
    ),
    "model.dtype": both(
        Shows("lm.dtype", {None: torch.float32, "float16": torch.float16}),
        Shows("lm.dtype", {"auto": torch.bfloat16, "float32": torch.float32}, {"model.name_or_path": "half"}),
    ),
    "model.quantization": Shows(
        lambda run: type(run.lm.layers[1].mlp.up_proj).__name__,
        {None: "Linear", "8bit": "Linear8bitLt", "4bit": "Linear4bit"},
    ),
    "model.adapter": field_checks.changes_activations_and_no_name,
    "model.device_map": Shows(field_checks.place, {None: "cpu", "auto": "cpu", ON_DISK: "meta"}),
    "model.max_memory": both(
        Shows(field_checks.place, {"{cpu: 8GiB}": "cpu", "{cpu: 1KiB}": "meta"}, {"model.device_map": "auto"}),
        Shows("refusal", {"{cpu: 8GiB}": Says("model.max_memory: it needs model.device_map")}),
    ),
    "model.shard": both(
        Shows(lambda run: run.column("LM"), {"false": ["0.38", "0.38"], "true": ["0.31", "0.31"]}, PLANNED),
        Shows("refusal", {"false": None, "true": Says("model.shard: there is one process")}),
    ),
    "model.attn_implementation": Shows("lm.config._attn_implementation", {None: "sdpa", "eager": "eager"}),
    "model.gguf_file": both(
        Shows(
            "refusal",
            {None: Says("Set --model.gguf_file lm.gguf"), "none.gguf": Says("a file named none.gguf")},
            {"model.name_or_path": "gguf"},
        ),
        Shows(
            lambda run: torch.equal(
                run.lm.layers[1].mlp.up_proj.weight, tiny_llama().model.layers[1].mlp.up_proj.weight
            ),
            {"lm.gguf": True},
            {"model.name_or_path": "gguf"} | COUNTING,
        ),
    ),
    "model.trust_remote_code": Shows(
        lambda run: (run.refusal, type(run.lm).__name__, "Louder runs." in run.out),
        {None: (Says("--model.trust_remote_code true"), "NoneType", False), "true": (None, "LouderModel", True)},
        {"model.name_or_path": "louder"},
    ),
    "data.path": Shows(
        "words",
        {"dataset": [10], "dataset/test.jsonl": [30], "dataset/[fs]*.jsonl": [10, 20], "alternating.bin": [5, 6]},
    ),
    "data.name": Shows("words", {None: [10], "one": [10], "two": [20]}, DATASET),
    "data.split": Shows(
        lambda run: (run.words, run.steps),
        {"train": ([20], 5), "test": ([30], 5), "train[:20]": ([20], 2)},
        DATASET | WHOLE_PASS | {"data.name": "two"},
    ),
    "data.load_args": Shows("words", {None: [10], "{data_files: test.jsonl}": [30]}, DATASET),
    "data.streaming": Shows(
        lambda run: (run.words, any(run.kept_data.rglob("*.arrow"))),
        {"false": ([10], True), "true": ([10], False)},
        DATASET,
    ),
    "data.text_column": Shows("words", {None: [10], "body": [11]}, DATASET),
    "data.sample_by": Shows(
        # Each document ends with EOS, and the tokens after the last whole sequence are dropped.
        lambda run: any(bool((batch == 0).any()) for batch in run.batches),
        {None: False, "document": False, "line": True, "paragraph": False},
        {"data.path": "lines.txt"},
    ),
    "data.separator": Shows("words", {None: [10], "w40": [10, 42], 5: [5, 10]}, DATASET),
    "data.bad_rows": Shows("refusal", {None: None, "skip": None, "stop": Says("it is stop, and row 150")}, NULLS),
    "data.max_bad_rows": Shows(
        "refusal", {None: None, 1: None, 0.004: Says("1 of 200 rows"), 0: Says("1 of 200 rows")}, NULLS
    ),
    "data.token_dtype": both(
        Shows(
            "refusal",
            {None: Says("of uint32"), "uint16": Says("of uint32"), "uint32": None},
            {"data.path": "wide.bin"},
        ),
        Shows("words", {None: [5, 6], "uint16": [5, 6]}, {"data.path": "alternating.bin"}),
        Shows("words", {"uint32": [5, 6]}, {"data.path": "wide.bin"}),
    ),
    "data.ctx_len": Shows(lambda run: {batch.shape for batch in run.batches}, {16: {(8, 16)}, 8: {(8, 8)}}),
    "data.max_examples": Shows(lambda run: len(set(run.sequences)), {None: 88, 24: 24}, COUNTING | WHOLE_PASS),
    "data.eval_examples": Shows(
        lambda run: (run.metrics.get("eval/tokens"), min(run.sequences)),
        {8: (128, 8), 4: (64, 4), 0: (None, 0)},
        IN_ORDER,
    ),
    "data.exclude_tokens": Shows(
        lambda run: (run.metrics["train/tokens"], run.metrics["eval/tokens"], set(run.rows)),
        {None: (384, 128, {128}), 5: (192, 64, {64})},
        {"data.path": "alternating.bin"},
    ),
    "data.shuffle_seed": field_checks.orders_sequences,
    "data.num_proc": Shows(lambda run: "(num_proc=2)" in run.err, {None: False, 2: True}),
    "heads.hookpoints": Shows(
        "names",
        {
            "layers.[12]": ["layers.1", "layers.2"],
            "layers.0.mlp": ["layers.0.mlp"],
            None: ["layers.0", "layers.1", "layers.2", "layers.3"],
        },
    ),
    "heads.layers": Shows("names", {0: ["layers.0"], 3: ["layers.3"]}, {"heads.hookpoints": None}),
    "heads.stride": Shows("names", {2: ["layers.0", "layers.2"], 3: ["layers.0", "layers.3"]}, ALL_LAYERS),
    "heads.source": Shows(
        lambda run: [run.config(key, "layers.1.mlp") for key in ("source", "d_in", "d_out")],
        {None: [None, 24, 24], "layers.{0}.mlp.act_fn": ["layers.1.mlp.act_fn", 40, 24]},
        TRANSCODER,
    ),
    "heads.type": Shows(
        lambda run: run.config("model_type"), {"sae": "sae_accel_sae", "transcoder": "sae_accel_transcoder"}
    ),
    "heads.name": Shows("names", {None: ["layers.1", "layers.2"], "wide": ["layers.1/wide", "layers.2/wide"]}),
    "heads.activation": field_checks.selects,
    "heads.k": Shows(
        lambda run: (run.config("k"), run.metrics["eval/l0/layers.1"]), {4: (4, approx(4)), 6: (6, approx(6))}
    ),
    "heads.sparsity_weight": field_checks.weighs(0, JUMPRELU),
    "heads.expansion_factor": Shows(lambda run: run.config("num_latents"), {4: 96, 8: 192}),
    "heads.num_latents": Shows(lambda run: list(run.weights()["W_dec"].shape), {None: [96, 24], 50: [50, 24]}),
    "heads.skip_connection": Shows(
        lambda run: "W_skip" in run.weights("layers.1.mlp") and bool(run.weights("layers.1.mlp")["W_skip"].any()),
        {"false": False, "true": True},
        TRANSCODER,
    ),
    "heads.normalize_decoder": Shows(
        lambda run: torch.allclose(run.weights()["W_dec"].norm(dim=-1), torch.ones(96)),
        {None: True, "true": True, "false": False},
    ),
    "heads.seed": field_checks.draws_initial_weights,
    "heads.learning_rate": Shows("rates", {None: [0.5], 0.25: [0.25]}, {"training.learning_rate": 0.5}),
    "heads.auxk_alpha": both(
        Shows(
            lambda run: len(run.log("train/auxk_loss/layers.1")),
            {0: 0, 0.5: 2},
            EVERY_STEP | {"heads.dead_after_tokens": 1},
        ),
        # No latent is dead in the first step.
        field_checks.weighs(1, {"heads.dead_after_tokens": 1}),
    ),
    "heads.multi_topk": field_checks.joins_the_loss,
    "heads.k_decay_steps": Shows(
        lambda run: (run.log("train/k/layers.1"), run.config("k")),
        {0: ([4, 4, 4], 4), 3: ([96, 65, 35], 4)},
        EVERY_STEP,
    ),
    # The run has 384 tokens, and some latents are active on none of them.
    "heads.dead_after_tokens": Shows(
        lambda run: run.metrics["train/dead/layers.1"] > 0, {None: False, 384: False, 383: True}
    ),
    "lora.rank": Shows(
        lambda run: (run.read("adapter/adapter_config.json")["r"], run.lora["layers.2.mlp.up_proj.lora_A"].shape),
        {None: (16, (16, 24)), 3: (3, (3, 24))},
        LORA,
    ),
    "lora.alpha": Shows(
        lambda run: (
            run.read("adapter/adapter_config.json")["lora_alpha"],
            run.lm.layers[2].mlp.up_proj.scaling["default"],
        ),
        {None: (32, 2), 8: (8, 0.5)},
        LORA,
    ),
    "lora.target_modules": Shows(
        lambda run: (len(run.lora) // 2, {name.rsplit(".", 2)[0] for name in run.lora}),
        {
            None: (14, {f"layers.{i}.{part}" for i in (2, 3) for part in ("mlp", "self_attn")}),
            "layers.0.mlp.*": (3, {"layers.0.mlp"}),
        },
        LORA,
    ),
    "lora.learning_rate": Shows(lambda run: run.log("learning_rate/lora"), {None: [2e-4], 0.5: [0.5]}, LORA),
    "lora.train_heads": both(
        field_checks.freezes_heads, Shows("refusal", {"false": Says("the heads are new")}, {"training.loss": "ce"})
    ),
    "training.output_dir": Shows(
        lambda run: (str(run.folder), run.names), {"some/where": ("some/where", ["layers.1", "layers.2"])}
    ),
    "training.run_name": Shows(
        lambda run: [path.name.replace(run.folder.name, "FOLDER") for path in (run.folder / "logs").iterdir()],
        {None: ["FOLDER"], "mine": ["mine"]},
        LOGS,
    ),
    "training.overwrite_output_dir": field_checks.may_not_overwrite_unless_told,
    "training.per_device_train_batch_size": Shows(lambda run: set(map(len, run.trained)), {8: {8}, 4: {4}}),
    "training.gradient_accumulation_steps": Shows(
        lambda run: (run.steps, run.metrics["train/tokens"]), {1: (8, 1024), 2: (4, 1024)}, WHOLE_PASS
    ),
    "training.micro_batches": Shows(lambda run: set(run.rows), {1: {128}, 4: {32}}),
    "training.max_steps": Shows("steps", {None: 8, 2: 2}),
    "training.max_tokens": both(
        Shows("steps", {None: 8, 128: 1, 129: 2}, WHOLE_PASS), Shows("steps", {129: 2, 10_000: 3})
    ),
    "training.loss": Shows(
        lambda run: [loss for loss in ("fvu/layers.1", "ce", "kl") if run.log(f"train/{loss}")],
        {"fvu": ["fvu/layers.1"], "ce": ["ce"], "kl": ["ce", "kl"]},
    ),
    "training.fvu_weight": both(
        Shows(lambda run: len(run.log("train/fvu/layers.1")), {0: 0, 0.5: 1}, {"training.loss": "ce"}),
        field_checks.weighs(0, {"training.loss": "ce"}),
    ),
    "training.distribute_modules": both(
        Shows(
            lambda run: run.column("heads"),
            {"false": ["layers.1, layers.2"] * 2, "true": ["layers.1", "layers.2"]},
            PLANNED,
        ),
        field_checks.does_nothing_alone,
    ),
    "training.distribute_latents": both(
        Shows(lambda run: run.column("parameters"), {"false": ["0.54", "0.54"], "true": ["0.27", "0.27"]}, PLANNED),
        field_checks.does_nothing_alone,
    ),
    "training.init_from": field_checks.begins_from_heads,
    "training.optim": Shows(
        # Only optimizers of other libraries, whose names are known.
        lambda run: {type(one).__name__ for one in run.optimizers if not type(one).__module__.startswith("sae_accel")},
        {"signum": set(), "adam": {"Adam"}, "adam8bit": {"Adam8bit"}, "muon": {"Muon", "Adam"}},
        CONSTANT,
    ),
    "training.learning_rate": both(Shows("rates", {0.5: [0.5]}), field_checks.has_a_default_for_each_optimizer),
    "training.lr_scheduler_type": Shows(
        "rates",
        {
            None: approx([0.75, 0.5, 0.25, 0]),
            "constant": approx([1, 1, 1, 1]),
            "cosine": approx([(1 + math.cos(math.pi * i / 4)) / 2 for i in (1, 2, 3, 4)]),
        },
        ADAM,
    ),
    "training.warmup_steps": Shows(
        "rates",
        {0: [1, 1, 1, 1], 3: approx([1 / 3, 2 / 3, 1, 1]), 0.5: [0.5, 1, 1, 1]},
        ADAM | CONSTANT,
    ),
    # The norm of each of two heads is 0.5.
    "training.max_grad_norm": Shows(
        lambda run: run.norms == approx([math.sqrt(2) / 2] * 3, rel=1e-3),
        {None: False, 0.5: True},
        {"training.optim": "adam", "heads.normalize_decoder": "false"},
    ),
    "training.max_non_finite": Shows(
        # One of the eight sequences of the first step has NaN.
        lambda run: run.log("train/skipped_steps"),
        {None: [1], 0.12: [1], 0.13: []},
        IN_ORDER | {"model.name_or_path": "broken"},
    ),
    "training.seed": field_checks.seeds_the_rest,
    "training.logging_steps": Shows(lambda run: run.log("step"), {None: [3], 1: [1, 2, 3], 2: [2, 3]}),
    "training.eval_steps": Shows(
        lambda run: sum(bool((batch == 0).any()) for batch in run.batches), {None: 1, 1: 3, 2: 2}, COUNTING
    ),
    "training.save_steps": Shows("checkpoints", {None: ["checkpoint-3"], 2: ["checkpoint-2", "checkpoint-3"]}),
    "training.save_total_limit": Shows(
        "checkpoints",
        {None: ["checkpoint-1", "checkpoint-2", "checkpoint-3"], 2: ["checkpoint-2", "checkpoint-3"]},
        {"training.save_steps": 1},
    ),
    "training.save_best": field_checks.keeps_the_best,
    "training.resume_from_checkpoint": field_checks.goes_on,
    "training.allow_changes": field_checks.lets_a_run_go_on_with_changes,
    "training.push_to_hub": both(
        Shows("pushed_to", {"false": [], "true": ["user/FOLDER"]}), field_checks.makes_the_repo_first
    ),
    "training.hub_model_id": both(
        Shows("pushed_to", {None: ["user/FOLDER"], "mine": ["user/mine"], "user/ours": ["user/ours"]}, PUSH),
        Shows("refusal", {"mine": Says("training.hub_model_id: nothing is pushed")}),
    ),
    "training.hub_private_repo": both(
        Shows(lambda run: run.hub.repo(run.repo).private, {None: False, "true": True, "false": False}, PUSH),
        Shows("refusal", {"true": Says("training.hub_private_repo: nothing is pushed")}),
    ),
    "training.hub_strategy": both(
        Shows(
            lambda run: (
                run.messages,
                {Path(file).parts[0] for file in run.hub.files(run.repo) if "checkpoint" in file},
            ),
            {
                "end": ([END], set()),
                None: ([*SAVED[:1], END], set()),
                "checkpoint": ([*SAVED, END], {"last-checkpoint"}),
                "all_checkpoints": ([*SAVED, END], {"checkpoint-2", "checkpoint-3"}),
            },
            PUSH | {"training.save_steps": 2},
        ),
        Shows("refusal", {"end": Says("training.hub_strategy: nothing is pushed")}),
    ),
    "training.hub_timeout": both(
        Shows(
            "refusal",
            {None: None, "1e-9": Says("the push was stopped after training.hub_timeout = 1e-09 s")},
            PUSH | {"training.hub_strategy": "end"},
        ),
        Shows("refusal", {"5": Says("training.hub_timeout: nothing is pushed")}),
    ),
    "training.report_to": Shows(
        lambda run: any(run.folder.rglob("events.out.tfevents*")), {None: False, "tensorboard": True, "none": False}
    ),
}


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory):
    """Runs in a folder with every file that a field names, and a Hub on loopback with the login of `user`."""
    root = tmp_path_factory.mktemp("fields")
    (root / "files").mkdir()
    users = {"hf_stored": "user", "hf_secret": "owner"}
    with HubServer(root / "hub", private=("owner/lm",), users=users) as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in hub.settings(root / "cache").items():
            patch.setattr(f"huggingface_hub.constants.{name}", value)
        for name, value in (("get_token", lambda: "hf_stored"), ("detect_agent", lambda: None)):
            patch.setattr(f"huggingface_hub.utils._headers.{name}", value)
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(root / "modules"))
        patch.chdir(root / "files")
        write_lms(place / "lm"), write_data()
        for name in ("owner/lm", "user/lm"):
            shutil.copytree("lm", hub.root / name)
        hub.repo("user/lm").branch("small", "main")
        small = {
            path: File(content, path.endswith(".safetensors")) for path, content in read_folder(Path("small")).items()
        }
        hub.repo("user/lm").commit("small", "Two layers", small, [], None)
        yield Runs(place, hub, root / "runs")


def test_every_field_of_every_section_is_in_the_table():
    every = [f"{section}.{option.name}" for section, arguments in SECTIONS.items() for option in fields(arguments)]
    assert sorted(FIELDS) == sorted(every)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_does_what_its_help_says(runs, field):
    FIELDS[field](field, runs)
