"""The overlay: nested quantisation, its on-disk format, reading and writing it."""
