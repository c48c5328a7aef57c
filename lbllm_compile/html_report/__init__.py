"""``report.html``: one self-contained page about an artifact, and one that holds several against each other."""
