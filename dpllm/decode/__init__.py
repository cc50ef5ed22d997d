"""One text, token after token: the decode steps, sampling, and the loop over tokens."""
