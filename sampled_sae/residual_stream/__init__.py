"""The residual stream inside a language model: its blocks, hooks that read or replace it, an SAE spliced into it."""
