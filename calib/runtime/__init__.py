"""What a decode step computes with: profile, threshold rule, token sensitivity, bits correction."""
