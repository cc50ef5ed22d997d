"""Planning before text is generated: measures time and quality, and finds the best plan for given targets."""
