"""How the heads of a run are spread over its processes: one class for each way, and the choice between them."""
