"""The model: configuration, decoder, loading into memory."""
