"""What scripts that make the tables of a page share: values in CSV files, and the text between a page's two marks."""

import csv
import sys


def rows_of(file):
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def write_rows(file, rows):
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_tables(page, script, tables, check):
    """Writes the tables between the marks of a page, or fails where those that are there are other ones."""
    begin, end = f"<!-- written by scripts/{script} table -->\n", "<!-- end -->"
    before, rest = page.read_text().split(begin)
    written = before + begin + tables + end + rest.split(end, 1)[1]
    if not check:
        page.write_text(written)
    elif written != page.read_text():
        sys.exit(f"{page}: the tables are not those of the committed values: run scripts/{script} table")
