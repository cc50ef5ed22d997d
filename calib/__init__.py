"""Calibration: how many bits each group needs for each input. Offline only."""
