"""The layer inside the libraries that people train SAEs with; each module needs the library it is named after."""
