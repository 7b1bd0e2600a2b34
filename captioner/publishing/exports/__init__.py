"""Reviewed texts in the forms that others read: one module for each form.

    read_texts --choose--> Chosen rows --write--> DEST

Each form is a function of the same shape: it takes a stream of tables of CHOSEN_SCHEMA and an `Export`, and writes. A
table is as long as a part of the captions table, so a million texts stream. DEST is there whole or not at all.
"""
