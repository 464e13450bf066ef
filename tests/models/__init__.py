"""Reduced re-implementations of the forms that published world models have; the matchers were not written for them."""
