"""What runs inside SGLang's processes: the only place, with `patches/`, that may import `sglang.srt`."""
