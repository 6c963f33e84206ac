"""Mixture-of-experts layers: the router, the experts, and the dispatch of tokens to experts on other processes."""
