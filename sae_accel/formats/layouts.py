from . import circuit_tracer, dictionary_learning, gemma_scope, open_moss, sae_lens, sparsify, torch_files


# In this order, in which the last look at what those before have left.
LAYOUTS = (sparsify, sae_lens, gemma_scope, open_moss, dictionary_learning, circuit_tracer, torch_files)
