"""The part of calibration that a decode step computes with: profile, rule, sensitivity, correction."""
