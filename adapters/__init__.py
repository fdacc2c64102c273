"""Frameworks that seqcompress plugs into. Each module only finds the encoders and drives the core."""
