"""One HTML page about a run, several runs, or a comparison: `grandrounds report`.

    read.py              a run directory, as far as it is written
    svg.py               SVG: elements, marks, axes, ticks
    charts.py            line charts over rounds, column charts
    row_charts.py        a grid of sites by rounds, values with intervals
    figures.py           figures, tiles, sections, pages
    learning.py          section: losses and accuracy
    cost.py              section: communication and time
    participation.py     section: which site trained when, coverage
    client_updates.py    section: norms and cosines of updates, aggregation error
    privacy.py           section: guarantee by site, what is not covered, audit
    provenance.py        sections: commands to reproduce, recipe, versions, hashes
    headline.py          status and main results
    one_run.py           the page of one run
    several_runs.py      the page of several runs
    comparison_file.py   reads a `comparison.json`
    comparison_page.py   its page
    page.py              a page as HTML, through templates/
    browser.py           figures as SVG files, and as PNG through Chromium

A page needs no network, and no script to be read: its figures are SVG.
"""
