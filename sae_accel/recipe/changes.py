"""
The rules for fields that change between a checkpoint and the run that resumes from it.

Each field of a recipe has one rule. Some may change freely, some change the training and need
`training.allow_changes`, and some cannot change because the weights or the optimizer's state would not fit.
"""

from collections.abc import Iterable
from dataclasses import fields

from ..common.errors import InputError, near
from .arguments import SECTIONS


# Fields that change the training. Another value is taken only if `training.allow_changes` names the field.
_ASKS = {
    "model": "name_or_path revision dtype quantization adapter gguf_file",
    "data": "exclude_tokens",
    "heads": "k",
    "lora": "alpha",
    "training": "loss seed",
}
# Fields that change the training and the order of the data, so that a position in the old data means nothing.
_MOVES = {
    "data": "path name split load_args streaming text_column sample_by separator token_dtype ctx_len shuffle_seed"
}
# Fields that the shapes of the weights or of the optimizer's state depend on.
_FIXED = {
    "heads": "type source activation num_latents skip_connection normalize_decoder",
    "lora": "rank target_modules train_heads",
    "training": "optim",
}
# Fields that void a measurement.
_TELLS = {"data": "eval_examples"}
# Fields that name the run and its outputs, or matter only at its start.
_SILENT = {
    "model": "token trust_remote_code",
    "data": "num_proc",
    "heads": "hookpoints layers stride name expansion_factor seed",
    "training": "output_dir run_name overwrite_output_dir init_from resume_from_checkpoint allow_changes push_to_hub "
    "hub_model_id hub_private_repo hub_strategy hub_timeout report_to",
}
RULES = {
    f"{section}.{name}": rule
    for rule, table in (("asks", _ASKS), ("moves", _MOVES), ("fixed", _FIXED), ("tells", _TELLS), ("silent", _SILENT))
    for section, names in table.items()
    for name in names.split()
}
# The fields that `training.allow_changes` can name.
ALLOWABLE = [name for name, rule in RULES.items() if rule in ("asks", "moves")]


def rule_of(field: str) -> str:
    """
    The rule for a field that differs from the checkpoint's.

    Args:
        field (`str`): The field's dotted name, such as `data.path`.

    Returns:
        `str`: `"listed"`: the run lists it among the changes. `"silent"`: the run does not mention it. `"tells"`: the
        run prints a line that says which measurement it voids. `"asks"`: the run refuses it unless
        `training.allow_changes` names it. `"moves"`: as `"asks"`, and the run then reads the data from the start.
        `"fixed"`: the run refuses it; a name that is no field of a recipe has this rule, too.
    """
    section, _, name = field.partition(".")
    known = section in SECTIONS and name in {f.name for f in fields(SECTIONS[section])}
    return RULES.get(field, "listed" if known else "fixed")


def check_allowed(names: Iterable[str]) -> None:
    """
    Checks `training.allow_changes`.

    Args:
        names (`Iterable[str]`): The names in `training.allow_changes`.

    Raises:
        `InputError`: if a field cannot change, or may always change.
    """
    for name in names:
        if name not in ALLOWABLE:
            rule = rule_of(name)
            reason = "may always change" if rule in ("listed", "silent", "tells") else "cannot change in a run"
            raise InputError(
                f"training.allow_changes: {name} {reason}.{near(name, ALLOWABLE)} Allowed are {', '.join(ALLOWABLE)}."
            )
