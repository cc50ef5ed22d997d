"""Calibration: measures how many bits each group needs for each input. runtime/ holds what decoding uses of it."""
