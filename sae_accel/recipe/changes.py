"""How a run that goes on from a checkpoint may differ from the one that wrote it."""

from collections.abc import Iterable
from dataclasses import fields

from ..common.errors import InputError, near
from .arguments import SECTIONS


# What changes what is trained: another value is meant only if `training.allow_changes` names the field.
_ASKS = {
    "model": "name_or_path revision dtype quantization adapter gguf_file",
    "data": "exclude_tokens",
    "heads": "k",
    "lora": "alpha",
    "training": "loss seed",
}
# As that; and a place in the data of the one is no place in that of the other.
_MOVES = {
    "data": "path name split load_args streaming text_column sample_by separator token_dtype ctx_len shuffle_seed"
}
# What the weights or the optimizer's state would not fit.
_FIXED = {
    "heads": "type source activation num_latents skip_connection normalize_decoder",
    "lora": "rank target_modules train_heads",
    "training": "optim",
}
# What voids a measurement.
_TELLS = {"data": "eval_examples"}
# What says where a run lies and what is told of it, or is used at its start alone.
_SILENT = {
    "model": "token trust_remote_code",
    "data": "num_proc",
    "heads": "hookpoints layers stride name expansion_factor seed",
    "training": "output_dir run_name overwrite_output_dir init_from resume_from_checkpoint allow_changes push_to_hub "
    "hub_model_id hub_private_repo hub_strategy report_to",
}
RULES = {
    f"{section}.{name}": rule
    for rule, table in (("asks", _ASKS), ("moves", _MOVES), ("fixed", _FIXED), ("tells", _TELLS), ("silent", _SILENT))
    for section, names in table.items()
    for name in names.split()
}
# What `training.allow_changes` can name.
ALLOWABLE = [name for name, rule in RULES.items() if rule in ("asks", "moves")]


def rule_of(field: str) -> str:
    """
    What happens if a field, by its dotted name, differs from that of the checkpoint.

    Returns:
        `str`: `"listed"`: it is told among the changes; `"silent"`: it is not; `"tells"`: a line says which
        measurement it voids; `"asks"`: it is refused unless `training.allow_changes` names it; `"moves"`: as that, and
        the data is then read from its start; `"fixed"`: it is refused, as is what is no field of a recipe.
    """
    section, _, name = field.partition(".")
    known = section in SECTIONS and name in {f.name for f in fields(SECTIONS[section])}
    return RULES.get(field, "listed" if known else "fixed")


def check_allowed(names: Iterable[str]) -> None:
    """
    Checks `training.allow_changes`.

    Raises:
        `InputError`: if it names what cannot change, or needs no leave.
    """
    for name in names:
        if name not in ALLOWABLE:
            rule = rule_of(name)
            reason = "may always change" if rule in ("listed", "silent", "tells") else "cannot change in a run"
            raise InputError(
                f"training.allow_changes: {name} {reason}.{near(name, ALLOWABLE)} It takes {', '.join(ALLOWABLE)}."
            )
