"""Reports for people: one self-contained HTML page with tables, intervals, curves, pictures and clips."""
