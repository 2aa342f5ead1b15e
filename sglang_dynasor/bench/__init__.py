"""What branches and programs bring on a running server, measured on the reader's own questions. It knows no SGLang."""
