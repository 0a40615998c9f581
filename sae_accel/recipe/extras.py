import os

from ..common.extras import require_extra
from .recipe import Recipe


def check_extras(recipe: Recipe) -> None:
    """
    Checks that the packages that a recipe needs are installed. A recipe can be read where they are not.

    Raises:
        `InputError`: if one is not, with the line that installs it.
    """
    model, training = recipe.model, recipe.training
    needs = [
        (model.quantization, f"model.quantization {model.quantization}", "bitsandbytes"),
        (training.optim == "adam8bit", "training.optim adam8bit", "bitsandbytes"),
        (model.adapter, "model.adapter", "peft"),
        (recipe.lora, "lora", "peft"),
        (model.gguf_file, "model.gguf_file", "gguf"),
        ("tensorboard" in training.report_to, "training.report_to tensorboard", "tensorboard"),
    ]
    for is_needed, what, package in needs:
        if is_needed:
            require_extra(what, package)


def check_launch_extras() -> None:
    """
    Checks that DeepSpeed is installed, if the Accelerate config of this launch asks for it.

    Raises:
        `InputError`: if it is not.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true", "yes"):
        require_extra("An Accelerate config with distributed_type: DEEPSPEED", "deepspeed")
