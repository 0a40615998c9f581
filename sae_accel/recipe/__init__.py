"""
What a user asks for. A YAML file or words of a command line come in; a checked `Recipe` goes out, before any model is
read.
"""
