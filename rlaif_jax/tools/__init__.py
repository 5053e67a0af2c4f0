"""Tools on what a run leaves behind: its policy's answers, its export, its page, a comparison of runs."""
