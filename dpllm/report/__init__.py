"""`dpllm report`: one self-contained HTML page that shows what a generation read, when, and what it cost.

data.py says what is known, measure.py and its neighbours find it out on this machine, svg.py draws, page.py writes.
"""
