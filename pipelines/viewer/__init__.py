"""Pages over the feature tables: a server on this machine, and a static export of the same pages.

tables.py      the Parquet tables, opened once; queries with a time limit
overview.py    figures and plots of the start page
listing.py     the sortable, filterable list
latent.py      a latent's page
search.py      by number, token, text, explanation
compare.py     two SAEs side by side
notes.py       notes and tags, in SQLite
sql.py         SELECT typed into a page, in a separate process (sqlworker.py)
models.py      live text and steering, one request at a time
unusual.py     how unusual an activation is for its latent
stream.py      answers that are sent while they are written
parameters.py  the parameters of a request, checked
connections.py limits and deadlines for connections without a valid request
guard.py       checks of every request: host, token, origin, size
server.py      the routes
run.py         the server process
site.py        the same pages as files
static/        HTML, CSS and JavaScript as they are served
"""
