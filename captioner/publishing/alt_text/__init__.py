"""Make alt texts from machine captions and join them with people's reviews.

    captions table -> rules -> OUT/alt_text -> review -> OUT/reviews -> join -> export to XMP, HTML, CSV, ...

The captions table is never changed: OUT/alt_text has one row for each of its rows, and reviews are in append-only
journals.
"""
