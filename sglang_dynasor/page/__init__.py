"""The live page: its files, the stream that feeds it, and one page for several servers."""
