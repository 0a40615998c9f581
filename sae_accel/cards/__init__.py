"""What a run's folder tells a reader: its model card and plots, made from the files in it."""
