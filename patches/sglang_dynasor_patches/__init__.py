"""Every hook on SGLang as a record: what it changes, why, and when it can go."""
