"""Every way to spread heads over processes: its class, its fields in the recipe, and its environment variables."""

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
WAYS = {
    "ddp": ("Replicated", {}, {}),
    "fsdp": ("FullyShardedHeads", {}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
    "zero1": ("ZeroHeads", {}, DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}),
    "zero2": ("ZeroHeads", {}, DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
    "zero3": ("ZeroHeads", {}, DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}),
    "modules": ("SpreadModules", {"training.distribute_modules": "true"}, {}),
    "latents": ("SpreadLatents", {"training.distribute_latents": "true"}, {}),
}
GLOBAL_BATCH = 6
