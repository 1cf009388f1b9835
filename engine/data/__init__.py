"""Data sets and their loaders: start reading at `create_data` in image.py and event.py.

To add an image data set see image.py, to add event recordings see recordings.py.
"""
