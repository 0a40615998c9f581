class InputError(ValueError):
    """
    Something a user gave cannot be used: a recipe, a path, a model, a dataset, a checkpoint.

    Its message is one line that names the thing, what was found, what is allowed and what to do. The commands print
    that line alone and end with status 2; any other exception is a defect of this package and keeps its traceback.
    """
