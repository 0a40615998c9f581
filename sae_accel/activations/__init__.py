"""What heads train on. Batches of tokens come in; activations by site go out, of this process's tokens or of all."""
