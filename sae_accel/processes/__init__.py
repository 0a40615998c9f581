"""
What the processes of one run owe each other: agreement, one order, and word of a death. And their `Accelerator`.
"""
