"""Types of the compiled half."""

__version__: str
