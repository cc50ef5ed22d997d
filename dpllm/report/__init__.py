"""`dpllm report`: one self-contained HTML page about a generation: the bits it read, its time, memory and quality.

data.py defines the contents of a report. measure.py measures them on this machine, with accounting.py (bytes),
frontier.py (quality against time), query_spread.py (spread over queries) and timed_steps.py (timed decode steps).
page.py writes the page, with the drawings of timeline.py, curves.py and bars.py. svg.py, colours.py and formatting.py
help them.
"""
