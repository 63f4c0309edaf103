"""What the scripts at the top level share; README.md names each module's part."""

__version__ = "1.0.0"
