"""The version, in one place: CMakeLists.txt and setup.py read it from here."""

__version__ = "0.1.0"
