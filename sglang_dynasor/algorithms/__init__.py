"""Reasoning algorithms as pure policy: what to sample next, when to stop, what the answer is.

Each is one class in one file with the names of `tree.Algorithm`; none knows SGLang, reads a clock or draws a random number:
whoever runs one (`sglang_dynasor.frontend`, a simulator, a test) samples what it asks for and reports what came. `catalogue`
lists them. Nothing is imported here: the scheduler's processes take what they need.
"""
