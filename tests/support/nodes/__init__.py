"""Nodes, and the orders to them."""
