"""Every decision about programs, as plain data and pure functions: the same in the engine, in a driver and in a simulator.

The standard library and numpy only; nothing here knows SGLang, reads a clock or draws a random number.
"""
