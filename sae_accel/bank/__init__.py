"""The heads that one run trains. Entries of a recipe come in; planned, built and initialised heads go out."""
