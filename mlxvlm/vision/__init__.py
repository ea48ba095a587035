"""Vision encoders: views in, tokens out. An encoder a file."""
