"""Data sets and their loaders; start reading at `create_data` in image.py and event.py."""
