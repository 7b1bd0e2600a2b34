"""A local web page on which a person reviews each alt text.

    queue.py           which images are reviewed, in what order, and which have the same text
    rows.py            the data of one image
    decisions.py       the decisions of this reviewer and of others who work at the same time
    drafts.py          what a reviewer has typed and not saved, kept on the disk
    session.py         the state of one review session: what is shown and what a decision changes
    grid.py            all images, filtered and searched, one page at a time
    view.py            what is shown of an image and of a decision
    next_steps.py      the end: numbers of images by decision, and the next commands
    acceptance.py      the acceptance rate and the time per image
    standing_flags.py  the flags that still apply to an alt text
    previews.py        the images as small JPEGs, kept in memory only
    server.py          HTTP on 127.0.0.1, protected by a token
    page.html          the page, with page.css and page.js; head.html and stage.html are pieces of both pages

The page's elements and keys, which tests and the screenshots rely on:

    keys       a or Enter approve, e edit, r reject, d decorative, s skip, x needs an expert, u undo, o only this one,
               g all images, ? help; while editing Enter saves and Esc stops editing: what was typed stays as a
               draft; in the grid / searches, digits choose a number, arrows move, Enter opens, Esc goes back. Letter
               keys do nothing while a text is edited or when "Single-key shortcuts" in the help is off
    buttons    "Approve", "Edit", "Reject", "Decorative", "Skip", "Needs an expert", "Images", "Undo", "Help"; "Save"
               and "Stop editing" while editing; "Discard" beside a draft; in a group one toggle button for each image,
               "Only this one" and "All of them"
    body       data-view "card", "done" or "grid"
    #grid      all images: data-request, a counter of the pages loaded; labelled "Show", "Folder", "Search", "Number";
               one button for each image in #tiles; an item .failed for one without a caption
    #done      the end: #counts, and #commands with a "Copy" button for each command
    #card      the image under review: data-image-id, data-index; data-state "loading", "ready", "saving", "editing"
               or "done"; data-draft "none", "saving", "kept" or "failed"; data-shown, a counter that increases when a
               decision is saved and the next image is shown; data-image "loading", "shown" or "missing"
    #alt-text  the current text; #editor the text field, labelled "Alt text"
    #status    role=status: the result of the last action ("Approved.")
    #progress  reviewed and left; #acceptance the acceptance rate
"""
