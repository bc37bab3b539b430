"""Reports as self-contained HTML pages: tables, maps and fronts of a plan on data."""
