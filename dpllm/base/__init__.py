"""What every part of dpllm uses: the error for bad input, atomic files, text. It imports no other part."""
