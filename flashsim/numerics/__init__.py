"""What attention should come to: the float64 reference, low-precision rounding, and the rules that accept a result."""
