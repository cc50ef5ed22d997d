"""Planning before text is generated: measured time, measured quality, the best plan for a target."""
