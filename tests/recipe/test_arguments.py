from dataclasses import fields

import pytest
import yaml
from transformers import HfArgumentParser

from sae_accel.recipe.arguments import SECTIONS, HeadArguments, Help, SaeTrainingArguments


@pytest.mark.parametrize("section", SECTIONS.values())
def test_transformers_parser_takes_every_section_and_its_help(section, tmp_path):
    parser = HfArgumentParser(section)
    assert parser.parse_args_into_dataclasses([]) == (section(),)
    text = " ".join(parser.format_help().split())
    for option in fields(section):
        assert " ".join(option.metadata["help"].split())[:40] in text
    (tmp_path / "section.yaml").write_text(yaml.safe_dump({}))
    assert parser.parse_yaml_file(str(tmp_path / "section.yaml")) == (section(),)


def test_transformers_parser_sets_values_of_their_types():
    words = ["--output_dir", "x", "--learning_rate", "1e-3", "--save_best", "--optim", "adam", "--report_to", "a", "b"]
    (found,) = HfArgumentParser(SaeTrainingArguments).parse_args_into_dataclasses(words)
    wanted = dict(output_dir="x", learning_rate=1e-3, save_best=True, optim="adam", report_to=["a", "b"])
    assert found == SaeTrainingArguments(**wanted)
    (entry,) = HfArgumentParser(HeadArguments).parse_args_into_dataclasses(["--hookpoints", "h.*", "--k", "5"])
    assert entry == HeadArguments(hookpoints=["h.*"], k=5)


def test_what_is_known_of_a_field_goes_with_its_help():
    for section in SECTIONS.values():
        for option in fields(section):
            assert list(option.metadata) == ["help"] and isinstance(option.metadata["help"], Help)
    k = SECTIONS["heads"].__dataclass_fields__["k"].metadata["help"]
    assert (k.minimum, k.above, k.secret) == (1, None, False)
