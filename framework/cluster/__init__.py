"""Ray and the machines: the only folder in which Ray is called."""
