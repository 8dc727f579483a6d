"""Questions that are answered by running simulations."""
