"""What programs spent and saved, kept for whoever looks."""
