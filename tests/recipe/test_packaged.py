import re
from pathlib import Path

import pytest

from sae_accel.common.errors import InputError
from sae_accel.recipe import packaged
from sae_accel.recipe.command_line import answer, parse_command_line
from sae_accel.recipe.packaged import (
    MODELINE,
    check_made_by_quickstart,
    copy,
    description,
    listing,
    packaged_folder,
    packaged_names,
    with_packaged,
)
from sae_accel.recipe.recipe import Recipe, load_recipe
from sae_accel.train import main


ROOT = Path(__file__).parents[2]
FILES = [path for path in sorted((ROOT / "recipes").rglob("*")) if path.suffix in (".yaml", ".slurm")]


def test_every_file_is_listed_with_one_sentence():
    assert sorted(packaged_names()) == sorted(str(path.relative_to(ROOT / "recipes")) for path in FILES)
    lines = listing(120).splitlines()
    for path in FILES:
        name, sentence = str(path.relative_to(ROOT / "recipes")), description(path.read_text())
        assert re.fullmatch(r"[A-Z][^\n]{20,115}\.", sentence)
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert sentence.startswith(" ".join(line.split()[1:]))


@pytest.mark.parametrize("width", [40, 76, 120, 300])
def test_the_list_stays_within_the_width(width):
    assert max(map(len, listing(width).splitlines())) <= max(76, min(width, 120))


@pytest.mark.parametrize("name", ["gpt2", "gpt2.yaml", "recipes/gpt2.yaml", "recipes/gpt2"])
def test_a_name_is_a_packaged_recipe_where_there_is_no_such_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, note = with_packaged([name, "--heads.k", "3"])
    assert words == [str(packaged_folder() / "gpt2.yaml"), "--heads.k", "3"]
    assert note == f"Reads the packaged recipe {words[0]!r}, since there is no file {name!r} here."
    assert parse_command_line(words).heads[0].k == 3


def test_a_file_goes_before_a_packaged_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2.yaml").write_text("heads: [{k: 5}]")
    for words in (["gpt2.yaml"], ["--heads.k", "3"], [], ["elsewhere/gpt2.yaml"], [str(tmp_path / "gpt2.yaml")]):
        assert with_packaged(words) == (words, "")


def test_a_recipe_that_is_nowhere_is_refused_with_the_nearest_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("heads: [{k: 5}]")
    assert main(["quikstart"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sae_accel: There is no recipe 'quikstart', neither here nor in the package. Did you mean ")
    assert "mean quickstart? In this folder there are: mine.yaml. The package has gpt2.yaml, " in line
    assert main(["mien.yaml"]) == 2
    assert "Did you mean mine?" in capsys.readouterr().err


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_copy_is_the_file_with_commands_that_name_the_copy(path, tmp_path):
    name = str(path.relative_to(ROOT / "recipes"))
    told = copy(name, tmp_path)
    assert told.startswith(f"Wrote {path.name}. Edit it, then run: ") and path.name in told.split("run: ")[1]
    text = (tmp_path / path.name).read_text()
    assert f"recipes/{name}" not in text
    if "/" in name:
        assert text == path.read_text().replace(f"recipes/{name}", path.name)
    else:
        assert load_recipe(tmp_path / path.name) == load_recipe(path)
        assert text.startswith("# yaml-language-server: $schema=file:///")
        assert Path(text.splitlines()[0].split("file://")[1]) == (packaged_folder() / "schema.json").resolve()
    with pytest.raises(InputError, match=f"--copy-recipe: '{path.name}' is in this folder already"):
        copy(name, tmp_path)


def test_a_copy_has_to_be_of_a_packaged_file(tmp_path):
    with pytest.raises(InputError, match="there is no recipe 'acelerate/ddp.yaml'. Did you mean accelerate/ddp?"):
        copy("acelerate/ddp.yaml", tmp_path)


def test_the_command_copies_lists_and_prints_the_schema(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--copy-recipe", "accelerate/ddp.yaml"]) == 0 and (tmp_path / "ddp.yaml").is_file()
    assert "accelerate launch --config_file ddp.yaml -m sae_accel.train RECIPE" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["--list-recipes"]) == 0 and capsys.readouterr().out == listing(100) + "\n"


@pytest.mark.parametrize("words", [["--list-recipes", "x"], ["--copy-recipe"], ["--copy-recipe", "a", "b"]])
def test_an_option_that_answers_takes_no_other_words(words):
    with pytest.raises(
        InputError, match=f"{words[0]}: found .* takes no other words. Write: sae-accel train {words[0]}"
    ):
        answer(words)
    with pytest.raises(InputError):
        answer(["--schema", *words])


def test_a_command_line_for_a_run_gets_no_answer():
    assert answer(["gpt2", "--heads.k", "3"]) is None and answer([]) is None


def test_folders_that_make_quickstart_makes_are_asked_for_before_the_hub_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["smollm2-e2e"]) == 2
    assert "`make quickstart` makes it, in a checkout" in capsys.readouterr().err.splitlines()[-1]
    for section, field, folder in (
        ("model", "name_or_path", "quickstart/SmolLM2-135M-Instruct"),
        ("data", "path", "quickstart/text"),
        ("training", "init_from", "runs/quickstart"),
    ):
        recipe = Recipe.from_dict({section: {field: folder}})
        with pytest.raises(InputError, match=f"{section}.{field}: there is no folder '{folder}' here"):
            check_made_by_quickstart(recipe)
        (tmp_path / folder).mkdir(parents=True)
        check_made_by_quickstart(recipe)


def test_an_installed_package_has_its_recipes_inside(tmp_path, monkeypatch):
    (tmp_path / "sae_accel" / "recipes").mkdir(parents=True)
    monkeypatch.setattr(packaged, "__file__", str(tmp_path / "sae_accel" / "recipe" / "packaged.py"))
    assert packaged_folder() == tmp_path / "sae_accel" / "recipes"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_recipe_and_no_config_refers_to_the_schema(path):
    assert path.read_text().startswith(MODELINE) == (path.parent.name == "recipes")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_numbers_are_written_as_every_version_of_yaml_reads_them(path):
    """YAML 1.2, which editors read, takes 1_000 for a string."""
    assert not re.search(r"\d_\d", path.read_text())
