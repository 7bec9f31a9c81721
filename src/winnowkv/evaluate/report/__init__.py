"""What evaluations say: results, statistics, tables, charts and the page."""
