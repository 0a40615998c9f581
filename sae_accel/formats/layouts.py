"""The layouts of other libraries, each a module with `find` and `open_head`."""

from . import circuit_tracer, dictionary_learning, gemma_scope, open_moss, sae_lens, sparsify, torch_files


# The order matters: `torch_files` comes last, since it takes any file that torch saved.
LAYOUTS = (sparsify, sae_lens, gemma_scope, open_moss, dictionary_learning, circuit_tracer, torch_files)
