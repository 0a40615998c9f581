"""Runs on streams in which something is wrong far from their start."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
from datasets import Dataset
from tiny import assert_equal, command_words, run_together, weights

from sae_accel.common.errors import InputError
from sae_accel.data import cutting, sequence_stream
from sae_accel.recipe.command_line import parse_command_line
from sae_accel.training.run import run


# 20 texts of 31 tokens are 38 sequences, or four steps and some.
BLOCK = 20
STREAM = {"data.streaming": "true", "training.per_device_train_batch_size": 8, "training.learning_rate": 1e-3}
GO_ON = {"training.resume_from_checkpoint": "true"}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sequence_stream, "SHUFFLE_BUFFER", 30)
    for module in (cutting, sequence_stream):
        monkeypatch.setattr(module, "DOCUMENTS_AT_ONCE", BLOCK)


def texts(count: int = 10 * BLOCK) -> list[str | None]:
    return [" ".join(f"w{(7 * i + j * j) % 90}" for j in range(30)) for i in range(count)]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def train(place, folder, path, **changes):
    values = {"data.path": path, "training.max_steps": 30, **STREAM, **changes}
    return run(parse_command_line(command_words(place, folder, **values)))


def test_a_stream_goes_past_bad_rows_and_counts_them_alike_whether_it_stopped_or_not(place, tmp_path, capsys):
    rows = texts()
    rows[33] = rows[101] = rows[150] = None
    path, few = write(tmp_path / "a.jsonl", rows), {"data.max_bad_rows": 3}
    whole = train(place, tmp_path / "whole", path, **few)
    line = "3 rows of the 160 that were read were left out (1.9 %): the first is row 33, whose text is null."
    assert capsys.readouterr().err.count(line) == 1
    for steps in (3, 17):
        train(place, tmp_path / "parts", path, **few, **GO_ON, **{"training.max_steps": steps})
    capsys.readouterr()
    resumed = train(place, tmp_path / "parts", path, **few, **GO_ON)
    assert capsys.readouterr().err.count(line) == 1
    assert_equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("limit", [{"data.bad_rows": "stop"}, {"data.max_bad_rows": 0}])
def test_a_run_saves_before_it_stops_at_a_row_and_goes_on_behind_it(place, tmp_path, limit):
    rows = texts()
    rows[101] = rows[102] = None
    path = write(tmp_path / "a.jsonl", rows)
    whole = train(place, tmp_path / "whole", path, **{"data.max_bad_rows": 2})
    (name,) = limit
    with pytest.raises(InputError, match=rf"{name}: .*row 101.* Saved .*/checkpoint-(\d+)\. To go on, set") as raised:
        train(place, tmp_path / "parts", path, **limit)
    assert "\n" not in str(raised.value)
    (saved,) = (tmp_path / "parts" / "run").glob("checkpoint-*")
    assert f"Saved {saved}." in str(raised.value) and int(saved.name.split("-")[1]) > 10
    resumed = train(place, tmp_path / "parts", path, **limit, **GO_ON)
    assert_equal(weights(resumed), weights(whole))


def test_a_run_that_goes_on_stops_at_the_next_row_by_its_own_name(place, tmp_path):
    rows = texts()
    rows[61] = rows[101] = None
    path, stops = write(tmp_path / "a.jsonl", rows), {"data.bad_rows": "stop"}
    for number in (61, 101):
        with pytest.raises(InputError, match=f"it is stop, and row {number} of the data cannot be used"):
            train(place, tmp_path, path, **stops, **GO_ON)
    assert train(place, tmp_path, path, **stops, **GO_ON).state.global_step == 30


def test_a_run_whose_row_was_mended_goes_on(place, tmp_path):
    path, rows = tmp_path / "a.jsonl", texts()
    whole = train(place, tmp_path / "whole", write(path, rows))
    with pytest.raises(InputError, match="Saved"):
        train(place, tmp_path / "parts", write(path, [None if i == 101 else row for i, row in enumerate(rows)]),
              **{"data.bad_rows": "stop"})  # fmt: skip
    resumed = train(place, tmp_path / "parts", write(path, rows), **GO_ON)
    assert_equal(weights(resumed), weights(whole))


def test_what_may_be_left_out_may_be_changed_on_the_way(place, tmp_path, capsys):
    rows = texts()
    rows[101] = None
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError, match="data.bad_rows"):
        train(place, tmp_path, path, **{"data.bad_rows": "stop"})
    capsys.readouterr()
    train(place, tmp_path, path, **GO_ON, **{"data.bad_rows": "skip", "data.max_bad_rows": 5})
    said = capsys.readouterr().err
    assert "data.bad_rows stop, this run has skip; data.max_bad_rows 0.01, this run has 5" in said


def broken_line(folder: Path) -> tuple[Path, str]:
    path = write(folder / "b.jsonl", texts())
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:120], lines[120][:40], *lines[121:]]))
    return path, f"{path}: line 121 is not JSON"


def broken_parquet(folder: Path) -> tuple[Path, str]:
    path = folder / "b.parquet"
    Dataset.from_dict({"text": texts()}).to_parquet(path, batch_size=40)
    place = pyarrow.parquet.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 40] = b"\xff" * 40
    path.write_bytes(content)
    return path, str(path)


@pytest.mark.parametrize("broken", [broken_line, broken_parquet])
def test_a_stream_that_breaks_has_its_run_saved_first_and_its_file_named(place, tmp_path, broken, monkeypatch):
    monkeypatch.setattr("sae_accel.data.json_lines._PIECE", 2000)
    path, words = broken(tmp_path)
    with pytest.raises(InputError) as raised:
        train(place, tmp_path, path)
    message = str(raised.value)
    assert "cannot be read to its end" in message and words in message and "\n" not in message
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert f"Saved {saved}." in message


def test_on_two_processes_bad_rows_are_counted_together_and_all_stop_at_once(place, tmp_path):
    # A thousand rows of four tokens are 250 sequences, or 31 batches. Each process reads one file.
    rows = [" ".join(f"w{(i + j) % 90}" for j in range(3)) for i in range(2200)]
    (tmp_path / "data").mkdir()
    for name, bad in (("a", 1300), ("b", 1700)):
        write(tmp_path / "data" / f"{name}.jsonl", [None if i == bad else row for i, row in enumerate(rows)])
    stream = STREAM | {"data.path": tmp_path / "data", "data.shuffle_seed": "null", "training.max_steps": 50}
    made = {
        "whole": stream,
        "parts": stream | {"data.max_bad_rows": 1},
        "resumed": stream | {"data.max_bad_rows": 1, "training.output_dir": tmp_path / "parts" / "run"} | GO_ON,
        # Two processes read all of one file.
        "one_file": stream | {"data.path": tmp_path / "data" / "a.jsonl", "training.max_steps": 20},
    }
    words = {name: {"words": command_words(place, tmp_path / name, **changes)} for name, changes in made.items()}
    found, said = run_together(2, words, tmp_path, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    first = "row 1300 of the rows that process 0 reads"
    for name in ("whole", "resumed"):
        assert [one["left_out"] for one in found[name]] == [[4000, 2, first, "whose text is null"]] * 2
    assert found["one_file"][0]["left_out"] == [2000, 1, "row 1300", "whose text is null"]
    refused = {one["refused"] for one in found["parts"]}
    (message,) = refused
    assert f"2 of 4,000 rows of the data cannot be used, more than 1; the first is {first}" in message
    assert "Saved" in message and [one["tokens"] for one in found["resumed"]] == [50 * 256] * 2
    assert said.count(f"2 rows of the 4,000 that were read were left out (0.05 %): the first is {first}") == 2
