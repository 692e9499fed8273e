"""Programs -> files on disk, and what those files say."""
