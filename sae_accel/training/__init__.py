"""The loop. A recipe, an LM and data come in; trained heads go out."""
