"""SAEs that others have trained: their rules and conventions, by the layer's three forms. Nothing here trains."""
