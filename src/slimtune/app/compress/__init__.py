"""`slimtune compress`."""
