"""AlphaFold-3-style Pairformers, faster, without changing what they predict."""
__version__ = "0.1.0"
