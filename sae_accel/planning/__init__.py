"""What a run will need before it starts (`--dry-run`): its own code runs on tensors without memory."""
