"""SAEs on activations whose true features are known: where such data come from, and how well an SAE finds them."""
