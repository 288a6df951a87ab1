"""Pages over the feature tables: a server on this machine, and a static export of the same pages.

tables.py      the Parquet tables, opened once; questions with a time limit
overview.py    figures and plots of the start page
listing.py     the sortable, filterable list
latent.py      a latent's page
search.py      by number, token, text, explanation
compare.py     two SAEs side by side
notes.py       notes and tags, in SQLite
sql.py         SELECT typed into a page, in a process of its own (sqlworker.py)
models.py      live text and steering, one at a time
unusual.py     how unusual an activation is for its latent
stream.py      answers that are sent while they are written
parameters.py  what a request asks for, checked
connections.py strangers' connections: few, with deadlines
guard.py       who may ask the server for what
server.py      the routes
run.py         the server process
site.py        the same pages as files
static/        HTML, CSS and JavaScript as they are served
"""
