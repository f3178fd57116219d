"""Documents in, packed blocks of tokens out."""
