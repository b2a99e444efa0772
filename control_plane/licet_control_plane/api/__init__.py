"""REST over the control plane: routes translate, and decide nothing."""
