"""The annotation page: people compare, rank, rate, edit, comment and chat in the browser. Needs the extra `ui`."""
