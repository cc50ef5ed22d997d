"""The overlay: nested quantisation, its format on disk, reading and writing."""
