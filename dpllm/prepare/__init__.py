"""Preparing a model: storing it as nested bitplanes, and calibrating what each bit is worth."""
