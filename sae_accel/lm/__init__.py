"""
The frozen language model. A recipe's `model` comes in; an LM goes out, with ways to read, replace and measure what its
modules give.
"""
