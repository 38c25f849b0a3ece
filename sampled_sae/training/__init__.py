"""From stored activations to trained, evaluated and compared SAEs."""
