"""Pages for people: one HTML file each, which opens from disk and asks nothing of a network."""
