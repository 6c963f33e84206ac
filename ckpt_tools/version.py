"""The version, and the name that manifests record."""

__version__ = "0.1.0"
TOOL = f"ckpt {__version__}"
