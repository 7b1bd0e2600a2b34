"""From machine captions to texts that people publish.

    captions table --rules--> OUT/alt_text --a person--> OUT/reviews --join--> texts --export--> XMP, HTML, CSV, ...

The captions table is never changed: alt texts lie beside it row for row, and what people decide lies in an
append-only journal.
"""
