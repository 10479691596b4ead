"""One HTML page about a run, about several, or about a comparison: `grandrounds report`.

    read.py              a run directory, as much of it as is there
    drawing.py           SVG: shapes, scales, ticks
    charts.py            lines over rounds, columns
    row_charts.py        a grid of sites and rounds, values with intervals
    figures.py           what a figure, a table and a page are; numbers as text
    learning.py          figures: losses, accuracy, communication, participation, coverage
    updates.py           figures: updates of single sites, aggregation, seconds
    facts.py             headline, recipe, environment, hashes, the command to repeat
    one_run.py           the page of one run
    several_runs.py      the page of runs side by side
    comparison_file.py   a `comparison.json`, read
    comparison_page.py   its page
    page.py              a page as HTML, through templates/
    browser.py           figures as SVG files, and as PNG through Chromium

A page needs no network and no script: the figures are SVG, drawn here.
"""
