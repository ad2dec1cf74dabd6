"""The whole method once, thinly but for real: what `cascade demo` runs."""
