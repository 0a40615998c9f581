"""Where tokens come from. A recipe's `data` comes in; batches of token ids go out, the same on every run."""
