"""What an engine would do: a discrete-event model of continuous batching that runs the same policy objects (docs/simulator.md)."""
