"""Data sets and their loaders: start reading at `create_data` in image.py and event.py.

To add an image data set see datasets.py, to add event recordings see event.py.
"""
